"""The maintenance thread runs when the first collection is due."""

from __future__ import annotations

import threading
from contextlib import closing

from emberpc.server.collections import CollectionSpec
from emberpc.server.index.jobs.maintenance_thread import Maintained, MaintenanceThread


class Watched(MaintenanceThread):
    """Sets an event when the thread has looked for collections that are due."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Event()

    def _take(self) -> Maintained | float | None:
        self.looked.set()
        return super()._take()


class Resting:
    """A collection that notes its maintenance."""

    spec = CollectionSpec("c", 1)

    def __init__(self) -> None:
        self.maintained = threading.Event()

    def maintain(self) -> None:
        self.maintained.set()


def test_an_earlier_maintenance_request_replaces_a_later_one() -> None:
    with closing(Watched()) as thread:
        collection = Resting()
        thread.wake_at_rest(collection, 3600)
        assert thread.looked.wait(300)
        # The thread holds its lock from the look until it waits, so it waits when the next request gets the lock.
        thread.wake_at_rest(collection, 0)
        assert collection.maintained.wait(300)
