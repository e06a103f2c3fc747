"""Stop the process after SIGTERM or SIGINT within a limited time, even if work is still in progress."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NoReturn

from emberpc.server.deadlines import Deadline

log = logging.getLogger(__name__)

#: Seconds after the drain time for which the shutdown still waits for work in progress; see `Stopping.deadline`.
_WAIT_SECONDS = 1.0
#: Minimum seconds for which `Stopping.end` waits for threads, even if the deadline has passed.
_MOMENT_SECONDS = 0.3
#: Seconds after the drain time until the watching thread ends the process if the shutdown is not complete.
_END_SECONDS = 1.6
#: Maximum seconds for which the watching thread waits for a signal without requesting the interpreter lock.
_WATCH_SECONDS = 0.25
#: Seconds after the drain time until Python's faulthandler ends the process with exit code 1 and a traceback. Unlike
#: the watching thread, it needs no interpreter lock, so it ends the process even if a call into a library holds the
#: lock.
_HELD_SECONDS = 2.0
#: Maximum seconds to wait until the last log line is written. Without a limit, the process could wait forever: if
#: stderr is a pipe that no process reads, a write may block.
_LOG_SECONDS = 0.2
#: Prefixes of the names of the daemon threads that call native code. If one of them runs when the interpreter ends, the
#: process may abort (SIGABRT), so the shutdown waits for these threads. Helper threads of the graph are not listed: a
#: helper works only while another thread, for which the shutdown waits, waits for the helper.
_NATIVE = ("worker-", "express", "widen", "index-")


class Stopping:
    """Handles SIGTERM and SIGINT, and limits the time from the first signal to the end of the process.

    The first signal sets the event `requested` and the `deadline`; later signals are ignored. If the shutdown is not
    complete 1.6 s after the drain time, a separate thread ends the process with exit code 0. For example, a call blocks
    the event loop, or a thread does not return from a library. If that thread cannot run either, Python's faulthandler
    ends the process with exit code 1, 2 s after the drain time.

    Args:
        drain_seconds: the drain time: seconds after the signal that calls in flight get to finish. See `serving`.
    """

    def __init__(self, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        self._serving = False
        self._begun = False
        self._ended = threading.Event()
        # A signal handler may interrupt any code, even itself. Of the standard ways to wake a thread, only
        # `SimpleQueue.put` is safe in a signal handler.
        self._signals: SimpleQueue[float] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        #: The ends of the connection by which a signal wakes the event loop; empty before `listen`.
        self._sockets: tuple[socket.socket, ...] = ()
        self.requested = asyncio.Event()
        #: The moment until which the shutdown waits for work in progress: 1 s after the drain time. Infinite before the
        #: first signal. That signal replaces this object.
        self.deadline = Deadline()

    @property
    def begun(self) -> bool:
        """Whether SIGTERM or SIGINT has arrived."""
        return self._begun

    def listen(self) -> None:
        """Install the handlers of SIGTERM and SIGINT, and start the thread that watches the shutdown.

        Call this in the main thread, inside the event loop.
        """
        self._loop = asyncio.get_running_loop()
        # Python runs a signal handler in the main thread, between two instructions. A signal does not end a wait of the
        # event loop if another thread receives it, or if it comes just before the wait. So Python also writes a byte to
        # a socket, which the loop reads. Without that, an idle server ignored a SIGTERM until its next call.
        self._sockets = woken, waking = socket.socketpair()
        for each in self._sockets:
            each.setblocking(False)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        self._loop.add_reader(woken, woken.recv, 4096)
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def serving(self) -> None:
        """Set that a signal from now on gives calls in flight `drain_seconds` to end; an earlier signal gives 0 s."""
        self._serving = True

    async def finish(self, work: Awaitable[object]) -> None:
        """Wait until `work`, a step of the shutdown, ends, or until the deadline.

        If neither SIGTERM nor SIGINT arrived before this call, there is no deadline. At the deadline, return and let
        the step go on.

        Raises:
            Exception: the error of the step, if it failed before the deadline.
        """
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=self.deadline.seconds_left)
        for each in done:
            each.result()

    def end(self, pool: ThreadPoolExecutor) -> None:
        """Stop the pool, drop its waiting work, and wait for the threads of the process.

        `_must_wait_for` leaves out some threads, such as the main thread; the threads of the pool are waited for.
        The wait ends at `deadline`, or 0.3 s after this call if that is later. If a thread still runs then, end the
        process with exit code 0. This method then does not return. The embedded index loses no acknowledged write,
        since a write is on disk before it is acknowledged. If neither SIGTERM nor SIGINT has arrived, there is no
        deadline. If all these threads end in time, return, and stop watching the process.
        """
        if self._sockets:
            signal.set_wakeup_fd(-1)
            for each in self._sockets:
                each.close()
        pool.shutdown(wait=False, cancel_futures=True)
        # Even idle threads need a short time to end.
        deadline = Deadline(max(self.deadline.seconds_left, _MOMENT_SECONDS))
        threads = [thread for thread in threading.enumerate() if _must_wait_for(thread)]
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
        with suppress(RuntimeError, ValueError, OSError, AttributeError):  # no thread can be started, or no stderr
            faulthandler.dump_traceback_later(drain + _HELD_SECONDS, exit=True)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the process is ending already
                self._loop.call_soon_threadsafe(self.requested.set)

    def _watch(self) -> None:
        """Wait for the first signal, and end the process if the shutdown then takes too long."""
        while not self._ended.is_set():
            # If two signals arrived at the same time on a busy host, CPython 3.11 did not run their handlers in 4 of
            # 300 processes whose main thread computed without a pause. The end of each wait requests the interpreter
            # lock, and then the main thread runs them (none of 260).
            with suppress(Empty):
                drain = self._signals.get(timeout=_WATCH_SECONDS)
                if not self._ended.wait(drain + _END_SECONDS):
                    _exit(
                        f"the process ends though its shutdown takes longer than {drain:g} + {_END_SECONDS:g} seconds"
                    )


def _must_wait_for(thread: threading.Thread) -> bool:
    """Return whether `Stopping.end` must wait for a thread.

    `end` waits for all threads except the main thread, the current thread, and daemon threads that do not call native
    code. A daemon thread that calls native code has a name that begins with a prefix in `_NATIVE`.
    """
    if thread is threading.main_thread() or thread is threading.current_thread():
        return False
    return not thread.daemon or thread.name.startswith(_NATIVE)


def _exit(reason: str) -> NoReturn:
    """Log the reason, and end the process with exit code 0, after at most 0.2 s even if the log line is not written.

    A normal exit would wait for threads.
    """

    def write() -> None:
        log.warning("stopping: %s", reason)
        logging.shutdown()

    with suppress(RuntimeError):  # no thread can be started
        writer = threading.Thread(target=write, name="last-words", daemon=True)
        writer.start()
        writer.join(_LOG_SECONDS)
    os._exit(0)
