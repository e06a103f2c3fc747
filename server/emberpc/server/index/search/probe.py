"""Measure the recall of live searches: the maintenance thread repeats some of them exactly and compares the hits."""

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

#: While this many searches wait for their exact repetition, no further search is chosen. Searches that were chosen
#: before and end later wait too.
_MOST_WAITING = 8
#: Greatest top_k of a search that is probed.
_MOST_HITS = 100
#: Share of the time that exact repetitions may take.
_TIME_SHARE = 0.01
#: Number of latest probes of which the mean recall is reported.
_LATEST = 256


class _Sample(NamedTuple):
    """A search of one query, its outcome, and the sequence of the last write before the search."""

    request: DenseRequest
    outcome: SearchOutcome
    sequence: int


class Probe:
    """Measures the recall of the searches of one collection. Safe to use from several threads, except `run`.

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
        """Number of probes so far, and the mean recall of the latest 256; NaN before the first."""
        with self._lock:
            return ProbeFigures(self._count, float(np.mean(self._latest)) if self._latest else float("nan"))

    def should_sample(self) -> bool:
        """Return whether to probe the search that begins now.

        The choice is random, with the probability that the constructor got. No search is chosen while eight wait for
        their repetition, or for a hundred times as long as the last repetitions took.
        """
        return (
            random.random() < self._share  # noqa: S311 - a sample, no secret
            and monotonic() >= self._rest_until
            and len(self._waiting) < _MOST_WAITING
        )

    def offer(self, request: DenseRequest, outcomes: Sequence[SearchOutcome], sequence: int) -> bool:
        """Queue a query of a search for exact repetition: the first that the graph answered, with a hit.

        Queries with a top_k above 100 are left out.

        Args:
            request: the search, without filters.
            outcomes: the outcome of each query.
            sequence: sequence of the last write before the search.

        Returns:
            Whether a query was queued.
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
        """Repeat the queued searches exactly, and add their recall to the figures; one thread at a time.

        After that, no search is probed for a hundred times as long as the repetitions took. Hits that were written or
        deleted since the search do not count; nor does a search with a hit that is damaged now, or for which `_recall`
        returns None. After an error, the search is repeated again at the next call.

        Args:
            search: returns the outcome of each query of a request.
            get: returns the existing records among ids.

        Raises:
            ServiceError: an error of `search`, or an error of `get` other than DATA_LOSS.
        """
        with self._lock:
            samples = [*self._waiting]
        if not samples:
            return
        start = monotonic()
        for sample in samples:
            # More hits than the search had, since records written after the search do not count, but may be hits.
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
    """Return the recall of a sample: the share of its n unchanged hits that score as high as the n-th exact hit.

    Hits that were written or deleted after the search do not count, in the sample and in the exact repetition.

    Args:
        sample: the search, with its hits.
        truth: hits of the exact repetition.
        present: the records of the sample's hits that still exist, by id.

    Returns:
        The share, 0 to 1; None if no hit is unchanged, or `truth` has fewer unchanged hits than the sample.
    """
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
    # Graph and exact search compute the same score in two ways, which may differ in the last digits.
    return sum(score >= bound - 1e-5 * max(1e-3, abs(bound)) for score in still) / len(still)
