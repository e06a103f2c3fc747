"""Calls in progress: what they use is opened by the first one, and closed while there is none, or at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType

from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError


def _nothing() -> None:
    pass


class CallGate:
    """Lets calls in until the end. Safe to use from several threads.

    Args:
        what: what they are calls of, for messages.
        open_it: opens what the calls use; the call that needs it raises what this raises.
        release: called by each call at its end, on its thread, before anything can be closed.
    """

    def __init__(
        self, what: str, open_it: Callable[[], None] = _nothing, release: Callable[[], None] = _nothing
    ) -> None:
        self._what = what
        self._open_it = open_it
        self._release = release
        self._mutex = threading.Lock()
        self._idle = threading.Condition(self._mutex)
        self._ending = threading.Event()
        self._count = 0
        #: Held while it is opened or closed.
        self._opening = threading.Lock()
        self._is_open = False
        #: Number of calls so far, without those of maintenance.
        self.begun = 0
        #: When the last call without those of maintenance ended, by the monotonic clock.
        self.last_used = monotonic()

    def ending(self) -> bool:
        """Whether the end has begun."""
        return self._ending.is_set()

    def one(self, stop: Callable[[], bool] | None = None) -> _Call:
        """Hold off the end, and keep open what the calls use, for as long as a call lasts.

        A call that lasts long is given what tells it to end, which is when it is to stop or the end has begun; then it
        fails.

        Raises:
            ServiceError: UNAVAILABLE once the end has begun; what opening raises.
        """
        return _Call(self, stop)

    def check(self) -> None:
        """Raise UNAVAILABLE if the end has begun."""
        if self._ending.is_set():
            raise self.over()

    def begin_end(self) -> bool:
        """Let no more calls in; return False if that was done before."""
        with self._mutex:
            first = not self._ending.is_set()
            self._ending.set()
        return first

    def end(self, close: Callable[[], None] = _nothing, deadline: Deadline | None = None) -> bool:
        """Let no more calls in, wait for those in progress, and close what they used unless it is closed.

        Args:
            close: closes it.
            deadline: until when to wait; None: without limit.

        Returns:
            Whether the calls ended by the deadline; otherwise it stays open.
        """
        deadline = deadline or Deadline()
        self.begin_end()
        if not (self.wait(deadline) and self._opening.acquire(timeout=deadline.seconds_left)):
            return False
        try:
            if self._is_open:
                self._is_open = False
                close()
        finally:
            self._opening.release()
        return True

    def suspend(self, begun: int, close: Callable[[], None]) -> bool:
        """Close what the calls use, unless one is in progress or more have begun; return whether it was closed.

        A call that comes meanwhile waits and opens it again.

        Args:
            begun: the number of calls so far that the caller knows of.
            close: closes it.
        """
        if not self._opening.acquire(blocking=False):
            return False
        try:
            with self._mutex:
                if self._count or self.begun != begun or not self._is_open or self._ending.is_set():
                    return False
                self._is_open = False
            close()
        finally:
            self._opening.release()
        return True

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the calls under way; return whether they ended by the deadline."""
        with self._mutex:
            return self._idle.wait_for(lambda: not self._count, deadline.seconds_left)

    def begin(self) -> None:
        """Count a call in; for `one`."""
        with self._mutex:
            self.check()
            self._count += 1
            self.begun += 1
            if self._is_open:
                return
        try:
            with self._opening:
                if not self._is_open:
                    self._open_it()
                    self._is_open = True
        except BaseException:
            self._leave()
            raise

    def finish(self) -> None:
        """Count a call out; for `one`."""
        self._release()
        self.last_used = monotonic()
        self._leave()

    def begin_maintenance(self, *, idle: bool = False) -> bool:
        """Count in a call that is no use of the collection; return False if that is closed and not to be opened.

        Args:
            idle: return False also while other calls are in progress.

        Raises:
            ServiceError: UNAVAILABLE once the end has begun.
        """
        with self._mutex:
            self.check()
            if not self._is_open or (idle and self._count):
                return False
            self._count += 1
        return True

    def finish_maintenance(self) -> None:
        """Count out what `begin_maintenance` counted in."""
        self._release()
        self._leave()

    def _leave(self) -> None:
        with self._mutex:
            self._count -= 1
            if not self._count and self._ending.is_set():
                self._idle.notify_all()

    def over(self) -> ServiceError:
        """Return the error of what comes after the end, or was ended by it."""
        return ServiceError(Code.UNAVAILABLE, f"{self._what} is closed or deleted; try again", reason="CLOSED")


class _Call:
    """One call; a class, since a generator for each search would take four times as long."""

    __slots__ = ("_calls", "_cut_short", "_stop")

    def __init__(self, calls: CallGate, stop: Callable[[], bool] | None) -> None:
        self._calls, self._stop, self._cut_short = calls, stop, False

    def __enter__(self) -> Callable[[], bool]:
        self._calls.begin()
        return self._ends

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._calls.finish()
        if self._cut_short and kind is None:
            raise self._calls.over()

    def _ends(self) -> bool:
        self._cut_short = self._cut_short or self._calls.ending()
        return self._cut_short or (self._stop is not None and self._stop())
