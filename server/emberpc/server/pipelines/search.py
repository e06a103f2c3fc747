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
from emberpc.server.collections.metric import dimensions_remedy
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import invalid, items_of, not_found
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.collection_model import collection_model
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.search_groups import SearchGroups, VectorSearch

#: End of the error message for a response over the limit: what the caller can do.
RESPONSE_REMEDY = "ask for fewer hits, or fewer parts of the records"

T = TypeVar("T")


class SearchMode(Enum):
    """How a search ranks records: by vectors (DENSE), by words (LEXICAL), or by both (HYBRID)."""

    DENSE = "dense"
    LEXICAL = "lexical"
    HYBRID = "hybrid"


class Query(NamedTuple):
    """A query of a search. One of text, vector and record id is set; the two others are None.

    It is a tuple, which is quick to create, since a search may have a thousand queries.

    Attributes:
        text: the text. DENSE mode embeds it, LEXICAL mode searches for its words, HYBRID mode does both.
        vector: the vector to search for, float32 (1, dimensions). Only in DENSE mode.
        record_id: id of the record whose vector is searched for; this record is no hit. Only in DENSE mode.
        top_k: maximum number of hits.
        ef: candidates that the search of the graph keeps; 0: the index chooses. Not used in LEXICAL mode.
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
        truncation: the truncation of queries that are too long for the model.
        min_recall: minimum recall of the dense ranking, at most 1; 0: no target. Must be 0 if a query has an ef. Not
            used in LEXICAL mode.
        dense_weight: weight of the dense ranking in HYBRID mode, 0 to 1; the lexical ranking has 1 - `dense_weight`.
        fusion: how HYBRID mode joins the two rankings.
        with_vectors: whether hits contain their vectors.
        parts: whether hits must contain text and metadata; they may contain more.
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
        warnings: sentences that say why the filter of one query probably matches no record. The query is the first with
            a filter and without hits. Empty if there is no such query, or no reason was found.
        lookup_seconds: wall time of the search in the collection, with the wait for a slot and a thread. It excludes
            the embedding of queries, the reading of vectors by `record_id`, and the search for warnings.
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
        rows: `rows[i]` is the index, in the search, of the query whose text is text i of the inference.
    """

    model: Model
    inference: Inference
    rows: Sequence[int]


class CollectionSearch:
    """Searches collections.

    Args:
        engine: embeds queries that are texts.
        limits: limits of a call.
        pool: runs the blocking calls of the index, except dense searches.
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
            ServiceError: NOT_FOUND if there is no such collection or no record with a `record_id`, or if a text must be
                embedded and the collection's model is not served; INVALID_ARGUMENT for a wrong text, vector or option;
                FAILED_PRECONDITION if a text must be embedded and the collection has no model or another model made its
                vectors, or if a query is a vector and the collection changes its model during the call;
                RESOURCE_EXHAUSTED if too many heavy calls or tokens wait, the deadline would probably pass, the hits
                have too many bytes, or, with vectors, the vectors of as many hits as all `top_k` together would have
                too many bytes; DEADLINE_EXCEEDED if the deadline passed; any other error of `CollectionAccess.open`,
                `Inferrer.infer` and the methods of `CollectionBackend`.
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
            self._limits.check_texts(texts, items_of("queries", "text"), remedy="give it some text")
        embedded = None
        if request.mode is SearchMode.LEXICAL:
            start = perf_counter()
            outcomes = await self._search_lexical(collection, request, texts, caller)
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

    def _search_lexical(
        self, collection: CollectionBackend, request: SearchRequest, texts: Sequence[str], caller: Caller
    ) -> Awaitable[list[SearchOutcome]]:
        """Return an awaitable that runs a lexical search in the pool, as a heavy call: the outcome of each query.

        Args:
            collection: the collection.
            request: the search.
            texts: the text of each query.
            caller: the caller.
        """
        search = partial(
            collection.search_lexical,
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
        """Return an awaitable of the outcome of each query: of a dense search, or in HYBRID mode of a hybrid search.

        Args:
            collection: the collection.
            request: the search, not in LEXICAL mode.
            matrix: the vector of each query, float32 (queries, dimensions).
            texts: the text of each query in HYBRID mode; empty in DENSE mode.
            caller: the caller.
        """
        queries = request.queries
        sizes = [query.top_k for query in queries]
        excluded = [query.record_id or None for query in queries]

        def search_hybrid(ef: int, rows: Sequence[int]) -> Awaitable[list[SearchOutcome]]:
            call = partial(
                collection.search_hybrid,
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

        search = search_hybrid if request.mode is SearchMode.HYBRID else search_dense
        return _search_by_ef([query.ef for query in queries], search)

    async def _warnings(
        self,
        collection: CollectionBackend,
        request: SearchRequest,
        outcomes: Sequence[SearchOutcome],
        caller: Caller,
    ) -> list[str]:
        """Return sentences that say why the filter of the first filtered query without hits probably matches no record.

        The list is empty if each query with a filter has hits, or no reason was found. `request.conditions` must not be
        empty.
        """
        for condition, outcome in zip(request.conditions, outcomes, strict=True):
            if condition is not None and not outcome.hits:
                # Not refused if many heavy calls wait: a search with a filter is a heavy call, so the call has already
                # waited for a slot.
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
        """Embed the queries that are texts, write their vectors into the matrix, and return model and inference.

        Args:
            matrix: vectors of all queries, float32 (queries, dimensions). The rows with the indexes `rows` are changed.
            rows: indexes of the queries that are texts.
            collection: the collection, whose model embeds the texts.
            request: the search.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT if a text is empty or has too many bytes; any error of `collection_model` and
                `Inferrer.infer`.
        """
        model = collection_model(self._engine, collection)
        texts = [request.queries[row].text or "" for row in rows]

        def path(i: int) -> str:
            return f"queries[{rows[i]}].text"

        self._limits.check_texts(texts, path, remedy="give it some text, or search by a vector or a record id")
        inference = await self._engine.inferrer.infer(
            InferenceRequest(model, texts, model.manifest.prompts.query, request.truncation, path, caller)
        )
        matrix[rows] = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        return EmbeddedQueries(model, inference, rows)

    async def _fill_record_vectors(
        self, matrix: Matrix, queries: Sequence[Query], collection: CollectionBackend, caller: Caller
    ) -> None:
        """Read the vectors of the records that queries name, and write each into the row of each query with its id.

        Args:
            matrix: vectors of all queries, float32 (queries, dimensions). The rows of queries with a `record_id` are
                changed.
            queries: all queries.
            collection: the collection with the records.
            caller: the caller.

        Raises:
            ServiceError: NOT_FOUND if a named record is missing; any error of `CollectionBackend.get`, such as
                RESOURCE_EXHAUSTED if the records have too many bytes; DEADLINE_EXCEEDED if the deadline passed.
        """
        record_ids = {i: query.record_id for i, query in enumerate(queries) if query.record_id is not None}
        ids = sorted(set(record_ids.values()))
        records = await self._pool.run(lambda: collection.get(ids, with_vectors=True), caller)
        found = {record.id: record.vector for record in records}
        for row, record_id in record_ids.items():
            if record_id not in found:
                raise not_found("record", record_id, f"upsert it, or give another record in queries[{row}]")
            matrix[row] = found[record_id]


def _given_vectors(queries: Sequence[Query], collection: CollectionBackend) -> Matrix:
    """Return a matrix for the vectors of all queries, float32 (queries, dimensions).

    The rows of queries with a vector have this vector. The caller must set the other rows: their values are undefined.

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
                    f"is {query.vector.shape[1]}; collection {collection.spec.name!r} has {dimensions}; "
                    + dimensions_remedy(dimensions),
                )
            matrix[i] = query.vector[0]
    return matrix


async def _search_by_ef(
    efs: Sequence[int], search: Callable[[int, Sequence[int]], Awaitable[list[SearchOutcome]]]
) -> list[SearchOutcome]:
    """Return the outcome of each query, in order. `search` is called once for each distinct ef, all calls concurrently.

    Args:
        efs: the ef of each query; at least one.
        search: receives an ef and the indexes of queries, ascending; returns the outcomes in the order of the indexes.
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
    """Return the values of the queries at the indexes `rows`, which are distinct and ascending.

    `values` has an item for each query, or none at all. If `rows` has all queries, or `values` is empty, `values`
    itself is returned.
    """
    return [values[i] for i in rows] if len(rows) < len(values) else values
