"""Search results as bytes: what a SearchResponse of them would be written as, put together from what is kept.

A message takes a microsecond for each of its parts, and ten hits have a hundred.
A record that is found again was written before, and its bytes are with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

from emberpc.server.collections import Plan, SearchOutcome, StoredRecord, Strategy
from emberpc.server.services.records import Parts, record_message, record_vectors
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2

# Tags of fields: number and wire type, as of https://protobuf.dev/programming-guides/encoding/.
#: SearchResponse.results, SearchResult.hits and Hit.record have the number 1, and a length.
_FIRST = b"\x0a"
#: SearchResult.plan: number 3, and a length.
_PLAN = b"\x1a"
#: Hit.score: number 2, eight bytes.
_SCORE = b"\x11"
_SCORE_BYTES = 8

_STRATEGIES = {
    Strategy.EXACT: pb.SEARCH_STRATEGY_EXACT,
    Strategy.HNSW: pb.SEARCH_STRATEGY_HNSW,
    Strategy.LEXICAL: pb.SEARCH_STRATEGY_LEXICAL,
}


_double = struct.Struct("<d").pack


def response_bytes(
    outcomes: Sequence[SearchOutcome],
    parts: Parts,
    rest: pb.SearchResponse,
    usages: Sequence[types_pb2.TokenUsage | None] = (),
    *,
    check: Callable[[int], None] = lambda _: None,
) -> bytes:
    """Write a SearchResponse.

    Args:
        outcomes: what was found for each query; it makes the results.
        parts: what the hits have of their records.
        rest: what the response has beside results.
        usages: what became of each query's text; empty: there were none.
        check: raises an error if a response of that many bytes is too large.
    """
    pieces: list[bytes] = []
    size = 0
    for i, outcome in enumerate(outcomes):
        result = _result(outcome, parts, usages[i] if usages else None)
        size += len(result)
        check(size)
        pieces += (_FIRST, varint(len(result)), result)
    pieces.append(rest.SerializeToString())
    return b"".join(pieces)


def _result(outcome: SearchOutcome, parts: Parts, usage: types_pb2.TokenUsage | None) -> bytes:
    asked = parts.of_record
    pieces: list[bytes] = []
    for record, score in outcome.hits:
        pieces += (record.forms.get(asked) or _hit_up_to_score(record, parts), _double(score))
    pieces.append(_plan(outcome.plan))
    if parts.vector or usage is not None:
        vectors = record_vectors([record for record, _ in outcome.hits], parts)
        pieces.append(pb.SearchResult(vectors=vectors, usage=usage).SerializeToString())
    return b"".join(pieces)


def _hit_up_to_score(record: StoredRecord, parts: Parts) -> bytes:
    """Write a hit but for the eight bytes of its score, which come last; and keep that, unless it changes with time."""
    message = record_message(record, parts).SerializeToString()
    within = b"".join((_FIRST, varint(len(message)), message, _SCORE))
    form = b"".join((_FIRST, varint(len(within) + _SCORE_BYTES), within))
    if record.expire_time is None:
        record.forms[parts.of_record] = form
    return form


@lru_cache(maxsize=256)
def _plan(plan: Plan) -> bytes:
    message = pb.SearchPlan(
        strategy=_STRATEGIES[plan.strategy],
        ef=plan.ef,
        compared_count=plan.compared_count,
        shortfall_reason=plan.shortfall_reason,
        lexical_count=plan.lexical_count,
    ).SerializeToString()
    return b"".join((_PLAN, varint(len(message)), message))


def varint(number: int) -> bytes:
    """Write a number that is not negative: seven bits a byte, the least first; all but the last have the eighth set."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
