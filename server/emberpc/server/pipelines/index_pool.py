"""Run the blocking calls of the index in a thread pool, and cancel calls whose callers left.

A heavy call is a call that may take long. Heavy calls may use only some of the threads, so that an upsert, a get or a
plain search need not wait for heavy calls. Writes of one collection exclude each other, and each would hold a thread
while it waits for the lock of the collection. So at most two writes of a collection have a thread at a time.
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

#: Most heavy calls that wait for a slot. A waiting call keeps its request in memory.
_MAX_HEAVY_WAITING = 256
#: Most writes of one collection that wait for a slot. A waiting write keeps its request in memory.
_MAX_WRITES_WAITING = 1024
#: Most writes of a collection at a time: while the first holds the collection's lock, the second checks its records.
_WRITERS = 2

Result = TypeVar("Result")


class IndexPool:
    """Runs blocking calls in a thread pool. Use from one event loop only.

    Args:
        executor: the thread pool.
        heavy: most heavy calls at a time; must be fewer than the threads of the pool.
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
        """Run a blocking call in the pool, and return its result.

        If the caller leaves before the call begins, the call does not run.

        Args:
            work: the blocking call.
            caller: the caller. The running call is cancelled when the caller leaves or the deadline passes. None: a
                call that has begun runs to its end.
            heavy: whether the call may take long; then it waits for a slot of heavy calls first.
            refuse: whether to refuse a heavy call if too many heavy calls wait.
            within: further slots; the call holds one of them until its thread is free. None: no further slot.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too many calls wait for a slot; DEADLINE_EXCEEDED, only with a `caller`,
                if the deadline passed before or during the call, or the pool was closed; any error of `work`.
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
        """Submit a blocking call to the pool, and return its future. A heavy call first waits for a slot.

        Args:
            work: the blocking call.
            stop: returns whether to cancel the call; None: the call is never cancelled.
            heavy: whether the call may take long.
            refuse: whether to refuse a heavy call if too many heavy calls wait.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the call is refused. Errors of `work` are in the future.
        """
        if heavy:
            await self.heavy.take(refuse=refuse)
        return self.start(work, stop, heavy=heavy)

    def start(
        self, work: Callable[[], Result], stop: Callable[[], bool] | None = None, *, heavy: bool = False
    ) -> Future[Result]:
        """Submit a blocking call to the pool without waiting, and return its future.

        Args:
            work: the blocking call.
            stop: returns whether to cancel the call; None: the call is never cancelled.
            heavy: whether this function's caller has taken a slot of heavy calls for `work`. The slot is released when
                the thread is free.
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
        """Return a context manager that cancels the work of this thread when `stop` returns True or the pool is closed.

        The cancelled work raises DEADLINE_EXCEEDED.
        """
        return cancellation.cancelled_when(lambda: stop() or self._closing.is_set())

    async def close(self) -> None:
        """Cancel the calls that can be cancelled, and wait until no submitted call is left. The executor stays open."""
        self._closing.set()
        while self._jobs:
            # The wait must not block the event loop, since the handlers of cancelled calls still have to clean up.
            await asyncio.gather(*(asyncio.wrap_future(job) for job in tuple(self._jobs)), return_exceptions=True)
            await asyncio.sleep(0)

    def writers(self, collection: str) -> Slots:
        """Return the slots that writes of the collection with a name must hold: two at a time."""
        writers = self._writers.get(collection)
        if writers is None:
            # Remove unused slots, so that the names of deleted collections do not accumulate.
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
    """Call `call` in the running event loop as soon as a job of the pool has ended and its thread is free."""
    loop = asyncio.get_running_loop()

    def ended(_: Future[Result]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no call waits
            loop.call_soon_threadsafe(call)

    job.add_done_callback(ended)
