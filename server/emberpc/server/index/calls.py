"""Calls under way, and an end that waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emberpc.server.errors import Code, ServiceError


class Calls:
    """Lets calls in until the end. Safe to use from several threads.

    Args:
        what: what they are calls of, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._ending = threading.Event()
        self._idle = threading.Condition()
        self._count = 0

    def ending(self) -> bool:
        """Whether the end has begun."""
        return self._ending.is_set()

    @contextmanager
    def one(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
        """Hold off the end for as long as a call lasts.

        A call that lasts long is given what tells it to end, which is when it is to stop or the end has begun; then it
        fails.

        Raises:
            ServiceError: UNAVAILABLE once the end has begun.
        """
        with self._idle:
            self.check()
            self._count += 1
        cut_short = False

        def ends() -> bool:
            nonlocal cut_short
            cut_short = cut_short or self._ending.is_set()
            return cut_short or stop()

        try:
            yield ends
        finally:
            with self._idle:
                self._count -= 1
                self._idle.notify_all()
        if cut_short:
            raise self._over()

    def check(self) -> None:
        """Raise UNAVAILABLE if the end has begun."""
        if self._ending.is_set():
            raise self._over()

    def begin_end(self) -> bool:
        """Let no more calls in; return False if that was done before."""
        with self._idle:
            first = not self._ending.is_set()
            self._ending.set()
        return first

    def end(self) -> bool:
        """Let no more calls in and wait for those under way; return False if that was done before."""
        first = self.begin_end()
        with self._idle:
            self._idle.wait_for(lambda: not self._count)
        return first

    def _over(self) -> ServiceError:
        return ServiceError(Code.UNAVAILABLE, f"{self._what} is closed or deleted; try again", reason="CLOSED")
