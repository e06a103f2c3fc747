"""A lock for many readers or one writer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class ReadWriteLock:
    """Admits any number of readers, or one writer alone.

    Writers enter in the order in which they came. While a writer waits, new readers wait too. But when a writer leaves,
    as many readers as wait then enter before the next writer. So neither readers nor writers keep the others out, even
    if a thread locks again at once, such as a thread that fills a graph in small steps.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._readers = 0
        self._writing = False
        self._waiting_readers = 0
        #: Writers that wait, each as an object of its own, in the order in which they came.
        self._waiting_writers: deque[object] = deque()
        #: Number of readers, waiting or new, that may still enter before the next writer.
        self._admitted = 0
        self._reading_side = _Side(self._begin_to_read, self._end_reading)
        self._writing_side = _Side(self._begin_to_write, self._end_writing)

    @property
    def waiting_readers(self) -> int:
        """Number of threads that wait to read."""
        return self._waiting_readers

    @property
    def waiting_writers(self) -> int:
        """Number of threads that wait to write."""
        return len(self._waiting_writers)

    def read(self) -> AbstractContextManager[None]:
        """Return a context manager that holds the lock together with other readers.

        Not reentrant: if a writer waits, the second entry of a thread waits for that writer, and the writer for the
        thread.
        """
        return self._reading_side

    def write(self) -> AbstractContextManager[None]:
        """Return a context manager that holds the lock alone. Not reentrant."""
        return self._writing_side

    def _begin_to_read(self) -> None:
        with self._mutex:
            if not self._is_open_to_readers():
                self._waiting_readers += 1
                self._changed.wait_for(self._is_open_to_readers)
                self._waiting_readers -= 1
            self._admitted = max(0, self._admitted - 1)
            self._readers += 1

    def _end_reading(self) -> None:
        with self._mutex:
            self._readers -= 1
            # Only waiting writers need notice: no reader waits for other readers to leave.
            if not self._readers and self._waiting_writers:
                self._changed.notify_all()

    def _begin_to_write(self) -> None:
        me = object()
        with self._mutex:
            self._waiting_writers.append(me)
            try:
                self._changed.wait_for(lambda: self._waiting_writers[0] is me and self._is_free_for_a_writer())
            finally:
                self._waiting_writers.remove(me)
            self._writing = True

    def _end_writing(self) -> None:
        with self._mutex:
            self._writing = False
            self._admitted = self._waiting_readers
            if self._waiting_readers or self._waiting_writers:
                self._changed.notify_all()

    def _is_open_to_readers(self) -> bool:
        return not self._writing and bool(self._admitted or not self._waiting_writers)

    def _is_free_for_a_writer(self) -> bool:
        return not self._writing and not self._readers and not self._admitted


class _Side:
    """Context manager for one side of a lock, read or write, that calls `begin` on entry and `end` on exit.

    The lock creates one object for each side. With `contextlib.contextmanager`, each entry would create a generator,
    which takes as long as the locking itself.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
