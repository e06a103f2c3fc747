"""The thread that does for the collections what need not be done before an answer."""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.collection import Collection

log = logging.getLogger(__name__)


class Maintainer:
    """Calls `maintain` of the collections that ask for it, one after the other, on one thread.

    The thread starts when it is first needed, and sleeps until it is needed again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: SimpleQueue[Collection | None] = SimpleQueue()
        #: What is in the queue: many writes of a collection are one piece of work.
        self._queued: set[Collection] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake(self, collection: Collection) -> None:
        """Have a collection maintained soon."""
        with self._lock:
            if self._closed or collection in self._queued:
                return
            self._queued.add(collection)
            self._work.put(collection)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="index-maintenance", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop the thread after the collection that it is at; close the collections first, so that it is short."""
        with self._lock:
            self._closed = True
            self._work.put(None)
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (collection := self._work.get()) is not None:
            with self._lock:
                self._queued.discard(collection)
            try:
                collection.maintain()
            except ServiceError as error:
                # Closed or deleted in the meantime: there is nothing left to do.
                if error.code not in (Code.UNAVAILABLE, Code.NOT_FOUND):
                    log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
            except Exception:  # one bad collection must not keep the others from being maintained
                log.exception("collection %s: not maintained", collection.spec.name)
