"""A deadline that several waits share."""

from __future__ import annotations

import threading
from math import inf
from time import monotonic


class Deadline:
    """The moment by which several waits, one after another, must end.

    Args:
        seconds: seconds from now until the deadline; infinite for no deadline.
    """

    def __init__(self, seconds: float = inf) -> None:
        self._end = monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, and 0 after it.

        At most `threading.TIMEOUT_MAX`, the longest timeout of a lock.
        """
        return min(max(self._end - monotonic(), 0.0), threading.TIMEOUT_MAX)

    def join(self, thread: threading.Thread) -> bool:
        """Wait for a thread to end; return whether it ended by the deadline."""
        thread.join(self.seconds_left)
        return not thread.is_alive()
