"""Search in a collection: from prepared queries to records that are there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emberpc.server.index.metric import nearest, prepare
from emberpc.server.index.neighbours import Neighbours
from emberpc.server.index.store import Store
from emberpc.server.index.types import Distance, Matrix, Plan, SearchOutcome, StoredRecord, Strategy

log = logging.getLogger(__name__)

_SCAN_BATCH = 4000


@dataclass(frozen=True)
class Request:
    """Prepared queries, float32 (queries, dimensions), and for each how many hits and which id to leave out."""

    queries: Matrix
    top_k: Sequence[int]
    exclude: Sequence[str | None]
    ef: int
    with_vectors: bool
    #: Whether every vector is to be compared, whatever the graph could tell.
    exact: bool = False

    @property
    def candidates(self) -> int:
        """How many to look for: one more than hits, since one may be left out."""
        return max(self.top_k) + 1

    def only(self, rows: Sequence[int]) -> Request:
        """Return the request for some of the queries."""
        return replace(
            self,
            queries=self.queries[list(rows)],
            top_k=[self.top_k[i] for i in rows],
            exclude=[self.exclude[i] for i in rows],
        )


#: Answers each query of a request, or None where it cannot.
Answer = Callable[[Request], Sequence[SearchOutcome | None]]


class Searcher:
    """Answers requests from memory, or from the store where memory cannot tell.

    Args:
        store: the truth.
        neighbours: the vectors in memory.
        write_lock: held by every write, from before the store has it until memory has it too.
        distance: how vectors compare.
    """

    def __init__(self, store: Store, neighbours: Neighbours, write_lock: threading.Lock, distance: Distance) -> None:
        self._store = store
        self._neighbours = neighbours
        self._write_lock = write_lock
        self._distance = distance

    def search(self, request: Request) -> list[SearchOutcome]:
        """Answer every query of a request."""
        outcomes: list[SearchOutcome | None] = [None] * len(request.queries)
        if request.exact:
            _fill(outcomes, request, self._scan)
            return [outcome for outcome in outcomes if outcome is not None]
        _fill(outcomes, request, self._look_up)
        if None in outcomes:
            # A write came between memory and store. With writes held off they agree.
            with self._write_lock:
                _fill(outcomes, request, self._look_up)
        if None in outcomes:
            log.error("memory and store disagree; answering from the store")
            _fill(outcomes, request, self._scan)
        return [outcome for outcome in outcomes if outcome is not None]

    def _look_up(self, request: Request) -> list[SearchOutcome | None]:
        """Answer from memory; None where the store has no more what memory found."""
        found = self._neighbours.search(request.queries, request.candidates, request.ef)
        labels = sorted({label for each in found if each for label in each.labels})
        records = self._store.by_label(labels, with_vectors=request.with_vectors)
        outcomes = [
            _outcome(each.labels, each.scores, records, k, exclude, each.plan, complete=each.complete) if each else None
            for each, k, exclude in zip(found, request.top_k, request.exclude, strict=True)
        ]
        untold = [i for i, each in enumerate(found) if each is None]
        if untold:
            for i, outcome in zip(untold, self._scan(request.only(untold)), strict=True):
                outcomes[i] = outcome
        return outcomes

    def _scan(self, request: Request) -> list[SearchOutcome | None]:
        """Compare the queries with every vector in the store: slow and right, whatever the state of memory."""
        k = request.candidates
        labels = np.empty((len(request.queries), 0), dtype=np.int64)
        scores = np.empty((len(request.queries), 0), dtype=np.float32)
        total = 0
        with self._store.snapshot():
            for batch, vectors in self._store.scan(_SCAN_BATCH):
                total += len(batch)
                rows, found = nearest(request.queries, prepare(vectors, self._distance), k, self._distance)
                labels, scores = np.hstack([labels, batch[rows]]), np.hstack([scores, found])
                order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
                labels, scores = np.take_along_axis(labels, order, axis=1), np.take_along_axis(scores, order, axis=1)
            records = self._store.by_label(np.unique(labels).tolist(), with_vectors=request.with_vectors)
        plan = Plan(Strategy.EXACT, 0, total)
        return [
            _outcome(
                labels[i].tolist(),
                scores[i].tolist(),
                records,
                request.top_k[i],
                request.exclude[i],
                plan,
                complete=total <= k,
            )
            for i in range(len(request.queries))
        ]


def _fill(outcomes: list[SearchOutcome | None], request: Request, answer: Answer) -> None:
    """Answer the queries that are not answered yet."""
    rows = [i for i, outcome in enumerate(outcomes) if outcome is None]
    for i, outcome in zip(rows, answer(request.only(rows)), strict=True):
        outcomes[i] = outcome


def _outcome(
    labels: Sequence[int],
    scores: Sequence[float],
    records: dict[int, StoredRecord],
    k: int,
    exclude: str | None,
    plan: Plan,
    *,
    complete: bool,
) -> SearchOutcome | None:
    """Turn candidates, nearest first, into hits; None if one is gone, or they are too few and there are more."""
    hits: list[tuple[StoredRecord, float]] = []
    left_out = False
    for label, score in zip(labels, scores, strict=True):
        if len(hits) == k:
            break
        record = records.get(label)
        if record is None:
            return None
        if record.id == exclude:
            left_out = True
        else:
            hits.append((record, score))
    if len(hits) == k:
        return SearchOutcome(hits, plan)
    if not complete:
        return None
    total = len(labels)
    reason = f"the collection holds {total} record{'' if total == 1 else 's'}"
    return SearchOutcome(
        hits, replace(plan, shortfall_reason=f"{reason}, the record asked about left out" if left_out else reason)
    )
