"""A gate that counts calls in progress: a call opens a closed resource, which may be closed while no call runs."""

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
    """Counts calls in progress, and opens the resource that they use. Safe to use from several threads.

    `begin_end` or `end` begins the end of the gate: from then on no call is admitted, for good.

    Args:
        subject: name of the resource that the calls use, for messages.
        open_it: opens the resource; its errors are raised by the call that needs the resource.
        release: called at the end of each call, unless opening the resource failed; on the call's thread, before the
            resource can be closed.
    """

    def __init__(
        self, subject: str, open_it: Callable[[], None] = _nothing, release: Callable[[], None] = _nothing
    ) -> None:
        self._subject = subject
        self._open_it = open_it
        self._release = release
        self._mutex = threading.Lock()
        self._idle = threading.Condition(self._mutex)
        self._ending = threading.Event()
        self._count = 0
        #: Held while the resource is opened or closed.
        self._opening = threading.Lock()
        self._is_open = False
        #: Number of calls that have begun so far, without maintenance calls.
        self.begun = 0
        #: When a call, other than a maintenance call, last ended, in seconds of `time.monotonic`; before the first end,
        #: when the gate was created.
        self.last_used = monotonic()

    def ending(self) -> bool:
        """Return whether the end of the gate has begun, so that no call is admitted."""
        return self._ending.is_set()

    def enter(self, stop: Callable[[], bool] | None = None) -> _GatedCall:
        """Return a context manager for a call, which keeps the resource open until the call ends.

        Entering the context manager opens the resource if it is closed, and returns a function that a long call must
        use regularly. The call must stop when that function returns True, because `stop` returns True or the end of the
        gate has begun.

        Raises:
            ServiceError: on entering, UNAVAILABLE if the end of the gate has begun, and errors of opening the resource.
                On leaving without another error, UNAVAILABLE if the function returned True because the end began.
        """
        return _GatedCall(self, stop)

    def check(self) -> None:
        """Raise the error UNAVAILABLE if the end of the gate has begun, so that no call is admitted."""
        if self._ending.is_set():
            raise self.over()

    def begin_end(self) -> bool:
        """Admit no more calls, for good; return False if the end of the gate had begun before."""
        with self._mutex:
            first = not self._ending.is_set()
            self._ending.set()
        return first

    def end(self, close: Callable[[], None] = _nothing, deadline: Deadline | None = None) -> bool:
        """Admit no more calls, wait for those in progress, and close the resource if it is open.

        Args:
            close: closes the resource.
            deadline: until when to wait for calls; None: without limit.

        Returns:
            Whether the calls, and any other closing, ended by the deadline. If not, `close` is not called.
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
        """Close the resource, unless a call is in progress, or has begun since the caller read `self.begun`.

        Do nothing either if the resource is closed or is being opened or closed, or the end of the gate has begun.

        A call that begins while `close` runs waits, and then opens the resource again.

        Args:
            begun: the value of `self.begun` that the caller read.
            close: closes the resource.

        Returns:
            Whether the resource was closed here.
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
        """Wait, after `begin_end`, until no call is in progress; return False if the deadline passes before."""
        with self._mutex:
            return self._idle.wait_for(lambda: not self._count, deadline.seconds_left)

    def begin(self) -> None:
        """Count the beginning of a call, and open the resource if it is closed; used by the result of `enter`.

        Raises:
            ServiceError: UNAVAILABLE if the end of the gate has begun, and errors of opening the resource.
        """
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
        """Run `release`, set `last_used`, and count the end of a call; used by the result of `enter`."""
        self._release()
        self.last_used = monotonic()
        self._leave()

    def begin_maintenance(self, *, idle: bool = False) -> bool:
        """Begin a call for maintenance, unless the resource is closed or being opened; return whether the call began.

        The call delays closing, but changes neither `begun` nor `last_used`. `finish_maintenance` must end it.

        Args:
            idle: whether to begin only if no other call is in progress.

        Raises:
            ServiceError: UNAVAILABLE if the end of the gate has begun.
        """
        with self._mutex:
            self.check()
            if not self._is_open or (idle and self._count):
                return False
            self._count += 1
        return True

    def finish_maintenance(self) -> None:
        """Run `release` and end a call that `begin_maintenance` began."""
        self._release()
        self._leave()

    def _leave(self) -> None:
        with self._mutex:
            self._count -= 1
            if not self._count and self._ending.is_set():
                self._idle.notify_all()

    def over(self) -> ServiceError:
        """Return the error UNAVAILABLE for a call that the end of the gate prevents or stops."""
        return ServiceError(Code.UNAVAILABLE, f"{self._subject} is closed or deleted; try again", reason="CLOSED")


class _GatedCall:
    """Context manager of one call of a `CallGate`.

    It is a class, since each search enters a context manager, and a generator with `contextmanager` takes four times as
    long.
    """

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
