"""Search: from queries of several kinds to the hits of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from emberpc.server.engine import Caller, Engine, Truncation
from emberpc.server.errors import invalid, items_of, not_found
from emberpc.server.index import MAX_TOP_K, CollectionBackend, Fusion, SearchOutcome, Strategy
from emberpc.server.index.filters import Filter
from emberpc.server.services import replies, requests
from emberpc.server.services.binding import collection_model
from emberpc.server.services.filters import read_filter
from emberpc.server.services.forms import Matrix, shape
from emberpc.server.services.records import Parts, caller_vectors, fill_record, record_vectors
from emberpc.server.services.search_groups import Search, SearchGroups
from emberpc.v1 import index_pb2 as pb

_MAX_QUERIES = 1000
_DEFAULT_TOP_K = 10
#: Hits of all queries of a call together: an answer of more would be hundreds of megabytes.
_MAX_HITS = 100_000

_STRATEGIES = {
    Strategy.EXACT: pb.SEARCH_STRATEGY_EXACT,
    Strategy.HNSW: pb.SEARCH_STRATEGY_HNSW,
    Strategy.LEXICAL: pb.SEARCH_STRATEGY_LEXICAL,
}
_BY_WORDS = (pb.SEARCH_MODE_LEXICAL, pb.SEARCH_MODE_HYBRID)
_FUSIONS = {
    pb.SEARCH_FUSION_UNSPECIFIED: Fusion.SCORES,
    pb.SEARCH_FUSION_SCORES: Fusion.SCORES,
    pb.SEARCH_FUSION_RANKS: Fusion.RANKS,
}
_DENSE_WEIGHT = 0.5

InPool = Callable[[Callable[[], Any]], Awaitable[Any]]


class Searcher:
    """Answers search requests.

    Args:
        engine: embeds the queries that are texts.
        limits: how long a text may be.
        in_pool: runs a blocking call of the index in the pool.
        groups: runs the searches.
    """

    def __init__(self, engine: Engine, limits: requests.Limits, in_pool: InPool, groups: SearchGroups) -> None:
        self._engine = engine
        self._limits = limits
        self._in_pool = in_pool
        self._groups = groups

    async def search(
        self, request: pb.SearchRequest, collection: CollectionBackend, caller: Caller
    ) -> pb.SearchResponse:
        """Answer one request.

        Raises:
            ServiceError: a query is wrong, or asks for what this version does not do.
        """
        _check(request)
        parts = Parts(request.parts)
        conditions = _conditions(request)
        response = pb.SearchResponse(results=[pb.SearchResult() for _ in request.queries])
        sizes = [_top_k(request, query) for query in request.queries]
        texts = self._texts(request) if request.mode in _BY_WORDS else []
        outcomes: list[SearchOutcome]
        if request.mode == pb.SEARCH_MODE_LEXICAL:
            start = perf_counter()
            outcomes = await self._in_pool(
                lambda: collection.search_words(texts, sizes, with_vectors=parts.vector, conditions=conditions)
            )
        else:
            matrix = await self._query_vectors(request.queries, collection, caller, response)
            start = perf_counter()
            outcomes = await self._by_vectors(request, collection, matrix, texts, sizes, conditions, parts)
        response.timings.lookup_seconds += perf_counter() - start
        for result, outcome in zip(response.results, outcomes, strict=True):
            _fill(result, outcome, parts)
        return response

    async def _by_vectors(
        self,
        request: pb.SearchRequest,
        collection: CollectionBackend,
        matrix: Matrix,
        texts: Sequence[str],
        sizes: Sequence[int],
        conditions: Sequence[Filter | None],
        parts: Parts,
    ) -> list[SearchOutcome]:
        """Search by vectors, float32 (queries, dimensions), and in HYBRID mode by texts too."""
        weight = request.dense_weight if request.HasField("dense_weight") else _DENSE_WEIGHT

        def search_both(ef: int, rows: list[int]) -> Awaitable[list[SearchOutcome]]:
            call = partial(
                collection.search_both,
                matrix[rows],
                [texts[i] for i in rows],
                [sizes[i] for i in rows],
                dense_weight=weight,
                fusion=_FUSIONS[request.fusion],
                ef=ef,
                min_recall=request.min_recall,
                with_vectors=parts.vector,
                conditions=[conditions[i] for i in rows],
            )
            return self._in_pool(call)

        def search_dense(ef: int, rows: list[int]) -> Awaitable[list[SearchOutcome]]:
            search = Search(
                collection,
                matrix[rows],
                [sizes[i] for i in rows],
                [request.queries[i].record_id or None for i in rows],
                ef,
                parts.vector,
                [conditions[i] for i in rows],
                request.min_recall,
            )
            return self._groups.search(search)

        return await _by_ef(request, search_both if request.mode == pb.SEARCH_MODE_HYBRID else search_dense)

    def _texts(self, request: pb.SearchRequest) -> list[str]:
        """Return the queries' texts, which a search by words needs."""
        for i, query in enumerate(request.queries):
            if query.WhichOneof("query") != "text":
                mode = pb.SearchMode.Name(request.mode).removeprefix("SEARCH_MODE_")
                raise invalid(f"queries[{i}]", f"has no text, which {mode} search goes by; set text, or search DENSE")
        texts = [query.text for query in request.queries]
        self._limits.check_texts(texts, items_of("queries", "text"))
        return texts

    async def _query_vectors(
        self,
        queries: Sequence[pb.SearchQuery],
        collection: CollectionBackend,
        caller: Caller,
        response: pb.SearchResponse,
    ) -> Matrix:
        """Return the vector of each query, float32 (queries, dimensions); the response gets what embedding tells."""
        dimensions = collection.spec.dimensions
        matrix = np.empty((len(queries), dimensions), dtype=np.float32)
        kinds = [query.WhichOneof("query") for query in queries]
        for i, (query, kind) in enumerate(zip(queries, kinds, strict=True)):
            if kind is None:
                raise invalid(f"queries[{i}]", "asks for nothing; set text, vector or record_id")
            if kind == "vector":
                vector = caller_vectors(query.vector, 1, f"queries[{i}].vector")
                if vector.shape[1] != dimensions:
                    raise invalid(
                        f"queries[{i}].vector.dimensions",
                        f"is {vector.shape[1]}; collection {collection.spec.name!r} has {dimensions}",
                    )
                matrix[i] = vector[0]
        await self._embed_texts(
            matrix, queries, [i for i, kind in enumerate(kinds) if kind == "text"], collection, caller, response
        )
        await self._get_records(matrix, queries, [i for i, kind in enumerate(kinds) if kind == "record_id"], collection)
        return matrix

    async def _embed_texts(
        self,
        matrix: Matrix,
        queries: Sequence[pb.SearchQuery],
        rows: list[int],
        collection: CollectionBackend,
        caller: Caller,
        response: pb.SearchResponse,
    ) -> None:
        """Fill in the vectors of the queries that are texts."""
        if not rows:
            return
        model = collection_model(self._engine, collection)
        texts = [queries[row].text for row in rows]

        def path(i: int) -> str:
            return f"queries[{rows[i]}].text"

        self._limits.check_texts(texts, path)
        inference = await self._engine.infer(
            model, texts, model.manifest.prompts.query, Truncation(collection.spec.truncation), path, caller
        )
        matrix[rows] = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        response.model.CopyFrom(replies.model_version(model))
        response.timings.CopyFrom(replies.timings([inference]))
        for row, usage in zip(rows, replies.usages(inference), strict=True):
            response.results[row].usage.CopyFrom(usage)

    async def _get_records(
        self, matrix: Matrix, queries: Sequence[pb.SearchQuery], rows: list[int], collection: CollectionBackend
    ) -> None:
        """Fill in the vectors of the queries that are records."""
        if not rows:
            return
        ids = sorted({queries[row].record_id for row in rows})
        records = await self._in_pool(lambda: collection.get(ids, with_vectors=True))
        found = {record.id: record.vector for record in records}
        for row in rows:
            record_id = queries[row].record_id
            if record_id not in found:
                raise not_found("record", record_id, f"queries[{row}] asks for its neighbours; upsert it first")
            matrix[row] = found[record_id]


async def _by_ef(
    request: pb.SearchRequest, search: Callable[[int, list[int]], Awaitable[list[SearchOutcome]]]
) -> list[SearchOutcome]:
    """Return the outcome of each query, those with the same `ef` searched together.

    Args:
        request: the queries.
        search: searches for those in some rows with an `ef`.
    """
    rows_of: dict[int, list[int]] = {}
    for i, query in enumerate(request.queries):
        rows_of.setdefault(query.ef or request.ef, []).append(i)
    found = await asyncio.gather(*(search(ef, rows) for ef, rows in rows_of.items()))
    outcomes = {
        row: outcome
        for rows, some in zip(rows_of.values(), found, strict=True)
        for row, outcome in zip(rows, some, strict=True)
    }
    return [outcomes[i] for i in range(len(request.queries))]


def _check(request: pb.SearchRequest) -> None:
    """Raise INVALID_ARGUMENT for what is out of bounds."""
    if not 1 <= len(request.queries) <= _MAX_QUERIES:
        raise invalid("queries", f"has {len(request.queries)} queries; it must have 1 to {_MAX_QUERIES}")
    sizes = {"top_k": request.top_k, **{f"queries[{i}].top_k": query.top_k for i, query in enumerate(request.queries)}}
    for field, top_k in sizes.items():
        if not 0 <= top_k <= MAX_TOP_K:
            raise invalid(field, f"is {top_k}; it must be 0 (for {_DEFAULT_TOP_K}) to {MAX_TOP_K}")
    total = sum(_top_k(request, query) for query in request.queries)
    if total > _MAX_HITS:
        raise invalid("queries", f"ask for {total} hits in all; a call gives at most {_MAX_HITS}, split it")
    for name, ef in {
        "ef": request.ef,
        **{f"queries[{i}].ef": query.ef for i, query in enumerate(request.queries)},
    }.items():
        if ef < 0:
            raise invalid(name, f"is {ef}; it must be 0 (the server chooses) or more")
    _check_mode(request)


def _top_k(request: pb.SearchRequest, query: pb.SearchQuery) -> int:
    return query.top_k or request.top_k or _DEFAULT_TOP_K


def _conditions(request: pb.SearchRequest) -> list[Filter | None]:
    """Read what the hits of each query must meet: its own filter, or the request's."""
    common = read_filter(request.filter) if request.HasField("filter") else None
    return [
        read_filter(query.filter, f"queries[{i}].filter") if query.HasField("filter") else common
        for i, query in enumerate(request.queries)
    ]


def _check_mode(request: pb.SearchRequest) -> None:
    """Raise INVALID_ARGUMENT for a mode that there is not, or for what does not go with it."""
    if request.mode not in (pb.SEARCH_MODE_UNSPECIFIED, pb.SEARCH_MODE_DENSE, *_BY_WORDS):
        raise invalid("mode", f"is {request.mode}, which is no SearchMode; use DENSE, LEXICAL or HYBRID")
    if request.HasField("dense_weight"):
        if request.mode != pb.SEARCH_MODE_HYBRID:
            raise invalid("dense_weight", "is set, which goes with HYBRID only; leave it out, or set mode to HYBRID")
        if not 0 <= request.dense_weight <= 1:
            raise invalid("dense_weight", f"is {request.dense_weight}; it must be 0 to 1")
    if request.fusion not in _FUSIONS:
        raise invalid("fusion", f"is {request.fusion}, which is no SearchFusion; use SCORES or RANKS")
    if request.fusion and request.mode != pb.SEARCH_MODE_HYBRID:
        raise invalid("fusion", "is set, which goes with HYBRID only; leave it out, or set mode to HYBRID")
    if (request.ef or any(query.ef for query in request.queries)) and request.mode == pb.SEARCH_MODE_LEXICAL:
        raise invalid("ef", "is set, and LEXICAL search uses no graph; leave it out")
    if request.min_recall and request.mode == pb.SEARCH_MODE_LEXICAL:
        raise invalid("min_recall", "is set, and LEXICAL search uses no graph; leave it out")


def _fill(result: pb.SearchResult, outcome: SearchOutcome, parts: Parts) -> None:
    """Put what was found into a result."""
    for record, score in outcome.hits:
        fill_record(result.hits.add(score=score).record, record, parts)
    block = record_vectors([record for record, _ in outcome.hits], parts)
    if block is not None:
        result.vectors.CopyFrom(block)
    result.plan.CopyFrom(
        pb.SearchPlan(
            strategy=_STRATEGIES[outcome.plan.strategy],
            ef=outcome.plan.ef,
            compared_count=outcome.plan.compared_count,
            shortfall_reason=outcome.plan.shortfall_reason,
            lexical_count=outcome.plan.lexical_count,
        )
    )
