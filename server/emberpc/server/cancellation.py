"""Cancellation of blocking calls: the thread that runs a call regularly checks a condition.

The caller of the blocking code sets the condition for its thread. The store, SQLite and the loops of the index check
it. A thread without a condition, such as the maintenance thread, is never cancelled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

from emberpc.server.errors import Code, ServiceError


class _Thread(threading.local):
    #: Returns whether the call that this thread runs is cancelled; None: the thread runs no cancellable call.
    stop: Callable[[], bool] | None = None


_thread = _Thread()


class Cancellation:
    """Condition that is True after `cancel`, or once the deadline has passed. Safe to use from several threads.

    Args:
        seconds: seconds until the deadline; infinite for no deadline.
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
    """Cancel the code of the `with` block in this thread, as soon as `stop` returns True.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if `stop` returns True at the start, or from `check` and SQLite later.
    """
    before, _thread.stop = _thread.stop, stop
    try:
        check()
        yield
    finally:
        _thread.stop = before


def cancelled() -> bool:
    """Return whether the call that this thread runs is cancelled. Never raises, so SQLite may call it."""
    stop = _thread.stop
    return stop is not None and stop()


def check() -> None:
    """Raise DEADLINE_EXCEEDED if the call that this thread runs is cancelled.

    Do not call this between the commit of a write and the update of memory for the same write: they would differ then.
    """
    if cancelled():
        raise error()


def error() -> ServiceError:
    """Return the error of a cancelled call."""
    return ServiceError(
        Code.DEADLINE_EXCEEDED,
        "the call was stopped: its caller left, or its deadline passed; ask for less, or set a later deadline",
        reason="CANCELLED",
    )
