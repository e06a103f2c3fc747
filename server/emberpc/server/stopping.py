"""The end of the process on SIGTERM or SIGINT, within a bounded time whatever still runs."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

from emberpc.server.deadlines import Deadline

log = logging.getLogger(__name__)

#: Seconds after the drain time until which everything that runs is waited for. The stores are closed after that.
_WAIT_SECONDS = 1.0
_MOMENT_SECONDS = 0.3
#: Seconds after the drain time at which the process ends, whatever it does.
_END_SECONDS = 1.6
#: Seconds after the drain time at which a process ends whose interpreter is held by one call into a library.
_HELD_SECONDS = 2.0
#: Seconds for the last lines of the log: nobody may read what the process writes to.
_LOG_SECONDS = 0.2
#: Daemon threads that call native code. One that does when the interpreter ends aborts the process (SIGABRT). The
#: helpers of the graph are not among them: each works for a thread that waits for it, which is one of the others.
_NATIVE = ("worker-", "express", "widen", "index-")


class Stopping:
    """Waits for a signal, and ends the process in time after it.

    The first signal sets `requested` and `deadline`. A thread of its own ends the process if the event loop or the
    interpreter's end does not: a call may keep the event loop, a thread may never return from a library.

    Args:
        drain_seconds: how long calls in flight may take after the signal.
    """

    def __init__(self, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        self._serving = False
        self._begun = False
        self._ended = threading.Event()
        # A signal's handler may interrupt anything, also itself: of all that wakes a thread, this alone allows that.
        self._signals: SimpleQueue[float] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.requested = asyncio.Event()
        #: By when everything that runs is waited for. Infinite before the signal.
        self.deadline = Deadline()

    @property
    def begun(self) -> bool:
        """Whether a signal came."""
        return self._begun

    def listen(self) -> None:
        """Handle SIGTERM and SIGINT from now on. Call it in the main thread, in the event loop."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def serving(self) -> None:
        """Give calls in flight the drain time from now on. Before, there are none."""
        self._serving = True

    async def finish(self, work: Awaitable[object]) -> None:
        """Wait for work of the shutdown until the deadline; it is left alone if it takes longer."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=self.deadline.seconds_left)
        for each in done:
            each.result()

    def end(self, pool: ThreadPoolExecutor) -> None:
        """End the pool and all other threads. If one still runs at the deadline, end the process; exit code 0.

        Nothing that was acknowledged is lost: it is on disk since before it was acknowledged.
        """
        pool.shutdown(wait=False, cancel_futures=True)
        # Also threads that have nothing to do need a moment to end.
        deadline = Deadline(max(self.deadline.seconds_left, _MOMENT_SECONDS))
        threads = [thread for thread in threading.enumerate() if _counts(thread)]
        if left := [thread.name for thread in threads if not deadline.join(thread)]:
            _exit(f"the process ends though work still runs on {', '.join(sorted(left))}")
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._begun:
            return
        self._begun = True
        drain = self._drain_seconds if self._serving else 0.0
        self.deadline = Deadline(drain + _WAIT_SECONDS)
        self._signals.put(drain)
        with suppress(RuntimeError, ValueError, OSError, AttributeError):  # no thread, or no stderr
            faulthandler.dump_traceback_later(drain + _HELD_SECONDS, exit=True)
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed: the process ends already
                self._loop.call_soon_threadsafe(self.requested.set)

    def _watch(self) -> None:
        drain = self._signals.get()
        if not self._ended.wait(drain + _END_SECONDS):
            _exit(f"the process ends though its shutdown takes longer than {drain:g} + {_END_SECONDS:g} seconds")


def _counts(thread: threading.Thread) -> bool:
    """Whether a thread may call native code now, so that the interpreter cannot end beside it."""
    if thread is threading.main_thread() or thread is threading.current_thread():
        return False
    return not thread.daemon or thread.name.startswith(_NATIVE)


def _exit(reason: str) -> NoReturn:
    """End the process without the interpreter's own end, which waits for threads; exit code 0."""

    def write() -> None:
        log.warning("stopping: %s", reason)
        logging.shutdown()

    with suppress(RuntimeError):  # no thread can be started
        writer = threading.Thread(target=write, name="last-words", daemon=True)
        writer.start()
        writer.join(_LOG_SECONDS)
    os._exit(0)
