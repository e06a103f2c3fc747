"""Work that reads all records of a collection: find duplicates, cluster the records, verify the collection."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from emberpc.server import cancellation
from emberpc.server.collections import Cluster, CollectionBackend, DuplicatePair, Verified
from emberpc.server.engine import Caller
from emberpc.server.errors import invalid
from emberpc.server.paging import decode_token, encode_token, wrong_token
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.slots import Slots

_DEFAULT_MIN_SCORE = 0.95
_MAX_CLUSTERS = 1000
_DEFAULT_EXAMPLES, _MAX_EXAMPLES = 5, 100
#: Calls that may wait for the running one, and the seconds after which a refused caller may retry.
_MAX_WAITING, _RETRY_SECONDS = 8, 10.0

#: The collection's sequence at which the pairs were found, the least score, and the pairs.
_FoundPairs: TypeAlias = tuple[int, float, list[DuplicatePair]]

Result = TypeVar("Result")


@dataclass(frozen=True)
class DuplicatePage:
    """A page of duplicate pairs, and the token of the next page; empty after the last."""

    pairs: Sequence[DuplicatePair]
    next_token: str


class CollectionAnalysis:
    """Runs calls that read all records of a collection, one at a time: each may take minutes.

    Verifications are an exception: they run in short steps.

    Args:
        pool: runs the blocking calls of the index.
    """

    def __init__(self, pool: IndexPool) -> None:
        self._pool = pool
        self._slot = Slots(1, _MAX_WAITING, "calls that look at all records of a collection", _RETRY_SECONDS)
        #: The last pairs of each collection, for the calls for further pages.
        self._duplicates: WeakKeyDictionary[CollectionBackend, _FoundPairs] = WeakKeyDictionary()

    async def find_duplicates(
        self, collection: CollectionBackend, min_score: float, page_size: int, page_token: str, caller: Caller
    ) -> DuplicatePage:
        """Return a page of the pairs of records with similar vectors, the most similar first.

        Args:
            collection: the collection.
            min_score: the least cosine of a pair; 0: 0.95.
            page_size: pairs of the page at most.
            page_token: token of the page; empty: the first page.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT for a score outside (0, 1] or a wrong token; RESOURCE_EXHAUSTED if too many
                calls wait.
        """
        least = min_score or _DEFAULT_MIN_SCORE
        if not 0 < least <= 1:
            raise invalid("min_score", f"is {least:g}; it must be above 0 and at most 1")
        after = _read_token(page_token)
        pairs = await self._pool.run(lambda: self._pairs(collection, least), caller, heavy=True, within=self._slot)
        # Writes between two pages do not change which pairs come after the last pair of the page before.
        first = bisect_right(pairs, after, key=lambda pair: pair.order) if after else 0
        page = pairs[first : first + page_size]
        more = first + page_size < len(pairs)
        return DuplicatePage(page, encode_token(json.dumps(page[-1].order)) if more else "")

    async def clusters(
        self, collection: CollectionBackend, count: int, examples: int, caller: Caller
    ) -> Sequence[Cluster]:
        """Cluster the records by their vectors.

        Args:
            collection: the collection.
            count: number of clusters.
            examples: examples of each cluster; 0: 5.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT for a number out of range; RESOURCE_EXHAUSTED if too many calls wait.
        """
        if not 2 <= count <= _MAX_CLUSTERS:
            raise invalid("cluster_count", f"is {count}; it must be 2 to {_MAX_CLUSTERS}")
        if not 0 <= examples <= _MAX_EXAMPLES:
            problem = f"is {examples}; it must be 0 (for {_DEFAULT_EXAMPLES}) to {_MAX_EXAMPLES}"
            raise invalid("examples_per_cluster", problem)

        def cluster() -> list[Cluster]:
            return collection.clusters(count, examples or _DEFAULT_EXAMPLES, cancellation.cancelled)

        return await self._pool.run(cluster, caller, heavy=True, within=self._slot)

    async def verify(
        self, collection: CollectionBackend, caller: Caller, *, full: bool
    ) -> AsyncGenerator[Verified, None]:
        """Verify a collection, and yield the progress of each step. If the caller leaves, the step is cancelled.

        Raises:
            ServiceError: as `CollectionBackend.verify` does; RESOURCE_EXHAUSTED if too many heavy calls wait at the
                first step.
        """
        steps = collection.verify(full=full)
        first = True
        while (step := await self._pool.run(lambda: next(steps, None), caller, heavy=True, refuse=first)) is not None:
            first = False
            yield step

    def _pairs(self, collection: CollectionBackend, min_score: float) -> list[DuplicatePair]:
        """Return all pairs: those of the last call if nothing was written since. Runs in the pool."""
        sequence = collection.info().sequence
        found = self._duplicates.get(collection)
        if found is None or found[:2] != (sequence, min_score):
            pairs = collection.duplicates(min_score, cancellation.cancelled)
            # A cancelled call has found some of the pairs only, which must not be kept.
            cancellation.check()
            found = self._duplicates[collection] = (sequence, min_score, pairs)
        return found[2]


def _read_token(token: str) -> tuple[float, str, str] | None:
    """Return the order of the last pair of the page before; None for the first page."""
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
