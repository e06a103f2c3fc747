"""Measure the recall of live searches: the maintenance thread repeats some of them exactly and compares the hits."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

import numpy as np

from emberpc.server.collections.types import ProbeFigures, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.search.dense import DenseRequest

#: While this many searches wait for their exact repetition, no further search is chosen. Searches that were chosen
#: before and end later wait too.
_MAX_WAITING = 8
#: Greatest top_k of a query that is repeated.
_MAX_HITS = 100
#: Share of the time that the exact repetitions of a collection may take: after a run, no search is chosen for as long
#: as the run took, divided by this share.
_TIME_SHARE = 0.01
#: Number of latest measured searches of which the mean recall is reported.
_LATEST = 256


class _ProbedSearch(NamedTuple):
    """A search of one query, its outcome, and the sequence of the last write before the search."""

    request: DenseRequest
    outcome: SearchOutcome
    sequence: int


class Probe:
    """Measures the recall of the searches of one collection. Safe to use from several threads.

    Only `run` must not be called by two threads at the same time.

    Args:
        share: probability, in [0, 1], with which a search is chosen for a repetition; 0: none is.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._waiting: deque[_ProbedSearch] = deque()
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._count = 0
        self._rest_until = 0.0

    @property
    def figures(self) -> ProbeFigures:
        """Number of searches whose recall was measured so far, and the mean recall of the latest 256; NaN if none."""
        with self._lock:
            return ProbeFigures(self._count, float(np.mean(self._latest)) if self._latest else float("nan"))

    def should_sample(self) -> bool:
        """Return whether to probe the search that begins now: if so, its outcomes are to be passed to `offer`.

        The choice is random, with the probability that the constructor got. No search is chosen while eight or more
        wait for their repetition. After a `run` that repeated searches, none is chosen for a hundred times as long as
        the run took.
        """
        return (
            random.random() < self._share  # noqa: S311 - a sample, no secret
            and monotonic() >= self._rest_until
            and len(self._waiting) < _MAX_WAITING
        )

    def offer(self, request: DenseRequest, outcomes: Sequence[SearchOutcome], sequence: int) -> bool:
        """Queue one query of a search for exact repetition.

        It is the first query that the graph answered, that has a hit, and whose top_k is at most 100.

        Args:
            request: the search, without filters.
            outcomes: the outcome of each query.
            sequence: sequence of the last write before the search.

        Returns:
            Whether a query was queued.
        """
        for i, outcome in enumerate(outcomes):
            if outcome.plan.strategy is SearchStrategy.HNSW and outcome.hits and request.top_k[i] <= _MAX_HITS:
                with self._lock:
                    self._waiting.append(_ProbedSearch(request.subset([i]), outcome, sequence))
                return True
        return False

    def run(
        self,
        search: Callable[[DenseRequest], Sequence[SearchOutcome]],
        get: Callable[[Sequence[str]], dict[str, StoredRecord]],
    ) -> None:
        """Repeat the queued searches exactly, and add their recall to the figures; one thread at a time.

        After that, no search is chosen for a hundred times as long as the repetitions took. A search adds nothing to
        the figures if a hit is damaged now, or `_recall` returns None. After an error, the search that failed and those
        behind it stay in the queue for the next call.

        Args:
            search: returns the outcome of each query of a request.
            get: returns the existing records among ids, by id; raises DATA_LOSS if one of them is damaged.

        Raises:
            ServiceError: an error of `search`, or an error of `get` other than DATA_LOSS.
        """
        with self._lock:
            samples = [*self._waiting]
        if not samples:
            return
        start = monotonic()
        for sample in samples:
            # More hits than the search had: records that were written after the search may be hits of the repetition,
            # and do not count.
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


def _recall(sample: _ProbedSearch, truth: SearchOutcome, present: dict[str, StoredRecord]) -> float | None:
    """Return the recall of a sample: the share of its n unchanged hits with at least the score of the n-th exact hit.

    Hits whose records were written after the write `sample.sequence`, or deleted, do not count, neither in the sample
    nor in the exact repetition. Scores that differ only by rounding count as equal.

    Args:
        sample: the search, with its hits.
        truth: the outcome of the exact repetition.
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
