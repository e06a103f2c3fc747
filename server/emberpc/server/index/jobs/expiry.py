"""Delete expired records in a background thread."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.jobs.background_thread import BackgroundThread

log = logging.getLogger(__name__)

#: Seconds after which a failed deletion is retried. Also the maximum seconds that the thread sleeps before it compares
#: the noted times with the system's clock again, since the clock may be adjusted meanwhile.
_RETRY = 60.0


class Expiring(Protocol):
    """A collection whose records may expire."""

    def expire(self) -> float | None:
        """Delete expired records.

        Returns:
            When the next record expires, in seconds since 1970; None if no record will expire.

        Raises:
            ServiceError: UNAVAILABLE if the collection is closed for good or deleted; other codes if deleting fails.
        """


class ExpiryThread(BackgroundThread[Expiring]):
    """A thread that calls `expire` of a collection at the time given to `note`, and then at each time `expire` returns.

    A failed deletion is logged and retried after a minute, unless the collection was closed for good or deleted.
    """

    def __init__(self) -> None:
        super().__init__("index-expiry")
        self._due: dict[Expiring, float] = {}

    def note(self, collection: Expiring, when: float) -> None:
        """Let the thread call `expire` of a collection at `when`, in seconds since 1970; at once if that has passed.

        Only the earliest time that was noted for a collection is kept. After `close`, nothing is noted.
        """
        with self._changed:
            if self._closed or self._due.get(collection, when + 1) <= when:
                return
            self._due[collection] = when
            self._notify()

    def _handle(self, collection: Expiring) -> None:
        try:
            again = collection.expire()
        except ServiceError as error:
            if error.code is Code.UNAVAILABLE:  # closed or deleted in the meantime
                return
            log.warning("expired records are not deleted yet: %s", error.message)
            again = time.time() + _RETRY
        except Exception:  # a failure in one collection must not stop the deletion in others
            log.exception("expired records are not deleted yet")
            again = time.time() + _RETRY
        if again is not None:
            self.note(collection, again)

    def _take(self) -> Expiring | float | None:
        soonest, now = min(self._due, key=self._due.__getitem__, default=None), time.time()
        if soonest is None:
            return None
        if self._due[soonest] > now:
            return min(self._due[soonest] - now, _RETRY)
        del self._due[soonest]
        return soonest
