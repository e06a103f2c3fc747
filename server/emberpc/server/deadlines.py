"""A moment that several waits share."""

from __future__ import annotations

import threading
from math import inf
from time import monotonic


class Deadline:
    """The moment by which several waits, one after the other, have to end.

    Args:
        seconds: from now; infinite: never.
    """

    def __init__(self, seconds: float = inf) -> None:
        self._end = monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, 0 once it has passed; at most what a lock's timeout takes."""
        return min(max(self._end - monotonic(), 0.0), threading.TIMEOUT_MAX)

    def join(self, thread: threading.Thread) -> bool:
        """Wait for a thread to end; return whether it ended by the deadline."""
        thread.join(self.seconds_left)
        return not thread.is_alive()
