"""Search in a collection: from prepared queries to records that are there, and that meet a condition if there is one.

Few records that meet it are compared one by one; where there are many, the graph
is searched for more candidates, until enough of them meet it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import NamedTuple

import numpy as np

from emberpc.server import cancellation
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Distance, Labels, Matrix, Plan, SearchOutcome, StoredRecord, Strategy
from emberpc.server.index.graph.neighbours import Candidates, Neighbours
from emberpc.server.index.search.filtered import Selection, Selector
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)

_SCAN_BATCH = 4000
#: So many matching vectors are compared one by one for each candidate that the graph search would have to keep. Either
#: takes some 3 µs where the vectors must be read from the store.
_VECTORS_PER_CANDIDATE = 2
#: So few are always compared one by one, and kept in memory to be compared again.
_FEW = 1000
#: A search of the graph that found too few that match keeps so many times the candidates the next time.
_WIDER = 4
#: Checking a vector after it was compared takes as long as checking this many vectors while they are read.
_CHECKS_PER_HIT = 6
#: Times that a search which a write came across is done before it holds writes off.
_TRIES = 8


class Request(NamedTuple):
    """Prepared queries, float32 (queries, dimensions), and for each how many hits and which id to leave out."""

    queries: Matrix
    top_k: Sequence[int]
    exclude: Sequence[str | None]
    ef: int
    with_vectors: bool
    conditions: Sequence[Clause | None]
    #: Whether every vector is to be compared, whatever the graph could tell.
    exact: bool = False

    @property
    def candidates(self) -> int:
        """How many to look for: one more than hits if one may be left out."""
        return max(self.top_k) + any(each is not None for each in self.exclude)

    def only(self, rows: Sequence[int]) -> Request:
        """Return the request for some of the queries."""
        if len(rows) == len(self.queries):
            return self
        return self._replace(
            queries=self.queries[list(rows)],
            top_k=[self.top_k[i] for i in rows],
            exclude=[self.exclude[i] for i in rows],
            conditions=[self.conditions[i] for i in rows],
        )


#: Answers each query of a request, or None where it cannot.
Answer = Callable[[Request], Sequence[SearchOutcome | None]]


class DenseSearcher:
    """Answers requests from memory, or from the store where memory cannot tell.

    Args:
        store: the truth.
        neighbours: the vectors in memory.
        selector: which records meet a condition.
        write_lock: held by every write, from before the store has it until memory has it too.
        distance: how vectors compare.
    """

    def __init__(
        self,
        store: Store,
        neighbours: Neighbours,
        selector: Selector,
        write_lock: threading.Lock,
        distance: Distance,
    ) -> None:
        self._store = store
        self._neighbours = neighbours
        self._selector = selector
        self._write_lock = write_lock
        self._distance = distance

    def search(self, request: Request, *, settled: bool = False) -> list[SearchOutcome]:
        """Answer every query of a request; those with the same condition together.

        Args:
            request: the queries.
            settled: the caller holds the lock of writes.
        """
        if not any(request.conditions):
            return self._search(request, None, settled=settled)
        rows_of: dict[Clause | None, list[int]] = {}
        for i, condition in enumerate(request.conditions):
            rows_of.setdefault(condition, []).append(i)
        outcomes: dict[int, SearchOutcome] = {}
        for condition, rows in rows_of.items():
            cancellation.check()
            outcomes.update(zip(rows, self._search(request.only(rows), condition, settled=settled), strict=True))
        return [outcomes[i] for i in range(len(request.queries))]

    def catch_up(self) -> int:
        """Wait until memory has what the store has now, which takes a moment; return the number of the last write."""
        sequence = self._store.sequence()
        self._selector.wait_for(sequence)
        return sequence

    def _search(self, request: Request, condition: Clause | None, *, settled: bool) -> list[SearchOutcome]:
        outcomes: list[SearchOutcome | None] = [None] * len(request.queries)
        if request.exact:
            return self._from_store(outcomes, request, condition)
        for _ in range(0 if settled else _TRIES):
            _fill(outcomes, request, partial(self._answer, condition, settled=False))
            if None not in outcomes:
                break
            # A write came between memory and store.
            self.catch_up()
        else:
            # They come one upon the other. Held off, they leave memory and store agreed; a large one is waited for.
            with nullcontext() if settled else self._write_lock:
                _fill(outcomes, request, partial(self._answer, condition, settled=True))
        if None in outcomes:
            log.error("memory and store disagree; answering from the store")
        return self._from_store(outcomes, request, condition)

    def _from_store(
        self, outcomes: list[SearchOutcome | None], request: Request, condition: Clause | None
    ) -> list[SearchOutcome]:
        """Return all outcomes, those that are missing from the store."""
        while None in outcomes:  # again, if a record turned out to be damaged: then the store leaves that out
            _fill(outcomes, request, partial(self._scan, condition))
        return [outcome for outcome in outcomes if outcome is not None]

    def _answer(self, condition: Clause | None, request: Request, *, settled: bool) -> Sequence[SearchOutcome | None]:
        """Answer from memory; None where a write came in between, which it cannot if that is `settled`."""
        return self._look_up(request) if condition is None else self._look_up_among(condition, request, settled=settled)

    def _look_up(self, request: Request) -> Sequence[SearchOutcome | None]:
        """Answer from memory; None where the store has no more what memory found."""
        found = self._neighbours.search(request.queries, request.candidates, request.ef)
        outcomes = self._outcomes(request, found)
        untold = [i for i, each in enumerate(found) if each is None]
        if untold:
            for i, outcome in zip(untold, self._scan(None, request.only(untold)), strict=True):
                outcomes[i] = outcome
        return outcomes

    def _look_up_among(self, condition: Clause, request: Request, *, settled: bool) -> Sequence[SearchOutcome | None]:
        """Answer with records that meet a condition; None where a write changed which do."""
        k, held = request.candidates, max(1, self._neighbours.count)
        few = max(_FEW, _exact_up_to(request.ef), isqrt(_exact_up_to(2 * k * held)))
        selection = self._selector.select(condition, few)
        found: list[Candidates | None] = [None] * len(request.queries)
        count = len(selection.labels)
        # As many candidates as hold k that meet the condition, were those spread evenly; and as many again.
        ef = max(request.ef, 2 * -(-k * held // max(1, count)))
        if selection.vectors is None and count > _exact_up_to(ef):
            # Memory must have had the selection's records, those and no others, while it was searched.
            self._selector.wait_for(selection.sequence)
            self._look_up_in_graph(found, request.queries, ef, k, selection)
            if not settled and not self._still_holds(condition, selection):
                return [None] * len(request.queries)
        rows = [i for i, each in enumerate(found) if each is None]
        if rows:
            compared = self._compare(request.queries[rows], k, selection)
            if compared is None or (not settled and compared[0].plan.compared_count < count):
                return [None] * len(request.queries)  # of some of them, the vectors were damaged or gone
            for i, each in zip(rows, compared, strict=True):
                found[i] = each
        return self._outcomes(request, found, matching=count)

    def _look_up_in_graph(
        self, found: list[Candidates | None], queries: Matrix, ef: int, k: int, selection: Selection
    ) -> None:
        """Search the graph, for more and more candidates until k are of a selection or comparing it is cheaper."""
        while None in found and len(selection.labels) > _exact_up_to(ef):
            rows = [i for i, each in enumerate(found) if each is None]
            for i, each in zip(rows, self._neighbours.search(queries[rows], ef, ef), strict=True):
                found[i] = _among(each, selection.labels, k) if each else None
            ef *= _WIDER

    def _still_holds(self, condition: Clause, selection: Selection) -> bool:
        """Whether no write since then changed which records meet a condition: most writes are about others."""
        if self._store.sequence() == selection.sequence:
            return True
        return np.array_equal(self._selector.select(condition, 0).labels, selection.labels)

    def _outcomes(
        self, request: Request, found: Sequence[Candidates | None], matching: int | None = None
    ) -> list[SearchOutcome | None]:
        """Turn what was found into hits; None where a record is gone.

        Args:
            request: the queries.
            found: of each.
            matching: how many records meet the condition; None: there is none.
        """
        labels = {label for each in found if each is not None for label in each.labels}
        records = self._store.by_label(list(labels), with_vectors=request.with_vectors)
        return [
            None if each is None else _outcome(each, records, k, exclude, matching)
            for each, k, exclude in zip(found, request.top_k, request.exclude, strict=True)
        ]

    def _compare(self, queries: Matrix, k: int, selection: Selection) -> list[Candidates] | None:
        """Compare the queries with every vector of a selection; None if one that was found is damaged, or gone."""
        kept = selection.vectors
        checked = kept is None and _are_rather_checked_first(len(queries) * k, len(selection.labels))
        batches = self._read(selection.labels, checked=checked) if kept is None else [(selection.labels, kept)]
        labels, scores, total = self._nearest(batches, queries, k)
        if not checked:
            known = selection.checked if kept is not None else set()
            hits = set(labels.ravel().tolist()) - known
            if not self._are_sound(hits, selection):
                return None
            known.update(hits)
        plan = Plan(Strategy.EXACT, 0, total)
        return [Candidates(labels[i].tolist(), scores[i].tolist(), total <= k, plan) for i in range(len(queries))]

    def _are_sound(self, labels: set[int], selection: Selection) -> bool:
        """Compare vectors of a selection with their checksums; if one is damaged, all of the selection, once."""
        found, _ = self._store.vectors(sorted(labels))
        if len(found) == len(labels):
            return True
        for _ in self._read(selection.labels, checked=True):
            pass  # the damaged ones are noted
        self._selector.forget()
        return False

    def _read(self, labels: Labels, *, checked: bool) -> Iterator[tuple[Labels, Matrix]]:
        for start in range(0, len(labels), _SCAN_BATCH):
            found, vectors = self._store.vectors(labels[start : start + _SCAN_BATCH].tolist(), checked=checked)
            if len(found):
                yield found, prepare(vectors, self._distance)

    def _nearest(self, batches: Iterable[tuple[Labels, Matrix]], queries: Matrix, k: int) -> tuple[Labels, Matrix, int]:
        """Return the labels nearest to each query and their scores, (queries, at most k), and how many there were."""
        labels = np.empty((len(queries), 0), dtype=np.int64)
        scores = np.empty((len(queries), 0), dtype=np.float32)
        total = 0
        for batch, vectors in batches:
            cancellation.check()
            total += len(batch)
            rows, found = nearest(queries, vectors, k, self._distance)
            labels, scores = np.hstack([labels, batch[rows]]), np.hstack([scores, found])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            labels, scores = np.take_along_axis(labels, order, axis=1), np.take_along_axis(scores, order, axis=1)
        return labels, scores, total

    def _scanned(self, condition: Clause | None, checked: bool) -> Iterator[tuple[Labels, Matrix]]:
        for labels, vectors in self._store.scan(_SCAN_BATCH, condition or EVERYTHING, checked=checked):
            yield labels, prepare(vectors, self._distance)

    def _scan(self, condition: Clause | None, request: Request) -> list[SearchOutcome | None]:
        """Compare the queries with every vector in the store: slow and right, whatever the state of memory."""
        k = request.candidates
        checked = _are_rather_checked_first(len(request.queries) * k, self._neighbours.count)
        with self._store.snapshot():
            labels, scores, total = self._nearest(self._scanned(condition, checked), request.queries, k)
            hits = np.unique(labels).tolist()
            # A damaged vector that is not among the hits costs the answer nothing: it would not be in it anyway.
            if not checked and len(self._store.vectors(hits)[0]) < len(hits):
                labels, scores, total = self._nearest(self._scanned(condition, True), request.queries, k)
            records = self._store.by_label(np.unique(labels).tolist(), with_vectors=request.with_vectors)
        plan, matching = Plan(Strategy.EXACT, 0, total), None if condition is None else total
        found = zip(labels.tolist(), scores.tolist(), request.top_k, request.exclude, strict=True)
        return [
            _outcome(Candidates(of_query, its_scores, total <= k, plan), records, size, exclude, matching)
            for of_query, its_scores, size, exclude in found
        ]


def _exact_up_to(ef: int) -> int:
    """Return how many vectors are rather compared one by one than so many candidates kept by a search of the graph."""
    return _VECTORS_PER_CANDIDATE * ef


def _are_rather_checked_first(hits: int, count: int) -> bool:
    """Return whether checking `count` vectors while reading them is quicker than reading `hits` again to check them."""
    return _CHECKS_PER_HIT * hits > count


def _among(found: Candidates, allowed: Labels, k: int) -> Candidates | None:
    """Return the first k of the candidates that are allowed; None if they are fewer."""
    labels = np.array(found.labels, dtype=np.int64)
    places = np.minimum(np.searchsorted(allowed, labels), len(allowed) - 1)
    chosen = np.flatnonzero(allowed[places] == labels)[:k]
    if len(chosen) < k:
        return None
    return found._replace(
        labels=labels[chosen].tolist(), scores=[found.scores[i] for i in chosen.tolist()], complete=False
    )


def _holds(count: int, *, filtered: bool) -> str:
    """Say how many records there are to be found."""
    records = f"{count} record{'' if count == 1 else 's'}"
    return f"{records} match{'es' if count == 1 else ''} the filter" if filtered else f"the collection holds {records}"


def _fill(outcomes: list[SearchOutcome | None], request: Request, answer: Answer) -> None:
    """Answer the queries that are not answered yet."""
    rows = [i for i, outcome in enumerate(outcomes) if outcome is None]
    if rows:
        for i, outcome in zip(rows, answer(request.only(rows)), strict=True):
            outcomes[i] = outcome


def _outcome(
    found: Candidates, records: dict[int, StoredRecord], k: int, exclude: str | None, matching: int | None
) -> SearchOutcome | None:
    """Turn candidates into hits; None if one is gone, or they are too few and there are more.

    `matching` records meet the condition; None: there is none.
    """
    try:
        here = [records[label] for label in found.labels]
    except KeyError:
        return None
    hits = list(zip(here, found.scores, strict=True))
    if exclude is not None:
        hits = [hit for hit in hits if hit[0].id != exclude]
    if len(hits) >= k:
        return SearchOutcome(hits[:k], found.plan)
    if not found.complete:
        return None
    holds = _holds(len(found.labels) if matching is None else matching, filtered=matching is not None)
    reason = f"{holds}, the record asked about left out" if len(hits) < len(here) else holds
    return SearchOutcome(hits, replace(found.plan, shortfall_reason=reason))
