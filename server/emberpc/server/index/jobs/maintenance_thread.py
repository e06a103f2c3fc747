"""The thread that runs the maintenance of collections in the background."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)


class Maintained(Protocol):
    """A collection that needs maintenance."""

    spec: CollectionSpec

    def maintain(self) -> None:
        """Run the maintenance that is due."""


class MaintenanceThread:
    """Calls `maintain` of the collections that request it, one after the other, on one thread.

    The thread starts when it is first needed, and then sleeps until it is needed again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Collections to be maintained soon, in order; many writes of a collection are one entry.
        self._soon: dict[Maintained, None] = {}
        #: When each of the other collections is due, by the monotonic clock, unless it is written to before.
        self._at_rest: dict[Maintained, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake(self, collection: Maintained) -> None:
        """Request the maintenance of a collection as soon as possible."""
        with self._changed:
            if not self._closed and collection not in self._soon:
                self._soon[collection] = None
                self._notify_thread()

    def wake_at_rest(self, collection: Maintained, seconds: float) -> None:
        """Request the maintenance of a collection after some seconds, unless this is called for it again before."""
        with self._changed:
            known = collection in self._at_rest
            self._at_rest[collection] = time.monotonic() + seconds
            # If the time of a known collection moved, the thread notices when it wakes up at the old time.
            if not self._closed and not known:
                self._notify_thread()

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the present collection; close the collections first, so that this is short.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or (deadline or Deadline()).join(self._thread)

    def _notify_thread(self) -> None:
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="index-maintenance", daemon=True)
            self._thread.start()

    def _next(self) -> Maintained | None:
        """Wait until a collection is due and return it; None after `close`."""
        with self._changed:
            while not self._closed:
                soonest = next(iter(self._soon), None)
                if soonest is not None:
                    del self._soon[soonest]
                    return soonest
                soonest, now = min(self._at_rest, key=self._at_rest.__getitem__, default=None), time.monotonic()
                if soonest is not None and self._at_rest[soonest] <= now:
                    del self._at_rest[soonest]
                    return soonest
                self._changed.wait(None if soonest is None else self._at_rest[soonest] - now)
        return None

    def _run(self) -> None:
        while (collection := self._next()) is not None:
            try:
                collection.maintain()
            except ServiceError as error:
                # Closed or deleted meanwhile: no maintenance is needed.
                if error.code not in (Code.UNAVAILABLE, Code.NOT_FOUND):
                    log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
            except Exception:  # a failure in one collection must not stop the maintenance of others
                log.exception("collection %s: not maintained", collection.spec.name)
