"""Many readers or one writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Lets any number of readers in, or one writer alone; neither side can starve the other.

    A waiting writer goes before new readers. When a writer leaves, the readers
    that waited meanwhile go before the next writer, even one that asks again at
    once, as a thread that fills a graph slice by slice does.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting_readers = 0
        self._waiting_writers = 0
        #: Readers that may enter though a writer waits.
        self._admitted = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock with other readers. Not reentrant: a waiting writer would block the second entry."""
        with self._condition:
            self._waiting_readers += 1
            self._condition.wait_for(lambda: not self._writing and (self._admitted or not self._waiting_writers))
            self._waiting_readers -= 1
            self._admitted = max(0, self._admitted - 1)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone. Not reentrant."""
        with self._condition:
            self._waiting_writers += 1
            self._condition.wait_for(lambda: not self._writing and not self._readers and not self._admitted)
            self._waiting_writers -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._admitted = self._waiting_readers
                self._condition.notify_all()
