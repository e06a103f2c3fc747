"""Group concurrent dense searches, so that a group needs one thread and one look-up of records.

A dense search takes about 0.1 ms in the graph and 0.5 ms outside of it: for the change of threads, the look-up of the
hits, and many small calls. A group takes the 0.5 ms only once. While a group runs, further searches with the same group
key wait, and form the next group when it ends. If queries are slow or many wait, further groups of the key run at the
same time. A heavy search also waits for a slot of heavy calls.
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

#: Maximum number of queries of a group of several searches; a single search may have more.
_MAX_QUERIES = 64
#: Seconds that a group of several searches should take at most, by the rate of the last group.
_GROUP_SECONDS = 0.01
#: If a query of a key takes more seconds than this, several small groups at the same time use the cores better than one
#: large group.
_SLOW_QUERY_SECONDS = 0.001
#: A search whose queries have more candidates than this together is heavy: a candidate takes about 3 µs, so the search
#: takes about 0.3 s.
_MANY_CANDIDATES = 100_000

T = TypeVar("T")
Outcomes = list[SearchOutcome]


class VectorSearch(NamedTuple):
    """A dense search: the arguments of `CollectionBackend.search`, and the caller's deadline.

    `top_k` has an item for each query; there is at least one query. The deadline is in seconds of `perf_counter`;
    infinite: none. This is a tuple, since a frozen dataclass takes longer to create, and each search creates one.
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
        """Return whether the search may take long: it has a filter or a `min_recall`, or more than 100,000 candidates.

        The number of candidates is the number of queries times the greatest of `ef` and all values of `top_k`. With a
        filter or a `min_recall`, the search may read every record.
        """
        candidates = len(self.queries) * max(self.ef, *self.top_k)
        return any(self.conditions) or self.min_recall > 0 or candidates > _MANY_CANDIDATES

    @property
    def group_key(self) -> Hashable:
        """Return a key that is equal for searches that may be grouped.

        The key has the options by which the index chooses ef, so a search has the same ef in a group as alone. Searches
        with a filter have other keys than searches without one, since a search with a filter may take a thousand times
        as long, and the others must not wait for it.
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
        """Search the collection, and return the outcome of each query. Blocks. Raises the errors of the collection."""
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
    """The waiting searches of one group key, whether they are heavy, and the number of the key's groups that run."""

    heavy: bool
    waiting: deque[tuple[VectorSearch, asyncio.Future[Outcomes]]] = field(default_factory=deque)
    running: int = 0
    #: Whether one of the groups that `running` counts still waits for a slot of heavy calls; this group has no searches
    #: yet.
    queued: bool = False
    #: Seconds of the group that ended last, divided by the number of its queries; 0 before the first end.
    seconds_per_query: float = 0.0

    @property
    def worth_another(self) -> bool:
        """Return whether to run a further group of the key beside those that run.

        True if a query of the last group took more than 1 ms, or if at least 64 queries wait. Otherwise the gain would
        not exceed the cost of a change of threads, some 0.1 ms.
        """
        queries = sum(len(search.queries) for search, _ in self.waiting)
        return self.seconds_per_query > _SLOW_QUERY_SECONDS or queries >= _MAX_QUERIES

    def take(self) -> _Group:
        """Remove and return the next group of the waiting searches, oldest first; drop searches whose callers left.

        The group is empty if no other search waits. It is a single search, or has at most 64 queries and at most as
        many as take 10 ms at the rate of the last group. Before the first group has ended, it is a single search.
        """
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
    """Runs dense searches in a pool, those with equal group keys together. Use from one event loop only.

    Args:
        pool: runs the groups.
        at_once: maximum number of groups of one key that run at a time.
    """

    def __init__(self, pool: IndexPool, at_once: int) -> None:
        self._pool = pool
        self._at_once = at_once
        self._queues: dict[Hashable, _Queue] = {}
        #: The tasks of `_start_heavy` that run. The event loop itself holds only weak references to tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    async def search(self, search: VectorSearch) -> Outcomes:
        """Run a search, possibly in a group with others, and return the outcome of each of its queries.

        If the caller leaves while the search waits, the search does not run. A group that runs is cancelled only when
        each of its callers has left or passed its deadline, so a search may end after its own deadline.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the search is heavy and 256 heavy searches wait in this object;
                DEADLINE_EXCEEDED if the group is cancelled, or the pool is closed; any error of
                `CollectionBackend.search`. A `ServiceError` of one search of a group does not fail the other searches.
        """
        if search.heavy:
            self._pool.heavy.check_space(sum(len(each.waiting) for each in self._queues.values() if each.heavy))
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Outcomes] = loop.create_future()
        key = search.group_key
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(search.heavy)
            # The first group starts in the next iteration of the event loop. By then, calls that arrived together, in
            # this iteration, have added their searches.
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
        """Start groups of the waiting searches of a key: one if none runs, and further ones while they are worth it.

        At most `at_once` groups of a key run. Of heavy searches, at most one further group is started here, in a task,
        since it must wait for a slot. The queue is removed when no search waits and no group runs.
        """
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
                # Not with asyncio's `run_in_executor`, which adds a second future with callbacks: these take as long as
                # a search of the graph.
                self._pool.start(partial(self._run, loop, key, queue, group))
        if not queue.waiting and not queue.running and self._queues.get(key) is queue:
            del self._queues[key]

    async def _start_heavy(self, loop: asyncio.AbstractEventLoop, key: Hashable, queue: _Queue) -> None:
        """Wait for a slot of heavy calls, and start a group of searches that wait by then.

        If none waits, the slot is given back. Then further groups are started, as `_start` does.
        """
        # Not refused: at most one group of each key waits here, and `search` limits the number of heavy searches that
        # wait.
        await self._pool.heavy.take(refuse=False)
        queue.queued = False
        if group := queue.take():
            self._pool.start(partial(self._run, loop, key, queue, group), heavy=True)
        else:
            self._pool.heavy.release()
            queue.running -= 1
        self._start(loop, key, queue)

    def _run(self, loop: asyncio.AbstractEventLoop, key: Hashable, queue: _Queue, group: _Group) -> None:
        """Run the searches of a group, and pass the outcomes or errors to the event loop. For a thread of the pool.

        The searches are cancelled when each caller of the group has left or passed its deadline, or the pool is closed.
        """
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
        """Start the next groups of the key, and give each caller of a finished group its outcomes or its error.

        Args:
            loop: the event loop.
            key: the group key.
            queue: the searches of the key.
            group: the searches of the finished group.
            outcomes: the outcomes or the error of each search of the group.
            seconds_per_query: wall time of the group in seconds, divided by the number of its queries.
        """
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
    """Return whether no caller of a group waits any more: each caller has left, or its deadline has passed."""
    return all(outcome.done() or search.deadline <= perf_counter() for search, outcome in group)


def _group_outcomes(searches: Sequence[VectorSearch]) -> Sequence[Outcomes | ServiceError]:
    """Run the searches of a group as one search, and return the outcomes or the error of each search, in order. Blocks.

    If the joint search raises a `ServiceError`, each search is run alone. Other exceptions pass through.
    """
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
        # One search may cause the error, or the hits of all searches together have too many bytes. So each search is
        # run alone, and only those fail that fail alone.
        return [_search(search) for search in searches]
    remaining = iter(outcomes)
    return [[next(remaining) for _ in search.top_k] for search in searches]


def _joined(options: Sequence[tuple[VectorSearch, Sequence[T | None]]]) -> Sequence[T | None]:
    """Return the values of an option for the queries of all searches, one after the other.

    Args:
        options: each search with its values of the option: one for each of its queries, or none at all, which means
            None for each query.

    Returns:
        The values; empty if no search has any.
    """
    if not any(values for _, values in options):
        return ()
    return [each for search, values in options for each in values or [None] * len(search.top_k)]


def _search(search: VectorSearch) -> Outcomes | ServiceError:
    try:
        return search.run()
    except ServiceError as error:
        return error
