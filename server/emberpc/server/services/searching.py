"""Search: from queries of several kinds to the hits of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic, perf_counter
from typing import TypeVar

import numpy as np

from emberpc.server.collections import MAX_TOP_K, CollectionBackend, Fusion, SearchOutcome
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Caller, Engine, Truncation
from emberpc.server.errors import ServiceError, invalid, items_of, not_found
from emberpc.server.services import replies, requests
from emberpc.server.services.binding import collection_model
from emberpc.server.services.filters import FilterReader
from emberpc.server.services.forms import Matrix, shape
from emberpc.server.services.index_pool import IndexPool, seconds_left
from emberpc.server.services.records import Parts, caller_vectors
from emberpc.server.services.search_groups import Search, SearchGroups
from emberpc.server.services.wire_hits import response_bytes
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2

_DEFAULT_TOP_K = 10
#: A response of more hits is written in the pool.
_MANY_HITS = 200

_BY_WORDS = (pb.SEARCH_MODE_LEXICAL, pb.SEARCH_MODE_HYBRID)
_FUSIONS = {
    pb.SEARCH_FUSION_UNSPECIFIED: Fusion.SCORES,
    pb.SEARCH_FUSION_SCORES: Fusion.SCORES,
    pb.SEARCH_FUSION_RANKS: Fusion.RANKS,
}
_DENSE_WEIGHT = 0.5

T = TypeVar("T")


class Searcher:
    """Answers search requests.

    Args:
        engine: embeds the queries that are texts.
        limits: how long a text may be.
        pool: runs the blocking calls of the index.
        groups: runs the searches by vectors.
    """

    def __init__(self, engine: Engine, limits: requests.Limits, pool: IndexPool, groups: SearchGroups) -> None:
        self._engine = engine
        self._limits = limits
        self._pool = pool
        self._groups = groups

    async def search(
        self, request: pb.SearchRequest, collection: CollectionBackend, context: requests.Context
    ) -> bytes:
        """Answer one request.

        Args:
            request: the request.
            collection: where to search.
            context: gRPC's view of the call.

        Returns:
            The SearchResponse, written.

        Raises:
            ServiceError: a query is wrong, or asks for what this version does not do; RESOURCE_EXHAUSTED if too many
                calls wait that may take long.
        """
        sizes = _check(request)
        parts = Parts.of(request.parts)
        if parts.vector:
            self._check_size(4 * sum(sizes) * collection.spec.dimensions)
        truncation = requests.truncation(request.truncation, default=Truncation.END)
        conditions = _conditions(request)
        response = pb.SearchResponse()
        usages: list[types_pb2.TokenUsage | None] = []
        texts = self._texts(request) if request.mode in _BY_WORDS else []
        outcomes: list[SearchOutcome]
        if request.mode == pb.SEARCH_MODE_LEXICAL:
            start = perf_counter()
            search = partial(
                collection.search_words,
                texts,
                sizes,
                with_vectors=parts.vector,
                conditions=conditions,
                parts=parts.of_record,
            )
            outcomes = await self._pool.run(search, context, heavy=True)
        else:
            queries = request.queries
            kinds = [query.WhichOneof("query") for query in queries]
            matrix = _given_vectors(queries, kinds, collection)
            if "text" in kinds:
                caller = requests.caller(context, request.priority)
                usages = await self._embed_texts(matrix, queries, kinds, collection, truncation, caller, response)
            if "record_id" in kinds:
                await self._get_records(matrix, queries, kinds, collection, context)
            start = perf_counter()
            outcomes = await self._by_vectors(request, collection, matrix, texts, sizes, conditions, parts, context)
        response.timings.lookup_seconds += perf_counter() - start
        await self._warn(collection, conditions, outcomes, response, context)
        write = partial(response_bytes, outcomes, parts, response, usages, check=self._check_size)
        # A record that was not written before takes some 10 µs: a large response would hold up the event loop.
        return await self._pool.run(write) if sum(len(outcome.hits) for outcome in outcomes) > _MANY_HITS else write()

    def _check_size(self, size: int) -> None:
        self._limits.check_response(size, "ask for fewer hits, or fewer parts of the records")

    async def _by_vectors(
        self,
        request: pb.SearchRequest,
        collection: CollectionBackend,
        matrix: Matrix,
        texts: Sequence[str],
        sizes: Sequence[int],
        conditions: Sequence[Filter | None],
        parts: Parts,
        context: requests.Context,
    ) -> list[SearchOutcome]:
        """Search by vectors, float32 (queries, dimensions), and in HYBRID mode by texts too."""
        weight = request.dense_weight if request.HasField("dense_weight") else _DENSE_WEIGHT

        def search_both(ef: int, rows: Sequence[int]) -> Awaitable[list[SearchOutcome]]:
            call = partial(
                collection.search_both,
                matrix[list(rows)],
                _some(texts, rows),
                _some(sizes, rows),
                dense_weight=weight,
                fusion=_FUSIONS[request.fusion],
                ef=ef,
                min_recall=request.min_recall,
                with_vectors=parts.vector,
                conditions=_some(conditions, rows),
                parts=parts.of_record,
            )
            return self._pool.run(call, context, heavy=True)

        def search_dense(ef: int, rows: Sequence[int]) -> Awaitable[list[SearchOutcome]]:
            search = Search(
                collection,
                matrix if len(rows) == len(matrix) else matrix[list(rows)],
                _some(sizes, rows),
                _some(excluded, rows),
                ef,
                parts.vector,
                _some(conditions, rows),
                request.min_recall,
                deadline,
                parts.of_record,
            )
            return self._groups.search(search)

        deadline = monotonic() + seconds_left(context)
        excluded = [query.record_id or None for query in request.queries]
        efs = [query.ef or request.ef for query in request.queries]
        return await _by_ef(efs, search_both if request.mode == pb.SEARCH_MODE_HYBRID else search_dense)

    async def _warn(
        self,
        collection: CollectionBackend,
        conditions: Sequence[Filter | None],
        outcomes: Sequence[SearchOutcome],
        response: pb.SearchResponse,
        context: requests.Context,
    ) -> None:
        """Say why a filter probably matches nothing, for the first query without hits."""
        for condition, outcome in zip(conditions, outcomes, strict=False):
            if condition is not None and not outcome.hits:
                # Not refused: the searches that come here have waited among the heavy calls before.
                mismatches = partial(collection.mismatches, condition)
                response.warnings.extend(await self._pool.run(mismatches, context, heavy=True, refuse=False))
                return

    def _texts(self, request: pb.SearchRequest) -> list[str]:
        """Return the queries' texts, which a search by words needs."""
        for i, query in enumerate(request.queries):
            if query.WhichOneof("query") != "text":
                mode = pb.SearchMode.Name(request.mode).removeprefix("SEARCH_MODE_")
                raise invalid(f"queries[{i}]", f"has no text, which {mode} search goes by; set text, or search DENSE")
        texts = [query.text for query in request.queries]
        self._limits.check_texts(texts, items_of("queries", "text"))
        return texts

    async def _embed_texts(
        self,
        matrix: Matrix,
        queries: Sequence[pb.SearchQuery],
        kinds: Sequence[str | None],
        collection: CollectionBackend,
        truncation: Truncation,
        caller: Caller,
        response: pb.SearchResponse,
    ) -> list[types_pb2.TokenUsage | None]:
        """Fill in the vectors of the queries that are texts; return what became of each query's text."""
        model = collection_model(self._engine, collection)
        rows = [i for i, kind in enumerate(kinds) if kind == "text"]
        texts = [queries[row].text for row in rows]

        def path(i: int) -> str:
            return f"queries[{rows[i]}].text"

        self._limits.check_texts(texts, path)
        inference = await self._engine.infer(model, texts, model.manifest.prompts.query, truncation, path, caller)
        matrix[rows] = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        response.model.CopyFrom(replies.model_version(model))
        response.timings.CopyFrom(replies.timings([inference]))
        usages: list[types_pb2.TokenUsage | None] = [None] * len(queries)
        for row, usage in zip(rows, replies.usages(inference), strict=True):
            usages[row] = usage
        return usages

    async def _get_records(
        self,
        matrix: Matrix,
        queries: Sequence[pb.SearchQuery],
        kinds: Sequence[str | None],
        collection: CollectionBackend,
        context: requests.Context,
    ) -> None:
        """Fill in the vectors of the queries that are records."""
        rows = [i for i, kind in enumerate(kinds) if kind == "record_id"]
        ids = sorted({queries[row].record_id for row in rows})
        records = await self._pool.run(lambda: collection.get(ids, with_vectors=True), context)
        found = {record.id: record.vector for record in records}
        for row in rows:
            record_id = queries[row].record_id
            if record_id not in found:
                raise not_found("record", record_id, f"queries[{row}] asks for its neighbours; upsert it first")
            matrix[row] = found[record_id]


def _given_vectors(
    queries: Sequence[pb.SearchQuery], kinds: Sequence[str | None], collection: CollectionBackend
) -> Matrix:
    """Return a row for each query, float32 (queries, dimensions); those of queries that are vectors are filled in."""
    dimensions = collection.spec.dimensions
    matrix = np.empty((len(queries), dimensions), dtype=np.float32)
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
    return matrix


async def _by_ef(
    efs: Sequence[int], search: Callable[[int, Sequence[int]], Awaitable[list[SearchOutcome]]]
) -> list[SearchOutcome]:
    """Return the outcome of each query, those with the same `ef` searched together.

    Args:
        efs: of each query.
        search: searches for those in some rows with an `ef`.
    """
    rows_of: dict[int, list[int]] = {}
    for i, ef in enumerate(efs):
        rows_of.setdefault(ef, []).append(i)
    if len(rows_of) == 1:
        return await search(efs[0], range(len(efs)))
    found = await asyncio.gather(*(search(ef, rows) for ef, rows in rows_of.items()))
    outcomes = {
        row: outcome
        for rows, some in zip(rows_of.values(), found, strict=True)
        for row, outcome in zip(rows, some, strict=True)
    }
    return [outcomes[i] for i in range(len(efs))]


def _some(option: Sequence[T], rows: Sequence[int]) -> Sequence[T]:
    """Return what an option is for some queries; as it is for all of them, or where no query has it."""
    return [option[i] for i in rows] if len(rows) < len(option) else option


def _check(request: pb.SearchRequest) -> list[int]:
    """Return how many hits each query is to have; raise INVALID_ARGUMENT for what is out of bounds."""
    queries = request.queries
    if not 1 <= len(queries) <= requests.MAX_QUERIES:
        raise invalid("queries", f"has {len(queries)} queries; it must have 1 to {requests.MAX_QUERIES}")
    common, own = request.top_k, [query.top_k for query in queries]
    if not (0 <= common <= MAX_TOP_K and min(own) >= 0 and max(own) <= MAX_TOP_K):
        raise _wrong_top_k(common, own)
    sizes = [each or common or _DEFAULT_TOP_K for each in own]
    if sum(sizes) > requests.MAX_HITS:
        raise invalid(
            "queries", f"ask for {sum(sizes)} hits in all; a call gives at most {requests.MAX_HITS}, split it"
        )
    efs = [request.ef, *(query.ef for query in queries)]
    if min(efs) < 0:
        place = next(i for i, ef in enumerate(efs) if ef < 0)
        name = f"queries[{place - 1}].ef" if place else "ef"
        raise invalid(name, f"is {efs[place]}; it must be 0 (the server chooses) or more")
    _check_mode(request)
    return sizes


def _wrong_top_k(common: int, own: Sequence[int]) -> ServiceError:
    sizes = {"top_k": common, **{f"queries[{i}].top_k": each for i, each in enumerate(own)}}
    field, top_k = next(each for each in sizes.items() if not 0 <= each[1] <= MAX_TOP_K)
    return invalid(field, f"is {top_k}; it must be 0 (for {_DEFAULT_TOP_K}) to {MAX_TOP_K}")


def _conditions(request: pb.SearchRequest) -> list[Filter | None]:
    """Read what the hits of each query must meet: its own filter, or the request's; empty if no query has one."""
    reader = FilterReader()
    common = reader.read(request.filter, "filter") if request.HasField("filter") else None
    own = [query.HasField("filter") for query in request.queries]
    if common is None and not any(own):
        return []
    return [
        reader.read(query.filter, f"queries[{i}].filter") if has else common
        for i, (query, has) in enumerate(zip(request.queries, own, strict=True))
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
