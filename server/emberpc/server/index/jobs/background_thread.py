"""Base class of threads that handle items, such as collections, when the items become due, one after the other."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from emberpc.server.deadlines import Deadline

Item = TypeVar("Item")


class BackgroundThread(ABC, Generic[Item]):
    """Handles items when they are due, in a thread of its own.

    A subclass implements `_take`, which says which item is due, and `_handle`. The thread starts at the first
    `_notify`, and sleeps while no item is due.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        #: Held while a method reads or changes which items are due, or `_closed`; notified to wake the thread.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the item that it handles now, and wait for its end; items that are due are dropped.

        Args:
            deadline: until when to wait for the end; None: without limit.

        Returns:
            Whether the thread has ended by the deadline, or never started.
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
        """Do the work for an item, without holding `_changed`. An exception would end the thread, so raise none."""

    def _notify(self) -> None:
        """Start the thread if it has not started, and wake it, so that it calls `_take`; the caller holds `_changed`.

        To be called when an item may be due earlier than the last `_take` said.
        """
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
