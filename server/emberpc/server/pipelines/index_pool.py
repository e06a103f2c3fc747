"""Run the blocking calls of the index in a thread pool, and cancel those whose callers left.

A heavy call is one that may take long. Heavy calls get some of the threads only, so that an upsert, a get or a plain
search always finds a thread. Writes of one collection exclude each other, and each would hold a thread while it waits
for the lock, so each collection has two threads for its writes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, suppress
from math import inf
from typing import Any, TypeVar

from emberpc.server import cancellation
from emberpc.server.cancellation import Cancellation
from emberpc.server.engine import Caller
from emberpc.server.pipelines.slots import Slots

#: Most calls that wait for a thread: of all heavy calls together, and of the writes of one collection. A waiting call
#: keeps its request in memory.
_MAX_HEAVY_WAITING = 256
_MAX_WRITES_WAITING = 1024
#: Writes of a collection at a time: one holds the collection's lock, and the records of the next one are checked.
_WRITERS = 2

Result = TypeVar("Result")


class IndexPool:
    """Runs blocking calls in a thread pool. Use from one event loop only.

    Args:
        executor: the thread pool.
        heavy: heavy calls at a time; fewer than the pool's threads.
    """

    def __init__(self, executor: Executor, heavy: int) -> None:
        self._executor = executor
        self.heavy = Slots(heavy, _MAX_HEAVY_WAITING, "calls that may take long")
        self._writers: dict[str, Slots] = {}
        self._closing = threading.Event()
        #: Calls that have not ended, including those whose callers left.
        self._jobs: set[Future[Any]] = set()

    async def run(
        self,
        work: Callable[[], Result],
        caller: Caller | None = None,
        *,
        heavy: bool = False,
        refuse: bool = True,
        within: Slots | None = None,
    ) -> Result:
        """Run a blocking call and return its result. If the caller leaves before the call begins, it does not run.

        Args:
            work: the blocking call.
            caller: its caller; the running call is cancelled when the caller leaves or its deadline passes. None: a
                call that has begun runs to its end.
            heavy: whether the call may take long.
            refuse: whether to refuse a heavy call if too many wait.
            within: slots of which the call holds one until its thread is free, besides the slot of a heavy call.

        Raises:
            ServiceError: as `work` does; RESOURCE_EXHAUSTED if too many calls wait; DEADLINE_EXCEEDED if the deadline
                passed.
        """
        if within is not None:
            await within.take()
        stop = Cancellation(inf if caller is None else caller.seconds_left)
        try:
            job = await self.submit(work, None if caller is None else stop, heavy=heavy, refuse=refuse)
        except BaseException:
            if within is not None:
                within.release()
            raise
        if within is not None:
            _call_when_done(job, within.release)
        try:
            return await asyncio.wrap_future(job)
        finally:
            stop.cancel()

    async def submit(
        self,
        work: Callable[[], Result],
        stop: Callable[[], bool] | None = None,
        *,
        heavy: bool = False,
        refuse: bool = True,
    ) -> Future[Result]:
        """Submit a blocking call to the pool. A heavy call first waits for a slot.

        Args:
            work: the blocking call.
            stop: returns whether to cancel the call; None: never.
            heavy: whether the call may take long.
            refuse: whether to refuse a heavy call if too many wait.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the call is refused.
        """
        if heavy:
            await self.heavy.take(refuse=refuse)
        return self.start(work, stop, heavy=heavy)

    def start(
        self, work: Callable[[], Result], stop: Callable[[], bool] | None = None, *, heavy: bool = False
    ) -> Future[Result]:
        """Submit a blocking call to the pool without waiting.

        The caller has taken the slot of a heavy call before; it is released when the thread is free.
        """
        try:
            job = self._executor.submit(self._run, work, stop)
        except BaseException:
            if heavy:
                self.heavy.release()
            raise
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        if heavy:
            _call_when_done(job, self.heavy.release)
        return job

    def cancelled_when(self, stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """Cancel the work of this thread in the block when `stop` returns True or the pool is closed."""
        return cancellation.cancelled_when(lambda: stop() or self._closing.is_set())

    async def close(self) -> None:
        """Cancel all calls that can be cancelled, and wait until all have ended. The executor stays open."""
        self._closing.set()
        while self._jobs:
            # Does not block the event loop: cancelled handlers still have to clean up.
            await asyncio.gather(*(asyncio.wrap_future(job) for job in tuple(self._jobs)), return_exceptions=True)
            await asyncio.sleep(0)

    def writers(self, collection: str) -> Slots:
        """Return the slots of the writes of a collection."""
        writers = self._writers.get(collection)
        if writers is None:
            # Drop idle slots, so that the names of deleted collections do not accumulate.
            self._writers = {name: each for name, each in self._writers.items() if not each.idle}
            holders = f"writes of collection {collection!r}"
            writers = self._writers[collection] = Slots(_WRITERS, _MAX_WRITES_WAITING, holders)
        return writers

    def _run(self, work: Callable[[], Result], stop: Callable[[], bool] | None) -> Result:
        if stop is None:
            return work()
        with self.cancelled_when(stop):
            return work()


def _call_when_done(job: Future[Result], call: Callable[[], None]) -> None:
    """Call a function in the running event loop when a job has ended, which is when its thread is free."""
    loop = asyncio.get_running_loop()

    def ended(_: Future[Result]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no call waits
            loop.call_soon_threadsafe(call)

    job.add_done_callback(ended)
