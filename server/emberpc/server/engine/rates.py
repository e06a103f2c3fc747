"""Measure the throughput of the workers: the usual rate, and the best rate."""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median

#: Number of last batches whose median is the usual rate. A median does not follow one slow or fast batch.
_RATE_BATCHES = 9
#: Number of measured batches before a call is refused because of its deadline.
_LEAST_BATCHES = 3
#: Number of batches whose fastest gives the best rate. Older batches do not count: a host may become permanently
#: slower.
_BEST_BATCHES = 1000
#: Assumed tokens per second of one worker before the first measurement; no call is refused because of it.
_FIRST_RATE = 2000.0


class Rates:
    """Measured tokens per second of one worker. Not thread-safe."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_RATE_BATCHES)
        #: Fastest rate of the present period of `_BEST_BATCHES` batches, and of the period before; batches so far.
        self._fastest, self._fastest_before, self._counted = 0.0, 0.0, 0
        self.usual = _FIRST_RATE

    @property
    def measured(self) -> bool:
        """Whether enough batches were measured to refuse a call because of its deadline."""
        return len(self._latest) >= _LEAST_BATCHES

    @property
    def best(self) -> float:
        """Rate of the fastest batch; infinite before enough batches were measured."""
        return max(self._fastest, self._fastest_before) if self.measured else inf

    def add(self, rate: float) -> None:
        """Add the tokens per second of a batch."""
        self._latest.append(rate)
        self.usual = median(self._latest)
        if self._counted >= _BEST_BATCHES:
            self._fastest, self._fastest_before, self._counted = 0.0, self._fastest, 0
        self._fastest = max(self._fastest, rate)
        self._counted += 1
