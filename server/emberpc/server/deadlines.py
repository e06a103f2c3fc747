"""A deadline that several waits, one after another, share."""

from __future__ import annotations

import threading
from math import inf
from time import monotonic


class Deadline:
    """The moment by which several waits, one after another, must end.

    Args:
        seconds: seconds from now until the deadline; infinity: no deadline.
    """

    def __init__(self, seconds: float = inf) -> None:
        self._end = monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; 0 after the deadline.

        At most `threading.TIMEOUT_MAX`, the longest timeout that locks accept.
        """
        return min(max(self._end - monotonic(), 0.0), threading.TIMEOUT_MAX)

    def join(self, thread: threading.Thread) -> bool:
        """Wait until a thread ends, or until the deadline; return whether the thread has ended."""
        thread.join(self.seconds_left)
        return not thread.is_alive()
