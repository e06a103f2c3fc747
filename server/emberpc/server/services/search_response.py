"""Serialize a SearchResponse from the serialized bytes of its hits.

To fill a protobuf message takes a microsecond for each field, and ten hits have a hundred fields. So a returned record
without a time to live keeps its serialized bytes. If the index returns the same `StoredRecord` again, from its cache,
the next response uses these bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

from emberpc.server.collections import Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.pipelines.search import SearchResults
from emberpc.server.services import responses
from emberpc.server.services.index_messages import RequestedParts, record_vectors
from emberpc.server.services.record_bytes import FIRST, length_delimited, record_bytes, varint
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2

# A tag encodes number and wire type of a protobuf field, see https://protobuf.dev/programming-guides/encoding/.
#: Tag of `SearchResult.plan`: number 3, with a length.
_PLAN = b"\x1a"
#: Tag of `Hit.score`: number 2, a value of eight bytes.
_SCORE = b"\x11"
_SCORE_BYTES = 8

_STRATEGIES = {
    SearchStrategy.EXACT: pb.SEARCH_STRATEGY_EXACT,
    SearchStrategy.HNSW: pb.SEARCH_STRATEGY_HNSW,
    SearchStrategy.LEXICAL: pb.SEARCH_STRATEGY_LEXICAL,
}


_double = struct.Struct("<d").pack


def search_response(
    results: SearchResults, parts: RequestedParts, check: Callable[[int], None] = lambda _: None
) -> bytes:
    """Serialize the SearchResponse for the results of `CollectionSearch.search`.

    Args:
        results: the results.
        parts: the parts of records that the request names.
        check: as for `response_bytes`.

    Raises:
        ServiceError: as `check` does.
    """
    response, embedded = pb.SearchResponse(warnings=results.warnings), results.embedded
    usages: list[types_pb2.TokenUsage | None] = []
    if embedded is None:
        response.timings.lookup_seconds = results.lookup_seconds
    else:
        usages = [None] * len(results.outcomes)
        for row, usage in zip(embedded.rows, responses.usages(embedded.inference), strict=True):
            usages[row] = usage
        response.model.CopyFrom(responses.model_version(embedded.model))
        response.timings.CopyFrom(responses.timings([embedded.inference], results.lookup_seconds))
    return response_bytes(results.outcomes, parts, response, usages, check=check)


def response_bytes(
    outcomes: Sequence[SearchOutcome],
    parts: RequestedParts,
    rest: pb.SearchResponse,
    usages: Sequence[types_pb2.TokenUsage | None] = (),
    *,
    check: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Serialize a SearchResponse from the outcomes of its queries and its other fields.

    Args:
        outcomes: the outcome of each query; each becomes a result.
        parts: the parts of records that hits have.
        rest: the other fields of the response: model, timings and warnings.
        usages: the token usage of each query, None for a query that was not embedded; empty if none was.
        check: called after each result with the number of bytes of all results so far, without `rest`; raises an error
            if that is over the limit.

    Raises:
        ServiceError: as `check` does.
    """
    pieces: list[bytes] = []
    size = 0
    for i, outcome in enumerate(outcomes):
        result = _result(outcome, parts, usages[i] if usages else None)
        size += len(result)
        check(size)
        pieces += (FIRST, varint(len(result)), result)
    pieces.append(rest.SerializeToString())
    return b"".join(pieces)


def _result(outcome: SearchOutcome, parts: RequestedParts, usage: types_pb2.TokenUsage | None) -> bytes:
    key = parts.record_parts
    pieces: list[bytes] = []
    for record, score in outcome.hits:
        pieces += (record.serialized.get(key) or _hit_up_to_score(record, parts), _double(score))
    pieces.append(_plan(outcome.plan))
    if parts.vector or usage is not None:
        vectors = record_vectors([record for record, _ in outcome.hits], parts)
        pieces.append(pb.SearchResult(vectors=vectors, usage=usage).SerializeToString())
    return b"".join(pieces)


def _hit_up_to_score(record: StoredRecord, parts: RequestedParts) -> bytes:
    """Serialize a hit as an item of `SearchResult.hits`, with tag and length, up to and including the tag of the score.

    The caller appends the eight bytes of the score, which the length counts already.
    The record keeps the result for later responses, unless the record has a time to live: the remaining time changes.
    """
    hit = length_delimited(FIRST, record_bytes(record, parts)) + _SCORE
    prefix = FIRST + varint(len(hit) + _SCORE_BYTES) + hit
    if record.expire_time is None:
        record.serialized[parts.record_parts] = prefix
    return prefix


@lru_cache(maxsize=256)
def _plan(plan: Plan) -> bytes:
    message = pb.SearchPlan(
        strategy=_STRATEGIES[plan.strategy],
        ef=plan.ef,
        compared_count=plan.compared_count,
        shortfall_reason=plan.shortfall_reason,
        lexical_count=plan.lexical_count,
    ).SerializeToString()
    return length_delimited(_PLAN, message)
