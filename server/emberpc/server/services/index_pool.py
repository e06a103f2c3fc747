"""Where the blocking calls of the index run: in a pool of threads, none of which works for a caller who left.

Calls that may take long are heavy. They have some of the threads only, so that an upsert, a get or a plain search finds
a thread whatever else is asked for. The writes of one collection exclude each other and would hold a thread each while
they wait, so that they have two threads.
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
from emberpc.server.services.requests import Context
from emberpc.server.services.slots import Slots

#: Calls that may wait for a thread, each with its request: heavy ones together, and writes of one collection.
_MOST_HEAVY_WAITING = 256
_MOST_WRITES_WAITING = 1024
#: Writes of a collection under way: one holds its lock, and the next one's records are checked meanwhile.
_WRITERS = 2

Result = TypeVar("Result")


class IndexPool:
    """Runs blocking calls in a pool. To be used from one event loop.

    Args:
        executor: the pool.
        heavy: heavy calls at a time; fewer than the pool's threads.
    """

    def __init__(self, executor: Executor, heavy: int) -> None:
        self._executor = executor
        self.heavy = Slots(heavy, _MOST_HEAVY_WAITING, "calls that may take long")
        self._writers: dict[str, Slots] = {}
        self._closing = threading.Event()
        #: Calls that have not ended, whether or not anybody waits for them.
        self._jobs: set[Future[Any]] = set()

    async def run(
        self,
        work: Callable[[], Result],
        context: Context | None = None,
        *,
        heavy: bool = False,
        refuse: bool = True,
        within: Slots | None = None,
    ) -> Result:
        """Return what a blocking call returns. If the caller leaves, a call that has not begun is dropped.

        Args:
            work: the call.
            context: gRPC's view of the call that wants it; the work is cancelled when that ends or its deadline has
                passed. None: what has begun runs to its end.
            heavy: whether it may take long.
            refuse: whether to refuse a heavy call if too many wait.
            within: slots of which it has one until its thread is free, besides those of heavy calls.

        Raises:
            ServiceError: as the call does; RESOURCE_EXHAUSTED if too many wait; DEADLINE_EXCEEDED if the deadline
                passed.
        """
        if within is not None:
            await within.take()
        stop = Cancellation(seconds_left(context))
        try:
            job = await self.submit(work, None if context is None else stop, heavy=heavy, refuse=refuse)
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
        """Hand a blocking call to the pool, a heavy one when it has its turn.

        Args:
            work: the call.
            stop: whether the work is to be cancelled; None: never.
            heavy: whether it may take long.
            refuse: whether to refuse a heavy call if too many wait.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if it is refused.
        """
        if heavy:
            await self.heavy.take(refuse=refuse)
        return self.start(work, stop, heavy=heavy)

    def start(
        self, work: Callable[[], Result], stop: Callable[[], bool] | None = None, *, heavy: bool = False
    ) -> Future[Result]:
        """Hand a blocking call to the pool now; the caller has taken the slot of a heavy one, which is given back."""
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
        """Cancel what this thread does in the block as soon as `stop` returns True, or the pool is closed."""
        return cancellation.cancelled_when(lambda: stop() or self._closing.is_set())

    async def close(self) -> None:
        """Cancel all calls that can be cancelled, and wait for the end of all; the executor stays open."""
        self._closing.set()
        while self._jobs:
            # The loop must go on meanwhile: cancelled handlers end what they began.
            await asyncio.gather(*(asyncio.wrap_future(job) for job in tuple(self._jobs)), return_exceptions=True)
            await asyncio.sleep(0)

    def writers(self, collection: str) -> Slots:
        """Return the slots of those that write to a collection."""
        writers = self._writers.get(collection)
        if writers is None:
            # Only those in use are kept, so that the names of deleted collections do not pile up.
            self._writers = {name: each for name, each in self._writers.items() if not each.idle}
            what = f"writes of collection {collection!r}"
            writers = self._writers[collection] = Slots(_WRITERS, _MOST_WRITES_WAITING, what)
        return writers

    def _run(self, work: Callable[[], Result], stop: Callable[[], bool] | None) -> Result:
        if stop is None:
            return work()
        with self.cancelled_when(stop):
            return work()


def seconds_left(context: Context | None) -> float:
    """Return the seconds until a call's deadline; infinite for none."""
    left = context.time_remaining() if context is not None else None
    return inf if left is None else left


def _call_when_done(job: Future[Result], call: Callable[[], None]) -> None:
    """Call a function in the present event loop when a job has ended, so when its thread is free."""
    loop = asyncio.get_running_loop()

    def ended(_: Future[Result]) -> None:
        with suppress(RuntimeError):  # the loop has ended, so no call waits
            loop.call_soon_threadsafe(call)

    job.add_done_callback(ended)
