"""Run the maintenance of all collections in one background thread."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.jobs.background_thread import BackgroundThread

log = logging.getLogger(__name__)


class Maintained(Protocol):
    """A collection that `MaintenanceThread` maintains."""

    spec: CollectionSpec

    def maintain(self) -> None:
        """Run the maintenance that is due.

        Raises:
            ServiceError: UNAVAILABLE or NOT_FOUND if the collection was closed for good or deleted; other codes if the
                maintenance failed.
        """


class MaintenanceThread(BackgroundThread[Maintained]):
    """A thread that calls `maintain` of the collections that request maintenance, one after the other.

    Errors are logged, except UNAVAILABLE and NOT_FOUND, as of a closed collection. After an error the collection is
    maintained again only when it is requested again. Close the collections before the thread: `close` of the thread
    waits for the maintenance in progress, which ends early once its collection is closed.
    """

    def __init__(self) -> None:
        super().__init__("index-maintenance")
        #: Collections to maintain as soon as possible, in the order of their first requests. Several requests of a
        #: collection are one entry, removed when its maintenance begins.
        self._soon: dict[Maintained, None] = {}
        #: When to maintain each collection that waits after `wake_at_rest`, in seconds of `time.monotonic`.
        self._at_rest: dict[Maintained, float] = {}

    def wake(self, collection: Maintained) -> None:
        """Request the maintenance of a collection as soon as possible, after earlier such requests."""
        with self._changed:
            if not self._closed and collection not in self._soon:
                self._soon[collection] = None
                self._notify()

    def wake_at_rest(self, collection: Maintained, seconds: float) -> None:
        """Request the maintenance of a collection `seconds` from now; a new request replaces the time of the last one.

        So a collection that requests this at each write is maintained when its writes have stopped.
        """
        with self._changed:
            before = self._at_rest.get(collection)
            self._at_rest[collection] = now = time.monotonic() + seconds
            # If the new time is later than that of the last request, the thread wakes up at the earlier time, and reads
            # the new time then. So writes in quick succession do not wake it.
            if not self._closed and (before is None or now < before):
                self._notify()

    def _take(self) -> Maintained | float | None:
        soonest = next(iter(self._soon), None)
        if soonest is not None:
            del self._soon[soonest]
            return soonest
        soonest, now = min(self._at_rest, key=self._at_rest.__getitem__, default=None), time.monotonic()
        if soonest is None:
            return None
        if self._at_rest[soonest] > now:
            return self._at_rest[soonest] - now
        del self._at_rest[soonest]
        return soonest

    def _handle(self, collection: Maintained) -> None:
        try:
            collection.maintain()
        except ServiceError as error:
            # UNAVAILABLE and NOT_FOUND: closed or deleted meanwhile, so no maintenance is needed.
            if error.code not in (Code.UNAVAILABLE, Code.NOT_FOUND):
                log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
        except Exception:  # a failure in one collection must not stop the maintenance of others
            log.exception("collection %s: not maintained", collection.spec.name)
