"""Recall of live searches: a sample is repeated exactly by the maintenance thread, and the hits are compared."""

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
from emberpc.server.index.search.dense import DenseRequest

#: Searches that may wait for their repetition; further ones are not probed.
_MOST_WAITING = 8
#: Limit of the top_k of a probed search.
_MOST_HITS = 100
#: Share of the time that probes may take.
_TIME_SHARE = 0.01
#: Latest probes whose mean is the recall.
_LATEST = 256


class _Sample(NamedTuple):
    """A search of one query, its outcome, and the sequence of the last write before it."""

    request: DenseRequest
    outcome: SearchOutcome
    sequence: int


class Probe:
    """Measures the recall of the searches of one collection. Safe to use from several threads.

    Args:
        share: share of the searches to probe, in [0, 1]; 0: none.
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
        """Figures of the probes so far."""
        with self._lock:
            return ProbeFigures(self._count, float(np.mean(self._latest)) if self._latest else float("nan"))

    def should_sample(self) -> bool:
        """Return whether the search that begins now should be probed."""
        return (
            random.random() < self._share  # noqa: S311 - a sample, no secret
            and monotonic() >= self._rest_until
            and len(self._waiting) < _MOST_WAITING
        )

    def offer(self, request: DenseRequest, outcomes: Sequence[SearchOutcome], sequence: int) -> bool:
        """Queue a search for repetition; return whether it has a query that can be probed.

        Args:
            request: the search.
            outcomes: its outcomes.
            sequence: sequence of the last write before it.
        """
        for i, outcome in enumerate(outcomes):
            if outcome.plan.strategy is Strategy.HNSW and outcome.hits and request.top_k[i] <= _MOST_HITS:
                with self._lock:
                    self._waiting.append(_Sample(request.subset([i]), outcome, sequence))
                return True
        return False

    def run(
        self,
        search: Callable[[DenseRequest], Sequence[SearchOutcome]],
        get: Callable[[Sequence[str]], dict[str, StoredRecord]],
    ) -> None:
        """Repeat the queued searches exactly, then pause for a hundred times as long as that took.

        Args:
            search: answers a request.
            get: returns the existing records among ids.
        """
        with self._lock:
            samples = [*self._waiting]
        if not samples:
            return
        start = monotonic()
        for sample in samples:
            # More hits than the search had, so that later records do not displace the earlier ones.
            again = sample.request._replace(top_k=[2 * sample.request.top_k[0] + 10], exact=True, with_vectors=False)
            (truth,) = search(again)
            try:
                found = _recall(sample, truth, get([record.id for record, _ in sample.outcome.hits]))
            except ServiceError as error:
                if error.code is not Code.DATA_LOSS:
                    raise
                found = None  # a hit was damaged meanwhile
            with self._lock:
                self._waiting.popleft()
                if found is not None:
                    self._latest.append(found)
                    self._count += 1
        self._rest_until = monotonic() + (monotonic() - start) / _TIME_SHARE


def _recall(sample: _Sample, truth: SearchOutcome, present: dict[str, StoredRecord]) -> float | None:
    """Return the share of unchanged hits that are among the exact ones; None if too few records are unchanged."""
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
    # The same distance computed in two ways may differ in the last digits.
    return sum(score >= bound - 1e-5 * max(1e-3, abs(bound)) for score in still) / len(still)
