# Generated from ../_sync/searches.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods that find records: search, duplicates, clusters."""

from __future__ import annotations

# The docstring of the client documents the parameters that all methods have in common.
# ruff: noqa: D417
from collections.abc import AsyncIterator, Iterable
from typing import Any

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import clusters, search
from emberpc.client._core.calls import Call, Page
from emberpc.client._core.search import SearchOptions
from emberpc.client.details import Details
from emberpc.client.filters import Where
from emberpc.client.types import (
    Cluster,
    DuplicatePair,
    Fusion,
    Hit,
    Priority,
    Query,
    SearchMode,
    SearchQuery,
    SearchResult,
    Truncation,
)


class AsyncSearchMethods:
    """Methods of `AsyncClient` that find records. `duplicates` and `clusters` read the whole collection."""

    _runner: AsyncRunner

    async def search(
        self,
        collection: str,
        query: Query,
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        priority: Priority = "interactive",
        details: Details | None = None,
        timeout: float | None = None,
    ) -> list[Hit]:
        """Search for the records nearest to a query.

        Args:
            collection: name of the collection.
            query: a text, which the collection's model embeds; a vector, shape (dimensions,); or `RecordId(id)`, which
                searches for the neighbours of that record.
            top_k: the most hits, 1 to 10,000.
            ef: candidates that the graph search keeps. A greater number is slower and has a higher recall; 0: the
                server chooses.
            min_recall: least recall, in (0, 1], instead of `ef`: share of the true nearest records to find. 1 compares
                every vector.
            where: only records that match, such as `lang = "en" and year >= 2020`; see `emberpc.client.filters`.
            mode: `dense`: by vectors; `lexical`: by words; `hybrid`: both joined. The last two need a text query.
            dense_weight: `hybrid`: weight of the dense ranking, 0 to 1; None: 0.5.
            fusion: `hybrid`: how the two rankings are joined, by `scores` (None) or by `ranks`.
            truncation: how a query text with too many tokens is truncated; `SearchResult.truncated` tells whether it
                was.
            with_vectors: whether to return the vectors of the hits too.
            priority: `bulk` lets other calls go first.
            details: called with `ResponseDetails` of each response: the model that embedded the queries, and times.

        Returns:
            Hits, nearest first. `search_batch` also returns the plan of the search.
        """
        options = SearchOptions(
            top_k, ef, min_recall, where, mode, dense_weight, fusion, truncation, with_vectors, priority
        )
        results = await self._runner.run(
            search.search(collection, [query], options, details=details, name="query"), timeout
        )
        return list(results[0].hits)

    async def search_batch(
        self,
        collection: str,
        queries: Iterable[Query | SearchQuery],
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        priority: Priority = "interactive",
        details: Details | None = None,
        timeout: float | None = None,
    ) -> list[SearchResult]:
        """Search for the records nearest to each query; the other arguments are those of `search`.

        A query may be a `SearchQuery` with its own options.

        Returns:
            Item i is the result for query i: hits and the plan of the search. If the response to a request would be too
            large, the queries are sent in smaller requests.
        """
        options = SearchOptions(
            top_k, ef, min_recall, where, mode, dense_weight, fusion, truncation, with_vectors, priority
        )
        return await self._runner.run(search.search(collection, queries, options, details=details), timeout)

    def duplicates(
        self, collection: str, *, min_score: float = 0.95, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[DuplicatePair]:
        """Iterate over pairs of records that are near to each other, highest score first, at most 100,000.

        In a collection of up to 20,000 records each record is compared with every other. In a larger one, which must
        have the distance `cosine`, the graph is searched for each record and returns up to 20 neighbours of it.
        Give a large collection a long timeout.

        Args:
            collection: name of the collection.
            min_score: least cosine similarity of the two vectors, above 0 and at most 1.
            page_size: pairs per request, at most 1000; 0: the server's default.
        """

        def page(token: str) -> Call[Any, Page[DuplicatePair]]:
            return clusters.find_duplicates(collection, token, min_score=min_score, page_size=page_size)

        return self._runner.pages(page, timeout)

    async def clusters(
        self, collection: str, count: int, *, examples: int = 5, timeout: float | None = None
    ) -> list[Cluster]:
        """Group the records of a collection into clusters, with k-means.

        Give a large collection a long timeout.

        Args:
            collection: name of the collection.
            count: number of clusters, 2 to 1000. Fewer are returned if records have equal vectors.
            examples: example records per cluster, at most 100.

        Returns:
            The clusters, largest first.
        """
        return await self._runner.run_one(clusters.cluster_records(collection, count, examples=examples), timeout)
