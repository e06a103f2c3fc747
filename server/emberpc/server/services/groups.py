"""A collection seen whole: what in it is alike, and in which groups it falls."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from emberpc.server import cancellation
from emberpc.server.collections import CollectionBackend, DuplicatePair
from emberpc.server.errors import invalid
from emberpc.server.paging import decode_token, encode_token, wrong_token
from emberpc.server.services import requests
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.records import Parts, fill_record
from emberpc.server.services.slots import Slots
from emberpc.v1 import index_pb2 as pb

_DEFAULT_MIN_SCORE = 0.95
_MAX_CLUSTERS = 1000
_DEFAULT_EXAMPLES, _MAX_EXAMPLES = 5, 100
#: Calls that may wait for the one under way; a caller beyond is refused, and may try again after these seconds.
_MOST_WAITING, _RETRY_SECONDS = 8, 10.0

#: The number of the write that it goes for, the bound, and the pairs.
_Found: TypeAlias = tuple[int, float, list[DuplicatePair]]

Result = TypeVar("Result")


class Groups:
    """Answers the calls that look at all records of a collection, one at a time: each may take minutes.

    Args:
        pool: where they run.
        limits: how large a response may be.
    """

    def __init__(self, pool: IndexPool, limits: requests.Limits) -> None:
        self._limits = limits
        self._pool = pool
        self._turn = Slots(1, _MOST_WAITING, "calls that look at all records of a collection", _RETRY_SECONDS)
        #: Of each collection what was found last, for those who ask for the next page.
        self._duplicates: WeakKeyDictionary[CollectionBackend, tuple[int, float, list[DuplicatePair]]] = (
            WeakKeyDictionary()
        )

    async def find_duplicates(
        self, request: pb.FindDuplicatesRequest, collection: CollectionBackend, context: requests.Context
    ) -> pb.FindDuplicatesResponse:
        """Answer a FindDuplicates.

        Raises:
            ServiceError: INVALID_ARGUMENT for a bound outside (0, 1], a page of another size, or a token of another;
                RESOURCE_EXHAUSTED if too many calls wait.
        """
        min_score = request.min_score or _DEFAULT_MIN_SCORE
        if not 0 < min_score <= 1:
            raise invalid("min_score", f"is {min_score:g}; it must be above 0 and at most 1")
        size = requests.page_size(request.page_size)
        after = _read_token(request.page_token)
        pairs = await self._run(lambda: self._pairs(collection, min_score), context)
        # What changed meanwhile moves no pair to the other side of the one that the page before ended with.
        first = bisect_right(pairs, after, key=lambda pair: pair.order) if after else 0
        page = pairs[first : first + size]
        more = first + size < len(pairs)
        return pb.FindDuplicatesResponse(
            pairs=[
                pb.DuplicatePair(first_id=pair.first_id, second_id=pair.second_id, score=pair.score) for pair in page
            ],
            next_page_token=encode_token(json.dumps(page[-1].order)) if more else "",
        )

    async def cluster_records(
        self, request: pb.ClusterRecordsRequest, collection: CollectionBackend, context: requests.Context
    ) -> pb.ClusterRecordsResponse:
        """Answer a ClusterRecords.

        Raises:
            ServiceError: INVALID_ARGUMENT for a number that is out of bounds, RESOURCE_EXHAUSTED if too many calls
                wait.
        """
        if not 2 <= request.cluster_count <= _MAX_CLUSTERS:
            raise invalid("cluster_count", f"is {request.cluster_count}; it must be 2 to {_MAX_CLUSTERS}")
        if not 0 <= request.examples_per_cluster <= _MAX_EXAMPLES:
            what = f"is {request.examples_per_cluster}; it must be 0 (for {_DEFAULT_EXAMPLES}) to {_MAX_EXAMPLES}"
            raise invalid("examples_per_cluster", what)
        examples = request.examples_per_cluster or _DEFAULT_EXAMPLES
        clusters = await self._run(
            lambda: collection.clusters(request.cluster_count, examples, cancellation.cancelled), context
        )
        response = pb.ClusterRecordsResponse()
        parts, size = Parts(()), 0
        for cluster in clusters:
            message = response.clusters.add(record_count=cluster.record_count)
            for record in cluster.examples:
                fill_record(message.examples.add(), record, parts)
            size += message.ByteSize()
            self._limits.check_response(size, "ask for fewer examples")
        return response

    def _pairs(self, collection: CollectionBackend, min_score: float) -> list[DuplicatePair]:
        """Return all pairs: those found for the page before, if nothing was written since; in the pool."""
        sequence = collection.info().sequence
        kept = self._duplicates.get(collection)
        if kept is None or kept[:2] != (sequence, min_score):
            pairs = collection.duplicates(min_score, cancellation.cancelled)
            # What was found until then is not all, so it must not be kept.
            cancellation.check()
            kept = self._duplicates[collection] = (sequence, min_score, pairs)
        return kept[2]

    async def _run(self, work: Callable[[], Result], context: requests.Context) -> Result:
        """Run work in the pool, one at a time."""
        return await self._pool.run(work, context, heavy=True, within=self._turn)


def _read_token(token: str) -> tuple[float, str, str] | None:
    """Return the order of the pair that a page follows; None for the first page."""
    if not token:
        return None
    try:
        score, first_id, second_id = json.loads(decode_token(token))
    except (ValueError, TypeError, RecursionError) as error:
        raise wrong_token() from error
    ids = isinstance(first_id, str) and isinstance(second_id, str)
    if not (ids and isinstance(score, float) and math.isfinite(score)):
        raise wrong_token()
    return score, first_id, second_id
