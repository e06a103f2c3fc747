"""Searches that come while others are under way wait for these, and are then done together.

A search by vector takes a tenth of a millisecond in the graph and five times as
long around it: the change of threads, the look-up of the hits, many small
calls. Together these are paid once. Nothing waits while there is room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import monotonic, perf_counter
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from emberpc.server.collections import WHOLE_RECORD, CollectionBackend, RecordParts, SearchOutcome
from emberpc.server.collections.filters import Filter
from emberpc.server.errors import ServiceError
from emberpc.server.services.forms import Matrix
from emberpc.server.services.index_pool import IndexPool

#: Queries of a group, unless one search alone has more, and the seconds that it may take.
_MOST_QUERIES = 64
_GROUP_SECONDS = 0.01
#: Seconds of a query from which on cores are better used by more groups than by larger ones.
_SLOW = 0.001
#: Candidates of all queries of a search of the graph, above which it may take long: 3 µs for each.
_MANY_CANDIDATES = 100_000

T = TypeVar("T")
Outcomes = list[SearchOutcome]


class Search(NamedTuple):
    """The arguments of `Collection.search`; and until when the outcome is wanted, in seconds of `monotonic`."""

    collection: CollectionBackend
    queries: Matrix
    top_k: Sequence[int]
    exclude_ids: Sequence[str | None] = ()
    ef: int = 0
    with_vectors: bool = False
    conditions: Sequence[Filter | None] = ()
    min_recall: float = 0
    deadline: float = inf
    parts: RecordParts = WHOLE_RECORD

    @property
    def heavy(self) -> bool:
        """Whether it may take long: it may look at every record, or for many candidates."""
        candidates = len(self.queries) * max(self.ef, *self.top_k)
        return any(self.conditions) or self.min_recall > 0 or candidates > _MANY_CANDIDATES

    @property
    def kind(self) -> Hashable:
        """What searches that may be done together have in common; `ef` follows from them.

        The first search with a filter may take a thousand times as long as one without: those do not wait for it.
        """
        return (
            self.collection,
            max(self.top_k),
            self.ef,
            self.min_recall,
            self.with_vectors,
            self.parts,
            any(self.conditions),
            self.heavy,
        )

    def run(self) -> Outcomes:
        """Search."""
        return self.collection.search(
            self.queries,
            self.top_k,
            ef=self.ef,
            min_recall=self.min_recall,
            exclude_ids=self.exclude_ids,
            with_vectors=self.with_vectors,
            conditions=self.conditions,
            parts=self.parts,
        )


_Group: TypeAlias = list[tuple[Search, "asyncio.Future[Outcomes]"]]


@dataclass
class _Kind:
    """The searches that may be done together: those that wait, and how many groups of them are under way."""

    heavy: bool
    waiting: deque[tuple[Search, asyncio.Future[Outcomes]]] = field(default_factory=deque)
    running: int = 0
    #: Whether one of the groups under way has not begun, since heavy calls are under way.
    queued: bool = False
    #: As lately measured; 0 until it was.
    seconds_per_query: float = 0.0

    @property
    def worth_another(self) -> bool:
        """Whether one more group beside those under way gains more than it costs: a thread's change, some 0.1 ms."""
        return self.seconds_per_query > _SLOW or sum(len(search.queries) for search, _ in self.waiting) >= _MOST_QUERIES

    def take(self) -> _Group:
        """Take out a group of what waits and is still wanted."""
        most = min(_MOST_QUERIES, max(1, int(_GROUP_SECONDS / self.seconds_per_query)) if self.seconds_per_query else 1)
        group: _Group = []
        queries = 0
        while self.waiting and (not group or queries + len(self.waiting[0][0].queries) <= most):
            search, outcome = self.waiting.popleft()
            if not outcome.done():  # its caller is still there
                group.append((search, outcome))
                queries += len(search.queries)
        return group


class SearchGroups:
    """Runs searches in a pool, those of a kind together. To be used from one event loop.

    Args:
        pool: where they run.
        at_once: most groups of a kind under way at a time, where more than one is worth it.
    """

    def __init__(self, pool: IndexPool, at_once: int) -> None:
        self._pool = pool
        self._at_once = at_once
        self._kinds: dict[Hashable, _Kind] = {}
        #: The loop keeps none of the tasks that it runs.
        self._tasks: set[asyncio.Task[None]] = set()

    async def search(self, search: Search) -> Outcomes:
        """Return the outcome of each query; if the caller goes away, what still waits is not done.

        Raises:
            ServiceError: as `Collection.search` says, for this search alone; RESOURCE_EXHAUSTED if it is heavy and too
                many of those wait; DEADLINE_EXCEEDED if it was not done in time.
        """
        if search.heavy:
            self._pool.heavy.check_room(sum(len(each.waiting) for each in self._kinds.values() if each.heavy))
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Outcomes] = loop.create_future()
        key = search.kind
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(search.heavy)
            # Calls that came in together are at this point in the same round of the loop: they make one group.
            loop.call_soon(self._start, loop, key, kind)
        kind.waiting.append((search, outcome))
        if kind.running and kind.running < self._at_once:
            self._start(loop, key, kind)
        try:
            return await outcome
        except asyncio.CancelledError:
            kind.waiting = deque(each for each in kind.waiting if each[1] is not outcome)
            raise

    def _start(self, loop: asyncio.AbstractEventLoop, key: Hashable, kind: _Kind) -> None:
        """Run what waits, if it should wait no longer."""
        while kind.waiting and (not kind.running or (kind.running < self._at_once and kind.worth_another)):
            if kind.heavy:
                if not kind.queued:
                    kind.running, kind.queued = kind.running + 1, True
                    task = loop.create_task(self._start_heavy(loop, key, kind))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                return
            if group := kind.take():
                kind.running += 1
                # Not by run_in_executor: a second future, and its callbacks, cost as much as a search of the graph.
                self._pool.start(partial(self._run, loop, key, kind, group))
        if not kind.waiting and not kind.running and self._kinds.get(key) is kind:
            del self._kinds[key]

    async def _start_heavy(self, loop: asyncio.AbstractEventLoop, key: Hashable, kind: _Kind) -> None:
        """Run a group of what waits by the time that heavy calls have their turn."""
        # There is one such group of a kind, and the searches of all kinds are bounded.
        await self._pool.heavy.take(refuse=False)
        kind.queued = False
        if group := kind.take():
            self._pool.start(partial(self._run, loop, key, kind, group), heavy=True)
        else:
            self._pool.heavy.release()
            kind.running -= 1
        self._start(loop, key, kind)

    def _run(self, loop: asyncio.AbstractEventLoop, key: Hashable, kind: _Kind, group: _Group) -> None:
        """Search for a group; in the pool."""
        outcomes: Sequence[Outcomes | BaseException]
        start = perf_counter()
        try:
            with self._pool.cancelled_when(partial(_unwanted, group)):
                outcomes = _outcomes([search for search, _ in group])
        except BaseException as error:  # for those who wait: in the pool nobody would see it
            outcomes = [error] * len(group)
        seconds = (perf_counter() - start) / sum(len(search.queries) for search, _ in group)
        loop.call_soon_threadsafe(self._settle, loop, key, kind, group, outcomes, seconds)

    def _settle(
        self,
        loop: asyncio.AbstractEventLoop,
        key: Hashable,
        kind: _Kind,
        group: _Group,
        outcomes: Sequence[Outcomes | BaseException],
        seconds_per_query: float,
    ) -> None:
        """Hand out a group's outcomes, and run the next."""
        kind.running -= 1
        kind.seconds_per_query = seconds_per_query
        self._start(loop, key, kind)
        for (_, one), outcome in zip(group, outcomes, strict=True):
            if one.done():
                continue
            if isinstance(outcome, BaseException):
                one.set_exception(outcome)
            else:
                one.set_result(outcome)


def _unwanted(group: _Group) -> bool:
    """Whether every caller of a group left, or its deadline passed."""
    return all(outcome.done() or search.deadline <= monotonic() for search, outcome in group)


def _outcomes(searches: Sequence[Search]) -> Sequence[Outcomes | ServiceError]:
    first = searches[0]
    if len(searches) == 1:
        return [_search_alone(first)]
    together = first._replace(
        queries=np.concatenate([search.queries for search in searches]),
        top_k=[k for search in searches for k in search.top_k],
        exclude_ids=_of_each([(search, search.exclude_ids) for search in searches]),
        conditions=_of_each([(search, search.conditions) for search in searches]),
    )
    outcomes = _search_alone(together)
    if isinstance(outcomes, ServiceError):
        # Only a search that is wrong itself shall fail.
        return [_search_alone(search) for search in searches]
    found = iter(outcomes)
    return [[next(found) for _ in search.top_k] for search in searches]


def _of_each(options: Sequence[tuple[Search, Sequence[T | None]]]) -> Sequence[T | None]:
    """Put together an option of which each search has one for each query, or none at all."""
    if not any(given for _, given in options):
        return ()
    return [each for search, given in options for each in given or [None] * len(search.top_k)]


def _search_alone(search: Search) -> Outcomes | ServiceError:
    try:
        return search.run()
    except ServiceError as error:
        return error
