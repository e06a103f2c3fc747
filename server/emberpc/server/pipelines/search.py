"""Search a collection. For dense and hybrid searches, queries that are texts are embedded first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np

from emberpc.server.collections import CollectionBackend, Fusion, RecordParts, SearchOutcome
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import invalid, items_of, not_found
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.model_binding import collection_model
from emberpc.server.pipelines.search_groups import SearchGroups, VectorSearch

#: End of the error message for a response over the limit: what the caller can do.
RESPONSE_REMEDY = "ask for fewer hits, or fewer parts of the records"

T = TypeVar("T")


class SearchMode(Enum):
    """How a search ranks records: by vectors, by words, or by both."""

    DENSE = "dense"
    LEXICAL = "lexical"
    HYBRID = "hybrid"


class Query(NamedTuple):
    """A query of a search. One of text, vector and record id is set; the two others are None.

    It is a tuple, which is quick to create, since a search may have a thousand queries.

    Attributes:
        text: the text to embed, or to search for by its words.
        vector: the vector, float32 (1, dimensions).
        record_id: id of the record whose vector is searched for; this record is no hit. Only in DENSE mode.
        top_k: most hits.
        ef: candidates that the search of the graph keeps; 0: the index chooses.
    """

    text: str | None
    vector: Matrix | None
    record_id: str | None
    top_k: int
    ef: int


@dataclass(frozen=True)
class SearchRequest:
    """Queries, and how to search for them.

    Attributes:
        queries: at least one query. In LEXICAL and HYBRID mode each is a text.
        mode: how the search ranks records.
        conditions: the filter of each query, or None for a query without a filter; empty if no query has a filter.
        truncation: the truncation of long texts.
        min_recall: least recall of the dense ranking, at most 1; 0: no target. Must be 0 if a query has an ef.
        dense_weight: weight of the dense ranking in HYBRID mode, 0 to 1.
        fusion: how HYBRID mode joins the two rankings.
        with_vectors: whether hits contain their vectors.
        parts: other parts that hits contain.
    """

    queries: Sequence[Query]
    mode: SearchMode
    conditions: Sequence[Filter | None]
    truncation: Truncation
    min_recall: float
    dense_weight: float
    fusion: Fusion
    with_vectors: bool
    parts: RecordParts


@dataclass(frozen=True)
class SearchResults:
    """The outcome of each query of a search.

    Attributes:
        outcomes: hits and plan of each query, in the order of the queries.
        embedded: the queries that were embedded; None if no query was embedded.
        warnings: sentences that say why a filter probably matches no record: that of the first query with a filter and
            without hits.
        lookup_seconds: wall time of the search in the collection, with the wait for a thread, but without the embedding
            of queries, the look-up of the vectors of records that are queries, and the warnings.
    """

    outcomes: Sequence[SearchOutcome]
    embedded: EmbeddedQueries | None
    warnings: Sequence[str]
    lookup_seconds: float


@dataclass(frozen=True)
class EmbeddedQueries:
    """The queries of a search that were embedded.

    Attributes:
        model: the model.
        inference: the inference of their texts.
        rows: `rows[i]` is the index of the query whose text is text i of the inference.
    """

    model: Model
    inference: Inference
    rows: Sequence[int]


class CollectionSearch:
    """Searches collections.

    Args:
        engine: embeds queries that are texts.
        limits: limits of a call.
        pool: runs the blocking calls of the index.
        groups: runs the dense searches.
        access: opens collections.
    """

    def __init__(
        self, engine: Engine, limits: Limits, pool: IndexPool, groups: SearchGroups, access: CollectionAccess
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._pool = pool
        self._groups = groups
        self._access = access

    async def search(self, name: str, request: SearchRequest, caller: Caller) -> SearchResults:
        """Search the collection with a name.

        Raises:
            ServiceError: NOT_FOUND if the collection, a record of a query, or the model for a text does not exist;
                INVALID_ARGUMENT for a wrong text, vector or option; FAILED_PRECONDITION if a text must be embedded and
                the collection has no model or another one is served, or if a query is a vector and the collection
                changed its model meanwhile; RESOURCE_EXHAUSTED if too many heavy calls or tokens wait, or the response
                would be too large (with vectors, one is counted for each of the `top_k` of each query);
                DEADLINE_EXCEEDED if the deadline passed; any other error of `Inferrer.infer`.
        """
        return await self._access.use(
            name,
            lambda collection: self._search(collection, request, caller),
            has_vectors=any(query.vector is not None for query in request.queries),
        )

    async def _search(self, collection: CollectionBackend, request: SearchRequest, caller: Caller) -> SearchResults:
        queries = request.queries
        if request.with_vectors:
            size = 4 * sum(query.top_k for query in queries) * collection.spec.dimensions
            self._limits.check_response(size, RESPONSE_REMEDY)
        texts: list[str] = []
        if request.mode is not SearchMode.DENSE:
            texts = [query.text or "" for query in queries]
            self._limits.check_texts(texts, items_of("queries", "text"))
        embedded = None
        if request.mode is SearchMode.LEXICAL:
            start = perf_counter()
            outcomes = await self._search_words(collection, request, texts, caller)
        else:
            matrix = _given_vectors(queries, collection)
            rows = [i for i, query in enumerate(queries) if query.text is not None]
            if rows:
                embedded = await self._embed(matrix, rows, collection, request, caller)
            if any(query.record_id is not None for query in queries):
                await self._fill_record_vectors(matrix, queries, collection, caller)
            start = perf_counter()
            outcomes = await self._search_vectors(collection, request, matrix, texts, caller)
        seconds = perf_counter() - start
        warnings = await self._warnings(collection, request, outcomes, caller) if request.conditions else []
        return SearchResults(outcomes, embedded, warnings, seconds)

    def _search_words(
        self, collection: CollectionBackend, request: SearchRequest, texts: Sequence[str], caller: Caller
    ) -> Awaitable[list[SearchOutcome]]:
        """Run a lexical search in the pool, and return the outcome of each query.

        Args:
            collection: the collection.
            request: the options of the search.
            texts: the text of each query.
            caller: the caller.
        """
        search = partial(
            collection.search_words,
            texts,
            [query.top_k for query in request.queries],
            with_vectors=request.with_vectors,
            conditions=request.conditions,
            parts=request.parts,
        )
        return self._pool.run(search, caller, heavy=True)

    def _search_vectors(
        self,
        collection: CollectionBackend,
        request: SearchRequest,
        matrix: Matrix,
        texts: Sequence[str],
        caller: Caller,
    ) -> Awaitable[list[SearchOutcome]]:
        """Return the outcome of each query: of a dense search, or in HYBRID mode of a hybrid search.

        Args:
            collection: the collection.
            request: the options of the search.
            matrix: vectors of the queries, float32 (queries, dimensions).
            texts: texts of the queries in HYBRID mode; empty in DENSE mode.
            caller: the caller.
        """
        queries = request.queries
        sizes = [query.top_k for query in queries]
        excluded = [query.record_id or None for query in queries]

        def search_both(ef: int, rows: Sequence[int]) -> Awaitable[list[SearchOutcome]]:
            call = partial(
                collection.search_both,
                matrix[list(rows)],
                _select(texts, rows),
                _select(sizes, rows),
                dense_weight=request.dense_weight,
                fusion=request.fusion,
                ef=ef,
                min_recall=request.min_recall,
                with_vectors=request.with_vectors,
                conditions=_select(request.conditions, rows),
                parts=request.parts,
            )
            return self._pool.run(call, caller, heavy=True)

        def search_dense(ef: int, rows: Sequence[int]) -> Awaitable[list[SearchOutcome]]:
            search = VectorSearch(
                collection,
                matrix if len(rows) == len(matrix) else matrix[list(rows)],
                _select(sizes, rows),
                _select(excluded, rows),
                ef,
                request.with_vectors,
                _select(request.conditions, rows),
                request.min_recall,
                caller.deadline,
                request.parts,
            )
            return self._groups.search(search)

        search = search_both if request.mode is SearchMode.HYBRID else search_dense
        return _search_by_ef([query.ef for query in queries], search)

    async def _warnings(
        self,
        collection: CollectionBackend,
        request: SearchRequest,
        outcomes: Sequence[SearchOutcome],
        caller: Caller,
    ) -> list[str]:
        """Return sentences that say why the filter of the first filtered query without hits probably matches no record.

        The list is empty if each query with a filter has hits, or no reason was found.
        """
        for condition, outcome in zip(request.conditions, outcomes, strict=True):
            if condition is not None and not outcome.hits:
                # Not refused if many heavy calls wait, since the search itself has already waited as a heavy call.
                mismatches = partial(collection.mismatches, condition)
                return await self._pool.run(mismatches, caller, heavy=True, refuse=False)
        return []

    async def _embed(
        self,
        matrix: Matrix,
        rows: Sequence[int],
        collection: CollectionBackend,
        request: SearchRequest,
        caller: Caller,
    ) -> EmbeddedQueries:
        """Embed the texts of some queries, write their vectors into the matrix, and return the model and the inference.

        Args:
            matrix: vectors of all queries, float32 (queries, dimensions); the rows in `rows` are set.
            rows: indexes of the queries that are texts.
            collection: the collection, whose model embeds the texts.
            request: the search.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT if a text is too long or empty; NOT_FOUND or FAILED_PRECONDITION if the model
                of the collection is not served; any error of `Inferrer.infer`.
        """
        model = collection_model(self._engine, collection)
        texts = [request.queries[row].text or "" for row in rows]

        def path(i: int) -> str:
            return f"queries[{rows[i]}].text"

        self._limits.check_texts(texts, path)
        inference = await self._engine.inferrer.infer(
            InferenceRequest(model, texts, model.manifest.prompts.query, request.truncation, path, caller)
        )
        matrix[rows] = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        return EmbeddedQueries(model, inference, rows)

    async def _fill_record_vectors(
        self, matrix: Matrix, queries: Sequence[Query], collection: CollectionBackend, caller: Caller
    ) -> None:
        """Read the vectors of the records that queries name, and write each into the row of its query.

        Args:
            matrix: vectors of all queries, float32 (queries, dimensions).
            queries: all queries.
            collection: the collection with the records.
            caller: the caller.

        Raises:
            ServiceError: NOT_FOUND if there is no such record; any error of `CollectionBackend.get`, such as
                RESOURCE_EXHAUSTED if the records have too many bytes.
        """
        record_ids = {i: query.record_id for i, query in enumerate(queries) if query.record_id is not None}
        ids = sorted(set(record_ids.values()))
        records = await self._pool.run(lambda: collection.get(ids, with_vectors=True), caller)
        found = {record.id: record.vector for record in records}
        for row, record_id in record_ids.items():
            if record_id not in found:
                raise not_found("record", record_id, f"queries[{row}] searches by its vector; upsert it first")
            matrix[row] = found[record_id]


def _given_vectors(queries: Sequence[Query], collection: CollectionBackend) -> Matrix:
    """Return a matrix for the vectors of all queries, float32 (queries, dimensions).

    The rows of queries with a vector are set. The other rows have any values.

    Raises:
        ServiceError: INVALID_ARGUMENT if a vector has other dimensions than the collection.
    """
    dimensions = collection.spec.dimensions
    matrix = np.empty((len(queries), dimensions), dtype=np.float32)
    for i, query in enumerate(queries):
        if query.vector is not None:
            if query.vector.shape[1] != dimensions:
                raise invalid(
                    f"queries[{i}].vector.dimensions",
                    f"is {query.vector.shape[1]}; collection {collection.spec.name!r} has {dimensions}",
                )
            matrix[i] = query.vector[0]
    return matrix


async def _search_by_ef(
    efs: Sequence[int], search: Callable[[int, Sequence[int]], Awaitable[list[SearchOutcome]]]
) -> list[SearchOutcome]:
    """Return the outcome of each query, in order. Queries with equal ef are searched together, all groups concurrently.

    Args:
        efs: the ef of each query.
        search: receives an ef and the indexes of queries; returns the outcomes of these queries.
    """
    rows_of: dict[int, list[int]] = {}
    for i, ef in enumerate(efs):
        rows_of.setdefault(ef, []).append(i)
    if len(rows_of) == 1:
        return await search(efs[0], range(len(efs)))
    found = await asyncio.gather(*(search(ef, rows) for ef, rows in rows_of.items()))
    outcomes = {
        row: outcome
        for rows, group in zip(rows_of.values(), found, strict=True)
        for row, outcome in zip(rows, group, strict=True)
    }
    return [outcomes[i] for i in range(len(efs))]


def _select(values: Sequence[T], rows: Sequence[int]) -> Sequence[T]:
    """Return the values at the indexes `rows`; `values` itself if it has no more items than `rows`.

    `values` has an item for each query, or none at all.
    """
    return [values[i] for i in rows] if len(rows) < len(values) else values
