"""Limit of the number of open collections: idle ones are closed, and the next call of each opens it again."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from emberpc.server import cancellation, descriptors
from emberpc.server.deadlines import Deadline
from emberpc.server.index.storage.readers import MAX_DESCRIPTORS
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)

#: Number of file descriptors that are not for collections, but for connections, models, the log and calls in progress;
#: half of the limit of descriptors if that is less.
_RESERVED = 256
#: Least and greatest result of `derived_limit`. An open collection of one record takes about 0.5 MB of memory.
_MIN_LIMIT, _MAX_LIMIT = 4, 500
#: Seconds, or `idle_seconds` if less, after which the background thread retries a closing that did not succeed. A call
#: meanwhile delays the retry until the collection is idle again. If `idle_seconds` is 0, there is no retry.
_RETRY = 60.0
#: Freed memory is returned to the system `_AFTER_LAST` seconds after the last closing of a collection, or if that is
#: earlier, `_AFTER_FIRST` seconds after the first closing since the last return. In any case `_BETWEEN` seconds or more
#: lie between two returns, since models must allocate their memory again after each return.
_AFTER_LAST, _AFTER_FIRST, _BETWEEN = 1.0, 10.0, 30.0


class Closable(Protocol):
    """A collection that can be closed and opened again."""

    @property
    def last_used(self) -> float:
        """When the last call of the collection ended, in seconds of `time.monotonic`; maintenance does not count."""

    @property
    def is_saved(self) -> bool:
        """Whether closing would write no snapshot, and so be quick; True while the collection is closed."""

    def close_idle(self) -> bool:
        """Close the collection unless it is in use or its snapshot cannot be written; return whether this closed it.

        A collection that is closed, here or otherwise, calls `OpenCollections.discard` with itself.
        """


def derived_limit() -> int:
    """Return the default limit of open collections, 4 to 500, derived from the process's limit of file descriptors."""
    limit = descriptors.limit()
    return max(_MIN_LIMIT, min(_MAX_LIMIT, (limit - min(_RESERVED, limit // 2)) // MAX_DESCRIPTORS))


class OpenCollections:
    """The set of open collections. Safe to use from several threads.

    A background thread closes idle collections and returns freed memory to the system. It starts when the first
    collection is opened.

    Args:
        maximum: maximum number of open collections. Opening one more closes idle ones. More stay open if too few can
            be closed: they have calls or maintenance in progress, or their snapshots cannot be written.
        idle_seconds: a collection without a call for this many seconds is closed; 0: none is closed for this reason.
    """

    def __init__(self, maximum: int, idle_seconds: float) -> None:
        self.maximum = maximum
        self._idle_seconds = idle_seconds or float("inf")
        self._changed = threading.Condition()
        self._open: set[Closable] = set()
        #: Collections that the background thread closes next, since they must save a snapshot, which takes long.
        self._soon: set[Closable] = set()
        #: Earliest time at which the background thread retries a closing, in seconds of `time.monotonic`.
        self._retry: dict[Closable, float] = {}
        self._first_freed = self._last_freed = self._last_trim = float("-inf")
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, collection: Closable) -> None:
        """Add a collection that is about to be opened. If `maximum` is exceeded with it, first close idle ones."""
        with self._changed:
            self._open.add(collection)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="index-closing", daemon=True)
                self._thread.start()
            if len(self._open) <= self.maximum:
                return
        self._close_until(self.maximum)

    def shrink(self) -> None:
        """Close at least a quarter of the open collections, or all idle ones if they are fewer, to free descriptors."""
        self._close_until(3 * len(self._open) // 4)

    def discard(self, collection: Closable) -> None:
        """Remove a collection that was closed or could not be opened; have its memory returned to the system later.

        Do nothing if the collection is not in the set.
        """
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
        """Stop the background thread for good; return whether it ended by the deadline, or never started.

        The open collections stay open.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or deadline.join(self._thread)

    def _close_until(self, maximum: int) -> None:
        """Close idle collections, least recently used first, until at most `maximum` are open, or none can be closed.

        Collections whose graph is saved come first, since closing them is quick. If they are not enough, those with an
        unsaved graph are saved and closed here too. If they are enough, the background thread saves and closes the
        unsaved ones that were used less recently than the last one closed here.
        """
        with self._changed:
            in_order = sorted(self._open, key=lambda each: each.last_used)
        unsaved = []
        for each in in_order:
            if len(self._open) <= maximum:
                break
            if not each.is_saved:
                unsaved.append(each)
            else:
                _close(each)
        else:
            for each in unsaved:
                if len(self._open) <= maximum:
                    return
                _close(each)
            return
        if unsaved:
            # Collections in `unsaved` were used less recently than the last one that was closed, so the background
            # thread saves and closes them. The caller, which opens a collection, does not wait for that.
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
    """Call `close_idle` of a collection and return its result; if it raises an error, log that and return False."""
    try:
        # The thread may run a call that is cancelled. That call is for another collection, so closing must not stop.
        with cancellation.cancelled_when(lambda: False):
            return collection.close_idle()
    except Exception:  # the call that opens another collection must not fail
        log.exception("a collection that is not in use stays open")
        return False
