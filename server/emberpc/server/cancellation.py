"""Cancellation of blocking calls: the code of a call checks from time to time whether the call is cancelled.

`cancelled_when` sets a condition for its thread: a function that returns whether the call of the thread is cancelled.
SQLite and long loops check the condition of their thread. A thread without a condition, such as the maintenance thread,
is never cancelled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

from emberpc.server.errors import Code, ServiceError


class _Thread(threading.local):
    #: The condition of this thread: returns whether its call is cancelled. None: the thread runs no cancellable call.
    stop: Callable[[], bool] | None = None


_thread = _Thread()


class Cancellation:
    """Condition for `cancelled_when`: returns True after `cancel` was called, or after a deadline.

    Safe to use from several threads.

    Args:
        seconds: seconds from now until the deadline; infinity: no deadline.
    """

    def __init__(self, seconds: float = inf) -> None:
        self._cancelled = threading.Event()
        self._deadline = monotonic() + seconds

    def cancel(self) -> None:
        """Cancel the call: the condition is True from now on."""
        self._cancelled.set()

    def __call__(self) -> bool:
        """Return whether the call was cancelled or its deadline has passed."""
        return self._cancelled.is_set() or monotonic() >= self._deadline


@contextmanager
def cancelled_when(stop: Callable[[], bool]) -> Iterator[None]:
    """Context manager: make `stop` the condition of this thread in the block, and restore the old one at the end.

    The block itself is not interrupted: code inside it calls `check` or `cancelled`.

    Args:
        stop: returns whether the call is cancelled.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if `stop` returns True at the start; the block does not run then.
    """
    before, _thread.stop = _thread.stop, stop
    try:
        check()
        yield
    finally:
        _thread.stop = before


def cancelled() -> bool:
    """Return whether the call that this thread runs is cancelled; False if the thread has no condition.

    SQLite calls this function while a statement runs, and interrupts the statement if the result is True.
    """
    stop = _thread.stop
    return stop is not None and stop()


def check() -> None:
    """Raise DEADLINE_EXCEEDED if the call that this thread runs is cancelled.

    Do not call this between the commit of a write to the database and the same change of the data in memory: after an
    error there, memory and database would differ.
    """
    if cancelled():
        raise error()


def error() -> ServiceError:
    """Return the DEADLINE_EXCEEDED error of a cancelled call, with the reason CANCELLED."""
    return ServiceError(
        Code.DEADLINE_EXCEEDED,
        "the call was stopped: its caller left, or its deadline passed; ask for less, or set a later deadline",
        reason="CANCELLED",
    )
