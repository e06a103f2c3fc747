"""What live searches find, held against the truth: a few of them are done again, exactly, when nobody waits for it."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np

from emberpc.server.collections.types import ProbeFigures, SearchOutcome, StoredRecord, Strategy
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.search.dense import Request

#: Searches that wait to be done again; what comes beyond is not probed.
_MOST_WAITING = 8
#: Hits of a search that is probed, at most.
_MOST_HITS = 100
#: Share of the time that probes may take.
_TIME_SHARE = 0.01
#: Probes that the recall is the mean of.
_LATEST = 256


class _Sample(NamedTuple):
    """A search of one query, what it found, and the number of the last write before it."""

    request: Request
    outcome: SearchOutcome
    sequence: int


class Probe:
    """Measures the recall of the searches of one collection. Safe to use from several threads.

    Args:
        share: of the searches, in [0, 1]; 0: none are probed.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._waiting: deque[_Sample] = deque()
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._count = 0
        self._rest_until = 0.0

    @property
    def figures(self) -> ProbeFigures:
        """What was measured so far."""
        with self._lock:
            return ProbeFigures(self._count, float(np.mean(self._latest)) if self._latest else float("nan"))

    def wants_one(self) -> bool:
        """Whether the search that begins now is to be probed."""
        return (
            random.random() < self._share  # noqa: S311 - a sample, no secret
            and monotonic() >= self._rest_until
            and len(self._waiting) < _MOST_WAITING
        )

    def offer(self, request: Request, outcomes: Sequence[SearchOutcome], sequence: int) -> bool:
        """Take a search to be done again; return whether there is one query of it that can be.

        Args:
            request: the search.
            outcomes: what it found.
            sequence: number of the last write before it.
        """
        for i, outcome in enumerate(outcomes):
            if outcome.plan.strategy is Strategy.HNSW and outcome.hits and request.top_k[i] <= _MOST_HITS:
                with self._lock:
                    self._waiting.append(_Sample(request.only([i]), outcome, sequence))
                return True
        return False

    def run(
        self,
        search: Callable[[Request], Sequence[SearchOutcome]],
        get: Callable[[Sequence[str]], dict[str, StoredRecord]],
    ) -> None:
        """Do again what waits, and rest for a hundred times as long as that took.

        Args:
            search: answers a request.
            get: returns the records of those ids that are there.
        """
        with self._lock:
            samples = [*self._waiting]
        if not samples:
            return
        start = monotonic()
        for sample in samples:
            # More than it asked for: what was written since must not take the place of what was there.
            again = sample.request._replace(top_k=[2 * sample.request.top_k[0] + 10], exact=True, with_vectors=False)
            (truth,) = search(again)
            try:
                found = _recall(sample, truth, get([record.id for record, _ in sample.outcome.hits]))
            except ServiceError as error:
                if error.code is not Code.DATA_LOSS:
                    raise
                found = None  # one of the hits was damaged meanwhile
            with self._lock:
                self._waiting.popleft()
                if found is not None:
                    self._latest.append(found)
                    self._count += 1
        self._rest_until = monotonic() + (monotonic() - start) / _TIME_SHARE


def _recall(sample: _Sample, truth: SearchOutcome, present: dict[str, StoredRecord]) -> float | None:
    """Return the share of what a search found that is right, by the records that are as they were; None if too few."""
    still = [
        score
        for record, score in sample.outcome.hits
        if record.revision <= sample.sequence
        and record.id in present
        and present[record.id].revision == record.revision
    ]
    best = [score for record, score in truth.hits if record.revision <= sample.sequence]
    if not still or len(best) < len(still):
        return None
    bound = best[len(still) - 1]
    # The same distance, computed twice, may differ in the last digits.
    return sum(score >= bound - 1e-5 * max(1e-3, abs(bound)) for score in still) / len(still)
