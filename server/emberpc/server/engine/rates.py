"""How fast the workers are: the rate to estimate by, and the best rate seen."""

from __future__ import annotations

from collections import deque
from math import inf
from statistics import median

#: Batches whose median is the rate that calls are refused by. One slow or fast batch does not move a median.
_RATE_BATCHES = 9
#: Batches to measure before a call is refused for want of time.
_LEAST_BATCHES = 3
#: Batches of which the fastest is the best rate. Older ones are forgotten, since a host may become slower for good.
_BEST_BATCHES = 1000
#: Tokens per second assumed of one worker until one is measured; no call is refused by it for want of time.
_FIRST_RATE = 2000.0


class Rates:
    """Tokens per second of one worker, as measured. Not thread-safe."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_RATE_BATCHES)
        #: The fastest of the batches counted, and of those that were counted before.
        self._fastest, self._fastest_before, self._counted = 0.0, 0.0, 0
        self.usual = _FIRST_RATE

    @property
    def measured(self) -> bool:
        """Whether enough batches were measured to refuse a call for want of time."""
        return len(self._latest) >= _LEAST_BATCHES

    @property
    def best(self) -> float:
        """The rate of the fastest batch, which no estimate may exceed; infinite until enough were measured."""
        return max(self._fastest, self._fastest_before) if self.measured else inf

    def add(self, rate: float) -> None:
        """Take in the rate of a batch."""
        self._latest.append(rate)
        self.usual = median(self._latest)
        if self._counted >= _BEST_BATCHES:
            self._fastest, self._fastest_before, self._counted = 0.0, self._fastest, 0
        self._fastest = max(self._fastest, rate)
        self._counted += 1
