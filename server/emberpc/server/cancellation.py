"""Cancellation of blocking calls: the thread that runs a call looks again and again whether it is still wanted.

The services set the condition for the thread; the store, SQLite and the loops of the index read it. A thread without a
condition, as that of maintenance, runs to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

from emberpc.server.errors import Code, ServiceError


class _Thread(threading.local):
    #: Whether the call that this thread runs is no longer wanted; None: the thread runs no cancellable call.
    stop: Callable[[], bool] | None = None


_thread = _Thread()


class Cancellation:
    """Whether a call was cancelled or its deadline has passed. Safe to use from several threads.

    Args:
        seconds: until the deadline; infinite for none.
    """

    def __init__(self, seconds: float = inf) -> None:
        self._cancelled = threading.Event()
        self._deadline = monotonic() + seconds

    def cancel(self) -> None:
        """Cancel the call."""
        self._cancelled.set()

    def __call__(self) -> bool:
        """Return True from then on."""
        return self._cancelled.is_set() or monotonic() >= self._deadline


@contextmanager
def cancelled_when(stop: Callable[[], bool]) -> Iterator[None]:
    """Cancel what this thread does in the block, as soon as `stop` returns True.

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

    Never to be called between the commit of a write and the update of memory that belongs to it.
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
