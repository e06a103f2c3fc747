"""Calls under way, and an end that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError


class Calls:
    """Lets calls in until the end. Safe to use from several threads.

    Args:
        what: what they are calls of, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._mutex = threading.Lock()
        self._idle = threading.Condition(self._mutex)
        self._ending = threading.Event()
        self._count = 0

    def ending(self) -> bool:
        """Whether the end has begun."""
        return self._ending.is_set()

    def one(self, stop: Callable[[], bool] | None = None) -> _Call:
        """Hold off the end for as long as a call lasts.

        A call that lasts long is given what tells it to end, which is when it is to stop or the end has begun; then it
        fails.

        Raises:
            ServiceError: UNAVAILABLE once the end has begun.
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

    def end(self) -> bool:
        """Let no more calls in and wait for those under way; return False if that was done before."""
        first = self.begin_end()
        self.wait(Deadline())
        return first

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the calls under way; return whether they ended by the deadline."""
        with self._mutex:
            return self._idle.wait_for(lambda: not self._count, deadline.seconds_left)

    def begin(self) -> None:
        """Count a call in; for `one`."""
        with self._mutex:
            self.check()
            self._count += 1

    def finish(self) -> None:
        """Count a call out; for `one`."""
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

    def __init__(self, calls: Calls, stop: Callable[[], bool] | None) -> None:
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
