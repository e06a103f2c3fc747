"""Measure the throughput of a worker in tokens per second: the usual rate, and the best rate."""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median

#: Number of the last measured batches; the usual rate is the median of their rates. One slow or fast batch does not
#: change a median much.
_RATE_BATCHES = 9
#: Number of batches that must be measured before a call may be refused because of its deadline.
_MIN_BATCHES = 3
#: Number of batches of a period. The best rate is that of the fastest batch of the current and the previous period.
#: Older batches do not count: a host may become permanently slower.
_BEST_BATCHES = 1000
#: Assumed tokens per second of one worker before the first measurement, for the metrics and for estimates of when to
#: retry. No call is refused because of it.
_FIRST_RATE = 2000.0


class Rates:
    """Measured tokens per second of one worker. Not thread-safe.

    `usual` is the median rate of the last measured batches, at most 9; 2000 before the first.
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_RATE_BATCHES)
        #: Fastest rates, in tokens per second, of the current and the previous period of `_BEST_BATCHES` batches, and
        #: the number of batches of the current period so far.
        self._fastest, self._fastest_before, self._counted = 0.0, 0.0, 0
        self.usual = _FIRST_RATE

    @property
    def measured(self) -> bool:
        """Whether enough batches, 3, were measured to refuse a call because of its deadline."""
        return len(self._latest) >= _MIN_BATCHES

    @property
    def best(self) -> float:
        """Tokens per second of the fastest batch of the current and the previous period of 1000 batches.

        Infinite before 3 batches were measured.
        """
        return max(self._fastest, self._fastest_before) if self.measured else inf

    def add(self, rate: float) -> None:
        """Add the rate of a batch, in tokens per second, to `usual` and `best`."""
        self._latest.append(rate)
        self.usual = median(self._latest)
        if self._counted >= _BEST_BATCHES:
            self._fastest, self._fastest_before, self._counted = 0.0, self._fastest, 0
        self._fastest = max(self._fastest, rate)
        self._counted += 1
