"""Group concurrent vector searches, so that each group needs one thread and one look-up of records.

A vector search takes 0.1 ms in the graph and 0.5 ms around it: the change of threads, the look-up of the hits, many
small calls. A group pays these costs once. No search waits while there is room for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from time import perf_counter
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from emberpc.server.collections import WHOLE_RECORD, CollectionBackend, RecordParts, SearchOutcome
from emberpc.server.collections.filters import Filter
from emberpc.server.collections.types import Matrix
from emberpc.server.errors import ServiceError
from emberpc.server.pipelines.index_pool import IndexPool

#: Queries of a group, unless one search alone has more, and the seconds that a group may take.
_MAX_QUERIES = 64
_GROUP_SECONDS = 0.01
#: Seconds of a query. If queries are slower, several small groups use the cores better than one large group.
_SLOW_QUERY_SECONDS = 0.001
#: Candidates of all queries of a graph search. A search with more is heavy: a candidate takes 3 µs.
_MANY_CANDIDATES = 100_000

T = TypeVar("T")
Outcomes = list[SearchOutcome]


class VectorSearch(NamedTuple):
    """The arguments of `CollectionBackend.search`, and the deadline of the caller in seconds of `perf_counter`.

    A tuple, since it is made for every search and a frozen dataclass takes longer to make.
    """

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
        """Return whether the search may take long: it may read every record, or compare many candidates."""
        candidates = len(self.queries) * max(self.ef, *self.top_k)
        return any(self.conditions) or self.min_recall > 0 or candidates > _MANY_CANDIDATES

    @property
    def group_key(self) -> Hashable:
        """Return a key that is equal for searches that may be grouped. `ef` follows from its parts.

        Searches with a filter have another key than those without: the first search with a filter may take a thousand
        times as long, and the others must not wait for it.
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
        """Search the collection."""
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


_Group: TypeAlias = list[tuple[VectorSearch, "asyncio.Future[Outcomes]"]]


@dataclass
class _Queue:
    """The searches of one group key: those that wait, and the number of groups that run."""

    heavy: bool
    waiting: deque[tuple[VectorSearch, asyncio.Future[Outcomes]]] = field(default_factory=deque)
    running: int = 0
    #: Whether one of the running groups still waits for the slot of a heavy call.
    queued: bool = False
    #: As measured in the last group; 0 before the first.
    seconds_per_query: float = 0.0

    @property
    def worth_another(self) -> bool:
        """Return whether a further group gains more than a change of threads costs, which is some 0.1 ms."""
        queries = sum(len(search.queries) for search, _ in self.waiting)
        return self.seconds_per_query > _SLOW_QUERY_SECONDS or queries >= _MAX_QUERIES

    def take(self) -> _Group:
        """Remove and return a group of the waiting searches whose callers still wait."""
        seconds = self.seconds_per_query
        limit = min(_MAX_QUERIES, max(1, int(_GROUP_SECONDS / seconds)) if seconds else 1)
        group: _Group = []
        queries = 0
        while self.waiting and (not group or queries + len(self.waiting[0][0].queries) <= limit):
            search, outcome = self.waiting.popleft()
            if not outcome.done():  # its caller has not left
                group.append((search, outcome))
                queries += len(search.queries)
        return group


class SearchGroups:
    """Runs vector searches in a pool, those with equal group keys together. Use from one event loop only.

    Args:
        pool: runs the groups.
        at_once: groups of one key that run at a time, where more than one is worth it.
    """

    def __init__(self, pool: IndexPool, at_once: int) -> None:
        self._pool = pool
        self._at_once = at_once
        self._queues: dict[Hashable, _Queue] = {}
        #: Holds references to tasks: the event loop holds none.
        self._tasks: set[asyncio.Task[None]] = set()

    async def search(self, search: VectorSearch) -> Outcomes:
        """Return the outcome of each query. If the caller leaves while the search waits, it does not run.

        Raises:
            ServiceError: as `CollectionBackend.search` does, for this search alone; RESOURCE_EXHAUSTED if the search is
                heavy and too many heavy ones wait; DEADLINE_EXCEEDED if the deadline passed.
        """
        if search.heavy:
            self._pool.heavy.check_room(sum(len(each.waiting) for each in self._queues.values() if each.heavy))
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Outcomes] = loop.create_future()
        key = search.group_key
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(search.heavy)
            # Calls that arrive together get here in the same iteration of the event loop: they make one group.
            loop.call_soon(self._start, loop, key, queue)
        queue.waiting.append((search, outcome))
        if queue.running and queue.running < self._at_once:
            self._start(loop, key, queue)
        try:
            return await outcome
        except asyncio.CancelledError:
            queue.waiting = deque(each for each in queue.waiting if each[1] is not outcome)
            raise

    def _start(self, loop: asyncio.AbstractEventLoop, key: Hashable, queue: _Queue) -> None:
        """Start groups of the waiting searches, as many as are worth it."""
        while queue.waiting and (not queue.running or (queue.running < self._at_once and queue.worth_another)):
            if queue.heavy:
                if not queue.queued:
                    queue.running, queue.queued = queue.running + 1, True
                    task = loop.create_task(self._start_heavy(loop, key, queue))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                return
            if group := queue.take():
                queue.running += 1
                # Not with run_in_executor: its second future and callbacks cost as much as a search of the graph.
                self._pool.start(partial(self._run, loop, key, queue, group))
        if not queue.waiting and not queue.running and self._queues.get(key) is queue:
            del self._queues[key]

    async def _start_heavy(self, loop: asyncio.AbstractEventLoop, key: Hashable, queue: _Queue) -> None:
        """Wait for the slot of a heavy call, and start a group of the searches that wait by then."""
        # Never refused: each key has one such group, and the waiting heavy searches of all keys are bounded.
        await self._pool.heavy.take(refuse=False)
        queue.queued = False
        if group := queue.take():
            self._pool.start(partial(self._run, loop, key, queue, group), heavy=True)
        else:
            self._pool.heavy.release()
            queue.running -= 1
        self._start(loop, key, queue)

    def _run(self, loop: asyncio.AbstractEventLoop, key: Hashable, queue: _Queue, group: _Group) -> None:
        """Search for a group, in a thread of the pool."""
        outcomes: Sequence[Outcomes | BaseException]
        start = perf_counter()
        try:
            with self._pool.cancelled_when(partial(_all_left, group)):
                outcomes = _group_outcomes([search for search, _ in group])
        except BaseException as error:  # raised in each caller: exceptions of the pool's jobs are not read
            outcomes = [error] * len(group)
        seconds = (perf_counter() - start) / sum(len(search.queries) for search, _ in group)
        with suppress(RuntimeError):  # the loop is closed: the server has stopped, and no caller waits
            loop.call_soon_threadsafe(self._settle, loop, key, queue, group, outcomes, seconds)

    def _settle(
        self,
        loop: asyncio.AbstractEventLoop,
        key: Hashable,
        queue: _Queue,
        group: _Group,
        outcomes: Sequence[Outcomes | BaseException],
        seconds_per_query: float,
    ) -> None:
        """Start the next group, and give each caller its outcome."""
        queue.running -= 1
        queue.seconds_per_query = seconds_per_query
        self._start(loop, key, queue)
        for (_, future), outcome in zip(group, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _all_left(group: _Group) -> bool:
    """Return whether each caller of a group has left or its deadline has passed."""
    return all(outcome.done() or search.deadline <= perf_counter() for search, outcome in group)


def _group_outcomes(searches: Sequence[VectorSearch]) -> Sequence[Outcomes | ServiceError]:
    """Return the outcomes or the error of each search."""
    first = searches[0]
    if len(searches) == 1:
        return [_search(first)]
    joined = first._replace(
        queries=np.concatenate([search.queries for search in searches]),
        top_k=[k for search in searches for k in search.top_k],
        exclude_ids=_joined([(search, search.exclude_ids) for search in searches]),
        conditions=_joined([(search, search.conditions) for search in searches]),
    )
    outcomes = _search(joined)
    if isinstance(outcomes, ServiceError):
        # Search each alone, so that only the search with the error fails.
        return [_search(search) for search in searches]
    remaining = iter(outcomes)
    return [[next(remaining) for _ in search.top_k] for search in searches]


def _joined(options: Sequence[tuple[VectorSearch, Sequence[T | None]]]) -> Sequence[T | None]:
    """Join an option of several searches; each search has one value for each of its queries, or none at all."""
    if not any(values for _, values in options):
        return ()
    return [each for search, values in options for each in values or [None] * len(search.top_k)]


def _search(search: VectorSearch) -> Outcomes | ServiceError:
    try:
        return search.run()
    except ServiceError as error:
        return error
