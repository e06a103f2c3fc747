"""A thread that works on the items that become due, one after the other."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from emberpc.server.deadlines import Deadline

Item = TypeVar("Item")


class BackgroundThread(ABC, Generic[Item]):
    """Handles items when they are due. The thread starts when it is first needed, and sleeps while nothing is due.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        #: Held by all methods that read or change which items are due.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the present item.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or (deadline or Deadline()).join(self._thread)

    @abstractmethod
    def _take(self) -> Item | float | None:
        """Remove and return an item that is due, or return the seconds until one may be; None: until `_notify`."""

    @abstractmethod
    def _handle(self, item: Item) -> None:
        """Work on an item; must not raise."""

    def _notify(self) -> None:
        """Have the thread call `_take` again; the caller holds `_changed`."""
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
