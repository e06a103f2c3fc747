"""The thread that does for the collections what need not be done before an answer."""

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
        """Do the maintenance that is due."""


class Maintainer:
    """Calls `maintain` of the collections that ask for it, one after the other, on one thread.

    The thread starts when it is first needed, and sleeps until it is needed again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Those to be maintained soon, in order: many writes of a collection are one piece of work.
        self._soon: dict[Maintained, None] = {}
        #: When each of the others is, by the monotonic clock, unless it is written to before.
        self._at_rest: dict[Maintained, float] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake(self, collection: Maintained) -> None:
        """Have a collection maintained soon."""
        with self._changed:
            if not self._closed and collection not in self._soon:
                self._soon[collection] = None
                self._stir()

    def wake_at_rest(self, collection: Maintained, seconds: float) -> None:
        """Have a collection maintained when this was not said again of it for so many seconds."""
        with self._changed:
            known = collection in self._at_rest
            self._at_rest[collection] = time.monotonic() + seconds
            # The thread that waits for the moment before sees then that it has moved.
            if not self._closed and not known:
                self._stir()

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the thread after the collection that it is at; close the collections first, so that it is short.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        return self._thread is None or (deadline or Deadline()).join(self._thread)

    def _stir(self) -> None:
        self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="index-maintenance", daemon=True)
            self._thread.start()

    def _next(self) -> Maintained | None:
        """Wait until a collection is to be maintained and return it; None at the end."""
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
                # Closed or deleted in the meantime: there is nothing left to do.
                if error.code not in (Code.UNAVAILABLE, Code.NOT_FOUND):
                    log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
            except Exception:  # one bad collection must not keep the others from being maintained
                log.exception("collection %s: not maintained", collection.spec.name)
