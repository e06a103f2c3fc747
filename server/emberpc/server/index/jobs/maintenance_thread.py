"""Run the maintenance of collections in a background thread."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.jobs.background_thread import BackgroundThread

log = logging.getLogger(__name__)


class Maintained(Protocol):
    """A collection that needs maintenance."""

    spec: CollectionSpec

    def maintain(self) -> None:
        """Run the maintenance that is due.

        Raises:
            ServiceError: UNAVAILABLE or NOT_FOUND if the collection was closed or deleted; other codes if it failed.
        """


class MaintenanceThread(BackgroundThread[Maintained]):
    """A thread that calls `maintain` of the collections that request maintenance, one after the other.

    Errors are logged, except those of a collection that was closed or deleted. Close the collections before the thread:
    a closed collection ends its maintenance soon, and `close` of the thread waits for this.
    """

    def __init__(self) -> None:
        super().__init__("index-maintenance")
        #: Collections to maintain as soon as possible, in the order of their requests. Several requests of a collection
        #: are one entry.
        self._soon: dict[Maintained, None] = {}
        #: When to maintain a collection for which `wake_at_rest` was called, in seconds of `time.monotonic`.
        self._at_rest: dict[Maintained, float] = {}

    def wake(self, collection: Maintained) -> None:
        """Request the maintenance of a collection as soon as possible."""
        with self._changed:
            if not self._closed and collection not in self._soon:
                self._soon[collection] = None
                self._notify()

    def wake_at_rest(self, collection: Maintained, seconds: float) -> None:
        """Request the maintenance of a collection `seconds` from now.

        A new request replaces the time of an earlier one, so a collection can be maintained when writes have stopped.
        """
        with self._changed:
            known = collection in self._at_rest
            self._at_rest[collection] = time.monotonic() + seconds
            # For a collection with an earlier request, the thread wakes up at the old time, and reads the new time
            # then.
            if not self._closed and not known:
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
            # Closed or deleted meanwhile: no maintenance is needed.
            if error.code not in (Code.UNAVAILABLE, Code.NOT_FOUND):
                log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
        except Exception:  # a failure in one collection must not stop the maintenance of others
            log.exception("collection %s: not maintained", collection.spec.name)
