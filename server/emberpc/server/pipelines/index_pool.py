"""Run the blocking calls of the index in a thread pool, and cancel calls whose callers left or whose deadlines passed.

A heavy call is a call that may take long. Heavy calls may use only some of the threads, so that an upsert, a get or a
plain search need not wait until a heavy call frees its thread. Writes of one collection exclude each other, and each
would hold a thread while it waits for the lock of the collection. So a write first takes one of the two slots of its
collection.
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

#: Number of waiting heavy calls at which a further one is refused, unless its `refuse` is False. The limit exists since
#: a waiting call keeps its request in memory.
_MAX_HEAVY_WAITING = 256
#: Number of waiting writes of a collection at which a further one is refused. The limit exists since a waiting write
#: keeps its request in memory.
_MAX_WRITES_WAITING = 1024
#: Number of slots for the writes of a collection: while one write holds the collection's lock, another can check its
#: records.
_WRITERS = 2

Result = TypeVar("Result")


class IndexPool:
    """Runs blocking calls in a thread pool. Use from one event loop only.

    Args:
        executor: the thread pool.
        heavy: maximum number of heavy calls at a time; must be fewer than the threads of the pool.
    """

    def __init__(self, executor: Executor, heavy: int) -> None:
        self._executor = executor
        self.heavy = Slots(heavy, _MAX_HEAVY_WAITING, "calls that may take long")
        self._writers: dict[str, Slots] = {}
        self._closing = threading.Event()
        #: Futures of the submitted calls that have not ended, including calls whose callers left.
        self._futures: set[Future[Any]] = set()

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

        If the caller leaves (this coroutine is cancelled) before the call begins, the call does not run.

        Args:
            work: the blocking call.
            caller: the caller. When the caller leaves or the deadline passes, the running call ends the next time that
                it checks `cancellation`. None: a call that has begun runs to its end.
            heavy: whether the call may take long; then it needs a slot of heavy calls.
            refuse: whether to refuse a heavy call if 256 heavy calls wait.
            within: further slots. The call takes one of them before all else, and holds it until its thread is free.
                None: no further slot.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too many calls wait for a slot; with a `caller`, DEADLINE_EXCEEDED if
                the call begins, or checks `cancellation`, after the deadline or after `close`; any error of `work`.
        """
        if within is not None:
            await within.take()
        stop = Cancellation(inf if caller is None else caller.seconds_left)
        try:
            future = await self.submit(work, None if caller is None else stop, heavy=heavy, refuse=refuse)
        except BaseException:
            if within is not None:
                within.release()
            raise
        if within is not None:
            _call_when_done(future, within.release)
        try:
            return await asyncio.wrap_future(future)
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
            stop: returns whether to cancel the call, see `cancelled_when`; None: a call that has begun runs to its end.
            heavy: whether the call may take long.
            refuse: whether to refuse a heavy call if 256 heavy calls wait.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the call is refused. Errors of `work` and of its cancellation are in the
                future.
        """
        if heavy:
            await self.heavy.take(refuse=refuse)
        return self.start(work, stop, heavy=heavy)

    def start(
        self, work: Callable[[], Result], stop: Callable[[], bool] | None = None, *, heavy: bool = False
    ) -> Future[Result]:
        """Submit a blocking call to the pool without waiting, and return its future, which receives errors of `work`.

        Args:
            work: the blocking call.
            stop: returns whether to cancel the call, see `cancelled_when`; None: a call that has begun runs to its end.
            heavy: whether this function's caller has taken a slot of `self.heavy` for `work`. The slot is released when
                the thread is free.
        """
        try:
            future = self._executor.submit(self._run, work, stop)
        except BaseException:
            if heavy:
                self.heavy.release()
            raise
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if heavy:
            _call_when_done(future, self.heavy.release)
        return future

    def cancelled_when(self, stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """Return a context manager that cancels the work of this thread when `stop` returns True or the pool is closed.

        The work is not interrupted: DEADLINE_EXCEEDED is raised on entering, or where the work checks `cancellation`.
        """
        return cancellation.cancelled_when(lambda: stop() or self._closing.is_set())

    async def close(self) -> None:
        """Cancel the calls with a caller or `stop`, and wait until no submitted call is left.

        The executor stays open. Later calls with a caller or `stop` fail with DEADLINE_EXCEEDED; others still run.
        """
        self._closing.set()
        while self._futures:
            # The wait must not block the event loop, since the handlers of cancelled calls must still clean up.
            await asyncio.gather(
                *(asyncio.wrap_future(future) for future in tuple(self._futures)), return_exceptions=True
            )
            await asyncio.sleep(0)

    def writers(self, collection: str) -> Slots:
        """Return the two slots of the collection with a name; a write of the collection must hold one of them.

        If no call holds a slot, a later call may return new slots.
        """
        writers = self._writers.get(collection)
        if writers is None:
            # Remove slots that no call holds, so that the names of deleted collections do not accumulate.
            self._writers = {name: each for name, each in self._writers.items() if not each.idle}
            holders = f"writes of collection {collection!r}"
            writers = self._writers[collection] = Slots(_WRITERS, _MAX_WRITES_WAITING, holders)
        return writers

    def _run(self, work: Callable[[], Result], stop: Callable[[], bool] | None) -> Result:
        if stop is None:
            return work()
        with self.cancelled_when(stop):
            return work()


def _call_when_done(future: Future[Result], call: Callable[[], None]) -> None:
    """Call `call` in the running event loop, after a call of the pool has ended or was cancelled before its start.

    If the event loop is closed by then, `call` is not called.
    """
    loop = asyncio.get_running_loop()

    def ended(_: Future[Result]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no call waits
            loop.call_soon_threadsafe(call)

    future.add_done_callback(ended)
