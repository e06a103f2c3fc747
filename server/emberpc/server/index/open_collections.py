"""Limit of the number of open collections: the least recently used are closed, and their next calls open them again."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from emberpc.server import cancellation, descriptors
from emberpc.server.deadlines import Deadline
from emberpc.server.index.storage.readers import MOST_DESCRIPTORS
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)

#: Number of file descriptors that are not for collections, but for connections, models, the log and calls in progress;
#: at most half of all.
_RESERVED = 256
#: Least and greatest result of `derived_limit`. An open collection of one record takes about 0.5 MB of memory.
_FEWEST, _MOST = 4, 500
#: Most seconds until another attempt to close a collection that could not be closed.
_RETRY = 60.0
#: Freed memory is returned to the system `_AFTER_LAST` seconds after the last collection was closed, but at most
#: `_AFTER_FIRST` seconds after the first. At least `_BETWEEN` seconds lie between two returns, since models must
#: allocate their memory again after each return.
_AFTER_LAST, _AFTER_FIRST, _BETWEEN = 1.0, 10.0, 30.0


class Closable(Protocol):
    """A collection that can be closed and opened again."""

    @property
    def last_used(self) -> float:
        """When the last call of the collection ended, in seconds of `time.monotonic`."""

    @property
    def is_saved(self) -> bool:
        """Whether closing writes no snapshot: the collection is closed, or its last snapshot has the whole graph."""

    def close_idle(self) -> bool:
        """Close the collection unless a call is in progress; return whether this closed it.

        A collection that is closed calls `OpenCollections.discard` with itself.
        """


def derived_limit() -> int:
    """Return how many collections may be open, 4 to 500, derived from the process's limit of file descriptors."""
    limit = descriptors.limit()
    return max(_FEWEST, min(_MOST, (limit - min(_RESERVED, limit // 2)) // MOST_DESCRIPTORS))


class OpenCollections:
    """The set of open collections. Safe to use from several threads.

    A background thread closes idle collections. It starts when the first collection is opened.

    Args:
        most: limit of the number of open collections. More are open only while all of them have calls in progress, or
            snapshots that cannot be written.
        idle_seconds: a collection without a call for this many seconds is closed; 0: never.
    """

    def __init__(self, most: int, idle_seconds: float) -> None:
        self.most = most
        self._idle_seconds = idle_seconds or float("inf")
        self._changed = threading.Condition()
        self._open: set[Closable] = set()
        #: Collections that the background thread closes next, since they must save a snapshot, which takes long.
        self._soon: set[Closable] = set()
        #: When to retry closing a collection that could not be closed, in seconds of `time.monotonic`.
        self._retry: dict[Closable, float] = {}
        self._first_freed = self._last_freed = self._last_trim = float("-inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, collection: Closable) -> None:
        """Add a collection that is about to be opened. If there are more than `most` then, close idle collections."""
        with self._changed:
            self._open.add(collection)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="index-closing", daemon=True)
                self._thread.start()
            if len(self._open) <= self.most:
                return
        self._close_until(self.most)

    def shrink(self) -> None:
        """Close idle collections until a quarter fewer collections are open, to free file descriptors."""
        self._close_until(3 * len(self._open) // 4)

    def discard(self, collection: Closable) -> None:
        """Remove a collection that was closed, and plan the return of its memory to the system."""
        with self._changed:
            if collection not in self._open:
                return
            self._open.discard(collection)
            self._soon.discard(collection)
            self._retry.pop(collection, None)
            self._last_freed = time.monotonic()
            if self._first_freed <= self._last_trim:
                self._first_freed = self._last_freed
                self._changed.notify()

    def close(self, deadline: Deadline) -> bool:
        """Stop the background thread; return whether it ended by the deadline. The open collections stay open."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or deadline.join(self._thread)

    def _close_until(self, most: int) -> None:
        """Close the least recently used idle collections until `most` are open, or all open ones are in use.

        Collections whose graph is saved are closed first. If there are not enough, collections with an unsaved graph
        are saved and closed here too. If there are enough, the background thread saves and closes the unsaved
        collections that were used less recently.
        """
        with self._changed:
            in_order = sorted(self._open, key=lambda each: each.last_used)
        unsaved = []
        for each in in_order:
            if len(self._open) <= most:
                break
            if not each.is_saved:
                unsaved.append(each)
            else:
                _close(each)
        else:
            for each in unsaved:
                if len(self._open) <= most:
                    return
                _close(each)
            return
        if unsaved:
            # Collections in `unsaved` were used less recently than some that were closed, so the background thread
            # saves and closes them.
            with self._changed:
                self._soon.update(self._open.intersection(unsaved))
                self._changed.notify()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            if not found:
                return_memory()
                continue
            for each in found:
                if not _close(each):
                    with self._changed:
                        if each in self._open:
                            self._retry[each] = time.monotonic() + min(_RETRY, self._idle_seconds)

    def _next(self) -> list[Closable] | None:
        """Wait until there is work for the background thread.

        Returns:
            The collections to close now; an empty list if memory is to be returned; None if the thread must end.
        """
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if self._soon:
                    found, self._soon = [*self._soon], set()
                    return found
                due = {each: self._due(each) for each in self._open}
                if found := [each for each, when in due.items() if when <= now]:
                    return found
                trim = self._trim_due()
                if trim <= now:
                    self._last_trim = now
                    return []
                until = min(trim, *due.values(), float("inf"))
                self._changed.wait(min(until - now, threading.TIMEOUT_MAX))
        return None

    def _due(self, collection: Closable) -> float:
        return max(collection.last_used + self._idle_seconds, self._retry.get(collection, 0.0))

    def _trim_due(self) -> float:
        if self._first_freed <= self._last_trim:
            return float("inf")
        return max(min(self._last_freed + _AFTER_LAST, self._first_freed + _AFTER_FIRST), self._last_trim + _BETWEEN)


def _close(collection: Closable) -> bool:
    """Close a collection unless it is in use; return whether it was closed. If closing fails, log the error."""
    try:
        # The thread may run a call that is cancelled. That call is for another collection, so closing must not stop.
        with cancellation.cancelled_when(lambda: False):
            return collection.close_idle()
    except Exception:  # the call that opens another collection must not fail
        log.exception("a collection that is not in use stays open")
        return False
