"""Many readers or one writer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Lets any number of readers in, or one writer alone; nobody can starve another.

    A waiting writer goes before new readers, and before writers that come later.
    When a writer leaves, the readers that waited meanwhile go before the next
    writer. A thread that asks again at once, as one that fills a graph slice by
    slice does, so keeps nobody waiting for longer than one of its turns.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting_readers = 0
        #: In the order in which they came.
        self._waiting_writers: deque[object] = deque()
        #: Readers that may enter though a writer waits.
        self._admitted = 0

    @property
    def waiting_readers(self) -> int:
        """Number of threads that wait to read."""
        return self._waiting_readers

    @property
    def waiting_writers(self) -> int:
        """Number of threads that wait to write."""
        return len(self._waiting_writers)

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
        me = object()
        with self._condition:
            self._waiting_writers.append(me)
            try:
                self._condition.wait_for(lambda: self._waiting_writers[0] is me and self._is_free_for_a_writer())
            finally:
                self._waiting_writers.remove(me)
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._admitted = self._waiting_readers
                self._condition.notify_all()

    def _is_free_for_a_writer(self) -> bool:
        return not self._writing and not self._readers and not self._admitted
