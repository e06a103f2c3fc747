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
#: Maximum number of searches for duplicates and clusterings that wait for the running one, and the seconds after which
#: a refused caller may retry.
_MAX_WAITING, _RETRY_SECONDS = 8, 10.0

#: Result of a search for duplicates: the collection's sequence before the search, its `min_score`, and the pairs.
_FoundPairs: TypeAlias = tuple[int, float, list[DuplicatePair]]

Result = TypeVar("Result")


@dataclass(frozen=True)
class DuplicatePage:
    """A page of duplicate pairs, and the token of the next page; the last page has an empty token."""

    pairs: Sequence[DuplicatePair]
    next_token: str


class CollectionAnalysis:
    """Runs calls that read all records of a collection.

    A search for duplicates or a clustering may take minutes, so only one of them runs at a time in the whole server.
    Several verifications may run at a time: a verification gives its thread back after each step.

    Args:
        pool: runs the blocking calls of the index.
    """

    def __init__(self, pool: IndexPool) -> None:
        self._pool = pool
        self._slot = Slots(1, _MAX_WAITING, "calls that look at all records of a collection", _RETRY_SECONDS)
        #: Result of the last search for duplicates in each collection. Calls for further pages use it.
        self._duplicates: WeakKeyDictionary[CollectionBackend, _FoundPairs] = WeakKeyDictionary()

    async def find_duplicates(
        self, collection: CollectionBackend, min_score: float, page_size: int, page_token: str, caller: Caller
    ) -> DuplicatePage:
        """Return a page of the pairs of records with similar vectors, the greatest cosine first.

        All pages together have at most 100,000 pairs. In a large collection pairs may be missed.

        Each page needs a new search for all pairs, unless the last search for duplicates in the collection had the same
        `min_score` and nothing was written since.

        Args:
            collection: the collection.
            min_score: the minimum cosine of a pair, in (0, 1]; 0: 0.95.
            page_size: maximum number of pairs of the page, at least 1.
            page_token: token of the page; empty: the first page.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong score or token; RESOURCE_EXHAUSTED if too many calls wait;
                DEADLINE_EXCEEDED if the deadline passed; UNIMPLEMENTED if the index backend cannot find duplicates; any
                other error of `CollectionBackend.duplicates`.
        """
        minimum = min_score or _DEFAULT_MIN_SCORE
        if not 0 < minimum <= 1:
            raise invalid("min_score", f"is {minimum:g}; it must be above 0 and at most 1")
        after = _read_token(page_token)
        pairs = await self._pool.run(lambda: self._pairs(collection, minimum), caller, heavy=True, within=self._slot)
        # The page starts after the sort key of the last pair of the page before. So no pair is repeated or skipped if
        # writes between the two pages added or removed other pairs.
        first = bisect_right(pairs, after, key=lambda pair: pair.order) if after else 0
        page = pairs[first : first + page_size]
        more = first + page_size < len(pairs)
        return DuplicatePage(page, encode_token(json.dumps(page[-1].order)) if more else "")

    async def clusters(
        self, collection: CollectionBackend, count: int, examples: int, caller: Caller
    ) -> Sequence[Cluster]:
        """Cluster a collection's records by their vectors, and return the clusters, largest first.

        There are no clusters if the collection has no records. If the deadline passes during the call, there may be no
        clusters instead of an error.

        Args:
            collection: the collection.
            count: maximum number of clusters, 2 to 1000; there are fewer if some would be empty.
            examples: maximum number of records that are returned of each cluster, at most 100; 0: 5.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT for a number out of range; RESOURCE_EXHAUSTED if too many calls wait, or the
                examples have too many bytes for a response; DEADLINE_EXCEEDED if the deadline passed; UNIMPLEMENTED if
                the index backend cannot cluster; any other error of `CollectionBackend.clusters`.
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
        """Verify a collection, and yield the progress after each step. If the caller leaves, its step is cancelled.

        Args:
            collection: the collection.
            caller: the caller.
            full: whether to search for every record by its own vector; otherwise for a random sample.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, before the first step, if too many heavy calls wait; DEADLINE_EXCEEDED if
                the deadline passed; any other error of `CollectionBackend.verify`.
        """
        steps = collection.verify(full=full)
        first = True
        while (step := await self._pool.run(lambda: next(steps, None), caller, heavy=True, refuse=first)) is not None:
            first = False
            yield step

    def _pairs(self, collection: CollectionBackend, min_score: float) -> list[DuplicatePair]:
        """Return the pairs that `CollectionBackend.duplicates` finds. Blocks, so it runs in the pool.

        If the last call for the collection had the same `min_score`, and nothing was written since, its pairs are
        returned. DEADLINE_EXCEEDED if the call of this thread is cancelled; any error of the collection.
        """
        sequence = collection.info().sequence
        found = self._duplicates.get(collection)
        if found is None or found[:2] != (sequence, min_score):
            pairs = collection.duplicates(min_score, cancellation.cancelled)
            # Raises if the call was cancelled: `pairs` may then be incomplete, and must not be kept.
            cancellation.check()
            found = self._duplicates[collection] = (sequence, min_score, pairs)
        return found[2]


def _read_token(token: str) -> tuple[float, str, str] | None:
    """Return the sort key that a page token encodes: that of the last pair of the previous page.

    Returns:
        The negative score and the two ids; None for an empty token, which means the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT if the token does not encode a finite number and two strings. Whether there is
            a pair with this key is not checked.
    """
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
