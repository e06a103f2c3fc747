"""The thread that deletes expired records."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: Seconds until a failed deletion is retried; also the longest sleep, since the clock may be adjusted.
_RETRY = 60.0


class Expiring(Protocol):
    """A collection with records that expire."""

    def expire(self) -> float | None:
        """Delete expired records; return when the next record expires, in seconds since 1970, or None."""


class ExpiryThread:
    """Calls `expire` of collections when their next record expires.

    The thread starts when it is first needed, and then sleeps until the next expiry.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Expiring, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def note(self, collection: Expiring, when: float) -> None:
        """Call `expire` of a collection at `when`, in seconds since 1970, or earlier."""
        with self._changed:
            if self._closed or self._due.get(collection, when + 1) <= when:
                return
            self._due[collection] = when
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="index-expiry", daemon=True)
                self._thread.start()

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the present deletion.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or (deadline or Deadline()).join(self._thread)

    def _run(self) -> None:
        while (collection := self._next()) is not None:
            try:
                again = collection.expire()
            except ServiceError as error:
                if error.code is Code.UNAVAILABLE:  # closed or deleted in the meantime
                    continue
                log.warning("expired records are not deleted yet: %s", error.message)
                again = time.time() + _RETRY
            except Exception:  # a failure in one collection must not stop the deletion in others
                log.exception("expired records are not deleted yet")
                again = time.time() + _RETRY
            if again is not None:
                self.note(collection, again)

    def _next(self) -> Expiring | None:
        """Wait until a collection has an expired record and return it; None after `close`."""
        with self._changed:
            while not self._closed:
                now = time.time()
                soonest = min(self._due, key=self._due.__getitem__, default=None)
                if soonest is not None and self._due[soonest] <= now:
                    del self._due[soonest]
                    return soonest
                self._changed.wait(None if soonest is None else min(self._due[soonest] - now, _RETRY))
        return None
