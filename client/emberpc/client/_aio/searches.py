# Generated from ../_sync/searches.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods that find records: by search, as duplicates, in clusters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import clusters, search
from emberpc.client._core.rpc_call import Call, Page
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
        """Search for the records nearest to a query. Records that are damaged on the server's disk are left out.

        Args:
            collection: name of the collection.
            query: a text that is not empty or only white space, which the collection's model embeds unless `mode` is
                `lexical`; a vector, shape (dimensions,), in a `cosine` collection not all zeros; or `RecordId(id)`,
                which searches for the records nearest to that record, without itself.
            top_k: maximum number of hits, 1 to 10,000.
            ef: candidates that a search of the graph keeps, at most 1,000,000. A greater number is slower and has a
                higher recall. 0: the server chooses. Refused together with `min_recall`, and with the mode `lexical`.
            min_recall: minimum mean share, in (0, 1], of the true nearest records that a search finds; one search may
                find fewer. With 1 the query is compared with the vector of every record that matches `where`. 0: no
                minimum share. Refused with the mode `lexical`.
            where: only records that match this filter, such as `lang = "en" and year >= 2020`; see
                `emberpc.client.filters`. None: all records.
            mode: `dense`: search by vectors; `lexical`: by words; `hybrid`: both, with joined rankings. `lexical` and
                `hybrid` need a text query.
            dense_weight: for `hybrid` only, else refused: weight of the dense ranking, 0 to 1; None: 0.7 for `bounds`,
                0.5 for `scores` and `ranks`. The lexical ranking has the weight 1 - `dense_weight`.
            fusion: for `hybrid` only, else refused: how the two rankings are joined: by `bounds` or `scores` (scores
                scaled by the greatest possible ones, or by those of the ranking), or by `ranks`; None: `bounds`.
            truncation: how a query text with too many tokens is truncated.
            with_vectors: whether to return the vectors of the hits too.
            priority: urgency of embedding the query; the server may delay texts of `bulk` calls in favour of texts of
                `interactive` calls.
            details: called with the `ResponseDetails` of the response: the model that embedded the query, tokens,
                times.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Hits, greatest score first. `search_batch` also returns the plan of the search, and whether the query was
            truncated.

        Raises:
            NotFound: there is no collection of this name, or no record with the id of a `RecordId`; or a text must be
                embedded, and the server does not serve the collection's model.
            FailedPrecondition: a text must be embedded, and the collection has no model, or the server serves another
                model under its name; or the query is a vector, and the collection's model was replaced during the call.
            DataLoss: the word index, or the record of a `RecordId`, is damaged.
            Unimplemented: the index backend is Milvus, and `min_recall` is given or the mode is not `dense`.
            InvalidArgument: the server refuses an argument, such as a `top_k` above 10,000.
            InputError: the client refuses an argument; nothing was sent.
            InputTypeError: an argument has the wrong type; nothing was sent.
            EmberpcError: the call failed otherwise.
        """
        options = SearchOptions(
            top_k=top_k,
            ef=ef,
            min_recall=min_recall,
            where=where,
            mode=mode,
            dense_weight=dense_weight,
            fusion=fusion,
            truncation=truncation,
            with_vectors=with_vectors,
            priority=priority,
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
        """Search for the records nearest to each query.

        At most 100 queries are sent in one request, and fewer if the response would be too large. The server refuses a
        request whose queries ask for more than 100,000 hits together. `search` describes the arguments in more detail.

        Args:
            collection: name of the collection.
            queries: texts, vectors, `RecordId`, or `SearchQuery` with a filter, `top_k` and `ef` of its own. Without
                queries, nothing is sent.
            top_k: maximum number of hits of a query, 1 to 10,000.
            ef: candidates that a search of the graph keeps; 0: the server chooses.
            min_recall: minimum mean share, in (0, 1], of the true nearest records that a search finds; 0: no minimum
                share.
            where: only records that match this filter; None: all records.
            mode: `dense`: search by vectors; `lexical`: by words; `hybrid`: both.
            dense_weight: for `hybrid`: weight of the dense ranking, 0 to 1; None: 0.7 for `bounds`, else 0.5.
            fusion: for `hybrid`: how the two rankings are joined; None: `bounds`.
            truncation: how query texts with too many tokens are truncated.
            with_vectors: whether to return the vectors of the hits too.
            priority: urgency of embedding the queries.
            details: called with the `ResponseDetails` of each response.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Item i is the result for query i: hits, plan of the search, tokens of the query.

        Raises:
            EmberpcError: a request failed; the errors and their causes are those of `search`.
            InputError: the client refuses an argument or a query; nothing was sent.
            InputTypeError: an argument or a query has the wrong type; nothing was sent.
        """
        options = SearchOptions(
            top_k=top_k,
            ef=ef,
            min_recall=min_recall,
            where=where,
            mode=mode,
            dense_weight=dense_weight,
            fusion=fusion,
            truncation=truncation,
            with_vectors=with_vectors,
            priority=priority,
        )
        return await self._runner.run(search.search(collection, queries, options, details=details), timeout)

    def duplicates(
        self, collection: str, *, min_score: float = 0.95, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[DuplicatePair]:
        """Iterate over pairs of records with similar vectors, greatest score first, at most 100,000 pairs.

        A damaged record, or a record with a vector of zeros, is in no pair.

        In a collection of more than 20,000 records with the distance `cosine`, the server searches the graph for the 20
        nearest neighbours of each record, so pairs may be missing. In any other collection it compares every record
        with every other. Give a large collection a long timeout.

        Args:
            collection: name of the collection.
            min_score: minimum cosine similarity of the two vectors, above 0 and at most 1, whatever the distance of the
                collection is; 0: 0.95.
            page_size: maximum number of pairs of one response, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
            InvalidArgument: the server refuses `min_score` or `page_size`.
            Unimplemented: the server's index backend does not find duplicates.
            EmberpcError: a request failed otherwise; raised, like the three errors above, when the next pair is taken.
            InputError: the client refuses an argument; raised by the call itself, but for `timeout` when the first pair
                is taken.
            InputTypeError: an argument has the wrong type; raised like InputError.
        """

        def page(token: str) -> Call[Any, Page[DuplicatePair]]:
            return clusters.find_duplicates(collection, token, min_score=min_score, page_size=page_size)

        return self._runner.pages(page, timeout)

    async def clusters(
        self, collection: str, count: int, *, examples: int = 5, timeout: float | None = None
    ) -> list[Cluster]:
        """Group the records of a collection into clusters of similar vectors, with k-means.

        A record with a damaged vector is in no cluster. Give a large collection a long timeout.

        Args:
            collection: name of the collection.
            count: number of clusters, 2 to 1000. Fewer are returned if clusters stay empty, as with equal vectors; none
                if there are no records.
            examples: maximum number of example records of each cluster, at most 100; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The clusters, largest first, each with the number of its records, and the records nearest to its centre as
            examples.

        Raises:
            NotFound: there is no collection of this name.
            InvalidArgument: the server refuses `count` or `examples`.
            Unimplemented: the server's index backend does not cluster records.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_one(clusters.cluster_records(collection, count, examples=examples), timeout)
