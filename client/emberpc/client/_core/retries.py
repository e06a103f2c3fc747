"""Decide whether a call that failed is retried. Nothing here does I/O.

gRPC's own retry policy repeats every call that ends with UNAVAILABLE, also a call whose connection breaks after
minutes of work. The server then repeats all the work, without any message. Therefore the client retries by itself,
and only calls that failed soon.
"""

from __future__ import annotations

import random
from time import monotonic

from emberpc.client.exceptions import EmberpcError, Unavailable

#: Tries of one call.
_TRIES = 5
#: Seconds. A call that failed after more than this is not retried, because its work may have taken as long.
_SOON = 5.0
#: Pauses before the next try, in seconds: the first, and the longest that they grow to.
_PAUSES = (0.1, 2.0)


class Retries:
    """Counts the tries of one call and the time that they take.

    Args:
        seconds: time that all tries together may take.
        allowed: whether the call may be retried.

    Attributes:
        begun: start of the present try, by `monotonic`.
        ended: end of the present try; None: it has not ended.
    """

    def __init__(self, seconds: float, *, allowed: bool) -> None:
        self._until = monotonic() + seconds
        self._tries_left = _TRIES if allowed else 1
        self._pause = _PAUSES[0]
        self.begun = monotonic()
        self.ended: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0.001: a try that starts at the deadline fails at once."""
        return max(self._until - monotonic(), 0.001)

    @property
    def late(self) -> bool:
        """Whether the present try ran for more than 5 seconds."""
        return (self.ended or monotonic()) - self.begun > _SOON

    def begin(self) -> int:
        """Start the next try and return its number, which counts down."""
        self._tries_left -= 1
        self.begun = monotonic()
        self.ended = None
        return self._tries_left

    def end(self, number: int) -> None:
        """Record the end of a try. Ignored if the next try has started, since gRPC may report the end late."""
        if self.ended is None and number == self._tries_left:
            self.ended = monotonic()

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next try; None if the call is not retried."""
        if not isinstance(error, Unavailable) or not self._tries_left or self.late:
            return None
        pause = self._pause * random.uniform(0.8, 1.2) if error.retry_after is None else error.retry_after  # noqa: S311
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None
