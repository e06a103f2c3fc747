"""Decide whether a call that failed is retried. Nothing here does I/O.

gRPC's own retry policy repeats every call that ends with UNAVAILABLE, also a call whose connection breaks after
minutes of work. The server then does all the work a second time, and the caller learns nothing of it. Therefore the
client retries by itself, and only after a try that failed within 5 seconds.
"""

from __future__ import annotations

import random
from time import monotonic

from emberpc.client.exceptions import EmberpcError, Unavailable

#: Maximum number of tries of one call, the first included.
_TRIES = 5
#: A call is retried only if the failed try ran for at most this many seconds. After a longer run, a retry might repeat
#: work that takes as long.
_SOON = 5.0
#: Pauses before the next try, in seconds: the first pause, and the longest. A pause is twice the one before, up to the
#: longest. The client waits for the pause times a random factor from 0.8 to 1.2, so that many clients do not retry at
#: the same moments.
_PAUSES = (0.1, 2.0)


class Retries:
    """Counts the tries of one call and the time that they take.

    Args:
        seconds: time that all tries and pauses together may take, from now on.
        allowed: whether the call may be retried. If not, it has one try.

    Attributes:
        begun: start of the latest try, in seconds of `time.monotonic`.
        ended: end of the latest try, in seconds of `time.monotonic`; None: no end is recorded.
    """

    def __init__(self, seconds: float, *, allowed: bool) -> None:
        self._until = monotonic() + seconds
        self._tries_left = _TRIES if allowed else 1
        self._pause = _PAUSES[0]
        self.begun = monotonic()
        self.ended: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0.001. With 0.001, a try after the deadline fails at once."""
        return max(self._until - monotonic(), 0.001)

    @property
    def late(self) -> bool:
        """Whether the latest try ran for more than 5 seconds, until its recorded end or else until now."""
        return (self.ended or monotonic()) - self.begun > _SOON

    def begin(self) -> int:
        """Start the next try and return the number of tries that remain after it, which identifies the try."""
        self._tries_left -= 1
        self.begun = monotonic()
        self.ended = None
        return self._tries_left

    def end(self, number: int) -> None:
        """Record the end of the try that `begin` returned `number` for.

        gRPC may report the end only after the next try has started. Then the end is ignored, and so is a second end of
        the same try.
        """
        if self.ended is None and number == self._tries_left:
            self.ended = monotonic()

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next try: those that the server stated in `error`, else a random pause.

        Call this once for each failed try, since the next random pause is then twice as long, up to the limit of
        `_PAUSES`.

        None: the call is not retried, since `error` is not Unavailable, no tries remain, the try ran for more than
        5 seconds, or the pause would last until the deadline.
        """
        if not isinstance(error, Unavailable) or not self._tries_left or self.late:
            return None
        pause = self._pause * random.uniform(0.8, 1.2) if error.retry_after is None else error.retry_after  # noqa: S311
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None
