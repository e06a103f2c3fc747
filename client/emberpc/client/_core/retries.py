"""When a call that failed is made again; nothing here does I/O.

gRPC can repeat calls by itself, but it repeats every call that ends as
UNAVAILABLE, also one whose connection breaks after minutes of work: the server
then does all of it again, and nobody is told. So this client repeats, and only
what failed soon.
"""

from __future__ import annotations

import random
from time import monotonic

from emberpc.client.exceptions import EmberpcError, Unavailable

#: Tries of one call.
_TRIES = 5
#: Seconds; a call that failed after more than these is not made again: its work may have been as long.
_SOON = 5.0
#: Pauses before the next try, in seconds: the first, and the longest that they grow to.
_PAUSES = (0.1, 2.0)


class Retries:
    """Counts the tries of one call, and the time that they take.

    Args:
        seconds: what all of them together may take.
        allowed: whether there may be more than one.

    Attributes:
        begun: when the present try began, as `monotonic` tells.
        ended: when it ended; None: not yet.
    """

    def __init__(self, seconds: float, *, allowed: bool) -> None:
        self._until = monotonic() + seconds
        self._tries_left = _TRIES if allowed else 1
        self._pause = _PAUSES[0]
        self.begun = monotonic()
        self.ended: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline; a try that begins at it fails at once."""
        return max(self._until - monotonic(), 0.001)

    @property
    def late(self) -> bool:
        """Whether the present try ended when it had run for long."""
        return (self.ended or monotonic()) - self.begun > _SOON

    def begin(self) -> int:
        """Begin the next try; return its number, which counts down."""
        self._tries_left -= 1
        self.begun = monotonic()
        self.ended = None
        return self._tries_left

    def end(self, number: int) -> None:
        """Take note that a try has ended; gRPC may say so when the next one has begun, and then it counts no more."""
        if self.ended is None and number == self._tries_left:
            self.ended = monotonic()

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next try after an error; None if there is none."""
        if not isinstance(error, Unavailable) or not self._tries_left or self.late:
            return None
        pause = self._pause * random.uniform(0.8, 1.2) if error.retry_after is None else error.retry_after  # noqa: S311
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None
