"""Base class of threads that work on items when they become due, one after the other."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from emberpc.server.deadlines import Deadline

Item = TypeVar("Item")


class BackgroundThread(ABC, Generic[Item]):
    """Handles items when they are due, in a thread of its own.

    A subclass says which item is due, and handles it. The thread starts at the first `_notify`, and sleeps while
    nothing is due.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        #: Held while a method reads or changes which items are due; notified after a change, to wake the thread.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the item that it handles now, and wait for its end; items that are due are dropped.

        Args:
            deadline: until when to wait; None: without limit.

        Returns:
            Whether the thread has ended, or never started.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or (deadline or Deadline()).join(self._thread)

    @abstractmethod
    def _take(self) -> Item | float | None:
        """Remove an item that is due, and return it; the caller holds `_changed`.

        Returns:
            The item. If no item is due: the seconds, as a float, until an item may be due, or None if no item will be
            due before the next `_notify`.
        """

    @abstractmethod
    def _handle(self, item: Item) -> None:
        """Do the work for an item; must raise no exception, since it would end the thread."""

    def _notify(self) -> None:
        """Start the thread if it has not started, and let it call `_take` again; the caller holds `_changed`."""
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            self._handle(item)

    def _next(self) -> Item | None:
        """Wait until an item is due and return it; None after `close`."""
        with self._changed:
            while not self._closed:
                taken = self._take()
                if taken is not None and not isinstance(taken, float):
                    return taken
                self._changed.wait(taken)
        return None
