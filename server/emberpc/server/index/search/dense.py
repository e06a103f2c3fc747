"""Dense search in a collection: find the records nearest to prepared queries, among all or those that meet a filter.

If few records meet the filter, all their vectors are compared. If many do, the graph is searched with growing `ef`
until enough candidates meet the filter. Once comparing all vectors that meet the filter is cheaper, they are compared.
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
from emberpc.server.collections.types import Distance, Labels, Matrix, Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.index.graph.neighbours import Candidates, Neighbours
from emberpc.server.index.search.filtered import Selection, Selector
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)

_VECTOR_BATCH = 4000
#: With a filter, all matching vectors are compared if there are at most this many for each candidate (ef) of a graph
#: search: reading a vector and a candidate take about 3 µs each, but a graph search may be repeated and is not exact.
_VECTORS_PER_CANDIDATE = 2
#: If at most this many records meet a filter, and their vectors take at most a quarter of the cache of selections, the
#: vectors are cached and compared. With a great ef or in a large collection, the number is greater.
_FEW = 1000
#: Factor by which ef grows for the next graph search, after one that found too few records that meet the filter.
_WIDER = 4
#: Reading the vector of a hit again, to verify its checksum, takes as long as verifying the checksums of this many
#: vectors while they are read for the comparison.
_CHECKS_PER_HIT = 6
#: Maximum number of attempts of a search while writes go on. If writes (or damage) disturb all, the search blocks
#: writes.
_TRIES = 8


class DenseRequest(NamedTuple):
    """Queries of a dense search, with their options.

    `queries` are prepared vectors, float32 (queries, dimensions). `top_k`, `exclude` (an id that must not be a hit, or
    None) and `conditions` (a filter, or None) have one item for each query; there is at least one query. `ef` and
    `with_vectors` (whether hits contain their vectors) are for all queries. `ef` is the number of candidates that a
    graph search keeps, with a filter the minimum number. Unless `exact`, `ef` is at least `candidates`.
    """

    queries: Matrix
    top_k: Sequence[int]
    exclude: Sequence[str | None]
    ef: int
    with_vectors: bool
    conditions: Sequence[Clause | None]
    #: Whether to compare every vector in the store that meets the filter, instead of searching memory.
    exact: bool = False

    @property
    def candidates(self) -> int:
        """Number of candidates to find for each query: the greatest top_k, and one more if a query excludes an id."""
        return max(self.top_k) + any(each is not None for each in self.exclude)

    def subset(self, rows: Sequence[int]) -> DenseRequest:
        """Return a request with only the queries at the indexes `rows`, ascending; `self` if `rows` has all indexes."""
        if len(rows) == len(self.queries):
            return self
        return self._replace(
            queries=self.queries[list(rows)],
            top_k=[self.top_k[i] for i in rows],
            exclude=[self.exclude[i] for i in rows],
            conditions=[self.conditions[i] for i in rows],
        )


#: A function that returns an outcome for each query of a request, in order; None for a query that must be repeated.
Answer = Callable[[DenseRequest], Sequence[SearchOutcome | None]]


class DenseSearcher:
    """Finds the records of a collection nearest to queries, by the vectors in memory or in the store.

    Vectors in the store are compared if a request is `exact`, few records meet a filter, or memory cannot answer.

    Args:
        store: the records, from which memory can be rebuilt.
        neighbours: the vectors in memory.
        selector: selects the records that meet a filter.
        write_lock: held by every write, from before it changes the store until it has changed memory.
        distance: the distance of the collection.
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

    def search(self, request: DenseRequest, *, settled: bool = False) -> list[SearchOutcome]:
        """Return the outcome of each query, in order; queries with the same filter are searched for together.

        Args:
            request: the queries.
            settled: whether the caller holds the write lock; if not, the search takes it if writes disturb too often.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if the call of this thread is cancelled; the errors of reading the store.
        """
        if not any(request.conditions):
            return self._search(request, None, settled=settled)
        rows_of: dict[Clause | None, list[int]] = {}
        for i, condition in enumerate(request.conditions):
            rows_of.setdefault(condition, []).append(i)
        outcomes: dict[int, SearchOutcome] = {}
        for condition, rows in rows_of.items():
            cancellation.check()
            outcomes.update(zip(rows, self._search(request.subset(rows), condition, settled=settled), strict=True))
        return [outcomes[i] for i in range(len(request.queries))]

    def catch_up(self) -> int:
        """Wait until memory has the store's last write, but at most a second; return the sequence of this write."""
        sequence = self._store.sequence()
        self._selector.wait_for(sequence)
        return sequence

    def _search(self, request: DenseRequest, condition: Clause | None, *, settled: bool) -> list[SearchOutcome]:
        outcomes: list[SearchOutcome | None] = [None] * len(request.queries)
        if request.exact:
            return self._from_store(outcomes, request, condition)
        for _ in range(0 if settled else _TRIES):
            _fill(outcomes, request, partial(self._answer, condition, settled=False))
            if None not in outcomes:
                break
            # A query has no outcome: a write came between the search and the reading of records, or damage was found.
            self.catch_up()
        else:
            # Writes or damage disturbed all attempts, or the caller holds the write lock (`settled`). With writes
            # blocked, memory and store stay consistent.
            with nullcontext() if settled else self._write_lock:
                _fill(outcomes, request, partial(self._answer, condition, settled=True))
        if None in outcomes:
            log.error("memory and store disagree; answering from the store")
        return self._from_store(outcomes, request, condition)

    def _from_store(
        self, outcomes: list[SearchOutcome | None], request: DenseRequest, condition: Clause | None
    ) -> list[SearchOutcome]:
        """Return all outcomes; each None in `outcomes` is first replaced, in place, by a search of the store."""
        while None in outcomes:  # repeated if a record turned out to be damaged, which the store then leaves out
            _fill(outcomes, request, partial(self._exact_search, condition))
        return [outcome for outcome in outcomes if outcome is not None]

    def _answer(
        self, condition: Clause | None, request: DenseRequest, *, settled: bool
    ) -> Sequence[SearchOutcome | None]:
        """Try to answer queries, which all have the filter `condition` (None: none); None for a query to be repeated.

        `settled` is whether the write lock is held, so that no write can disturb the search.
        """
        return (
            self._search_memory(request)
            if condition is None
            else self._search_memory_filtered(condition, request, settled=settled)
        )

    def _search_memory(self, request: DenseRequest) -> Sequence[SearchOutcome | None]:
        """Search the vectors in memory, without a filter; those in the store for a query the graph cannot answer.

        None for a query if the record of a candidate is missing or damaged, or hits are missing that may exist.
        """
        found = self._neighbours.search(request.queries, request.candidates, request.ef)
        outcomes = self._outcomes(request, found)
        failed = [i for i, each in enumerate(found) if each is None]
        if failed:
            for i, outcome in zip(failed, self._exact_search(None, request.subset(failed)), strict=True):
                outcomes[i] = outcome
        return outcomes

    def _search_memory_filtered(
        self, condition: Clause, request: DenseRequest, *, settled: bool
    ) -> Sequence[SearchOutcome | None]:
        """Search for records that meet a filter, by graph or by comparing all their vectors.

        None for the queries that must be repeated, since a write changed which records meet the filter, or a record or
        vector is damaged or was deleted. `settled` is whether the write lock is held, which excludes writes.
        """
        k, held = request.candidates, max(1, self._neighbours.count)
        few = max(_FEW, _exact_up_to(request.ef), isqrt(_exact_up_to(2 * k * held)))
        selection = self._selector.select(condition, few)
        found: list[Candidates | None] = [None] * len(request.queries)
        count = len(selection.labels)
        # At least twice the number of candidates that contain k matching records, if these are spread evenly.
        ef = max(request.ef, 2 * -(-k * held // max(1, count)))
        if selection.vectors is None and count > _exact_up_to(ef):
            # Memory should have every write that the selection has. After a second, memory is searched anyway.
            # `_still_holds` notices later writes.
            self._selector.wait_for(selection.sequence)
            self._search_graph_filtered(found, request.queries, ef, k, selection)
            if not settled and not self._still_holds(condition, selection):
                return [None] * len(request.queries)
        rows = [i for i, each in enumerate(found) if each is None]
        if rows:
            compared = self._compare(request.queries[rows], k, selection)
            if compared is None or (not settled and compared[0].plan.compared_count < count):
                return [None] * len(request.queries)  # some of the vectors were damaged or deleted
            for i, each in zip(rows, compared, strict=True):
                found[i] = each
        return self._outcomes(request, found, matching=count)

    def _search_graph_filtered(
        self, found: list[Candidates | None], queries: Matrix, ef: int, k: int, selection: Selection
    ) -> None:
        """Search graph and buffer for the `k` nearest labels of a selection; set each query's candidates in `found`.

        Only the queries that have None in `found` are searched for. A query with fewer than `k` candidates in the
        selection, or that the graph cannot answer, is repeated with four times the `ef`, until comparing all vectors of
        the selection is cheaper. Then the query keeps None.
        """
        while None in found and len(selection.labels) > _exact_up_to(ef):
            rows = [i for i, each in enumerate(found) if each is None]
            for i, each in zip(rows, self._neighbours.search(queries[rows], ef, ef), strict=True):
                found[i] = _among(each, selection.labels, k) if each else None
            ef *= _WIDER

    def _still_holds(self, condition: Clause, selection: Selection) -> bool:
        """Return whether the selected records are still those that meet the filter, and none of them was rewritten."""
        if self._store.sequence() == selection.sequence:
            return True
        return np.array_equal(self._selector.select(condition, 0).labels, selection.labels)

    def _outcomes(
        self, request: DenseRequest, found: Sequence[Candidates | None], matching: int | None = None
    ) -> list[SearchOutcome | None]:
        """Read the records of candidates, and return the outcome of each query.

        None for a query without candidates, or for which `_outcome` returns None.

        Args:
            request: the queries.
            found: candidates for each query; None: the search of the query failed.
            matching: number of records that meet the filter; None: there is no filter.
        """
        labels = {label for each in found if each is not None for label in each.labels}
        records = self._store.by_label(list(labels), with_vectors=request.with_vectors)
        return [
            None if each is None else _outcome(each, records, k, exclude, matching)
            for each, k, exclude in zip(found, request.top_k, request.exclude, strict=True)
        ]

    def _compare(self, queries: Matrix, k: int, selection: Selection) -> list[Candidates] | None:
        """Compare the queries with the vectors of a selection; return at most k candidates for each query.

        Vectors that were deleted, or are found damaged while they are read, are left out; `plan.compared_count` is then
        less than the selection's number of labels. Checksums are verified of all vectors while they are read, or of the
        candidates after the comparison, whichever is faster. Of cached vectors, only candidates that were not verified
        before are verified. None if a candidate that is verified after the comparison is damaged or was deleted.
        """
        kept = selection.vectors
        checked = kept is None and _is_check_while_reading_faster(len(queries) * k, len(selection.labels))
        batches = self._read(selection.labels, checked=checked) if kept is None else [(selection.labels, kept)]
        labels, scores, total = self._nearest(batches, queries, k)
        if not checked:
            known = selection.checked if kept is not None else set()
            hits = set(labels.ravel().tolist()) - known
            if not self._are_undamaged(hits, selection):
                return None
            known.update(hits)
        plan = Plan(SearchStrategy.EXACT, 0, total)
        return [Candidates(labels[i].tolist(), scores[i].tolist(), total <= k, plan) for i in range(len(queries))]

    def _are_undamaged(self, labels: set[int], selection: Selection) -> bool:
        """Verify the checksums of the stored vectors with these labels; return whether all exist and are undamaged.

        If not, verify all vectors of the selection, so that the store notes all damage, and clear the selector's cache.
        """
        found, _ = self._store.vectors(sorted(labels))
        if len(found) == len(labels):
            return True
        for _ in self._read(selection.labels, checked=True):
            pass  # the store notes damaged records
        self._selector.forget()
        return False

    def _read(self, labels: Labels, *, checked: bool) -> Iterator[tuple[Labels, Matrix]]:
        for start in range(0, len(labels), _VECTOR_BATCH):
            found, vectors = self._store.vectors(labels[start : start + _VECTOR_BATCH].tolist(), checked=checked)
            if len(found):
                yield found, prepare(vectors, self._distance)

    def _nearest(self, batches: Iterable[tuple[Labels, Matrix]], queries: Matrix, k: int) -> tuple[Labels, Matrix, int]:
        """Compare prepared queries with batches of labels and prepared vectors (see `metric.prepare`).

        Returns:
            The labels of the k vectors nearest to each query, int64 (queries, k), nearest first, with fewer columns if
            fewer vectors are compared; their scores, float32 of the same shape; and the number of vectors compared.
        """
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

    def _stored_vectors(self, condition: Clause | None, checked: bool) -> Iterator[tuple[Labels, Matrix]]:
        for labels, vectors in self._store.vector_batches(_VECTOR_BATCH, condition or EVERYTHING, checked=checked):
            yield labels, prepare(vectors, self._distance)

    def _exact_search(self, condition: Clause | None, request: DenseRequest) -> list[SearchOutcome | None]:
        """Compare the queries with all vectors in the store that meet a filter (None: all), without graph and buffer.

        None for a query if the record of a candidate turned out to be damaged; the next call leaves this record out.
        """
        k = request.candidates
        checked = _is_check_while_reading_faster(len(request.queries) * k, self._neighbours.count)
        with self._store.snapshot():
            labels, scores, total = self._nearest(self._stored_vectors(condition, checked), request.queries, k)
            hits = np.unique(labels).tolist()
            # Only the vectors of candidates must be undamaged. If one is not, all vectors are read again with their
            # checksums, which leaves out the damaged ones.
            if not checked and len(self._store.vectors(hits)[0]) < len(hits):
                labels, scores, total = self._nearest(self._stored_vectors(condition, True), request.queries, k)
            records = self._store.by_label(np.unique(labels).tolist(), with_vectors=request.with_vectors)
        plan, matching = Plan(SearchStrategy.EXACT, 0, total), None if condition is None else total
        found = zip(labels.tolist(), scores.tolist(), request.top_k, request.exclude, strict=True)
        return [
            _outcome(Candidates(of_query, its_scores, total <= k, plan), records, size, exclude, matching)
            for of_query, its_scores, size, exclude in found
        ]


def _exact_up_to(ef: int) -> int:
    """Return up to how many matching vectors are compared, instead of a search of the graph with `ef` candidates."""
    return _VECTORS_PER_CANDIDATE * ef


def _is_check_while_reading_faster(hits: int, count: int) -> bool:
    """Return whether verifying all checksums during the reading is faster than verifying those of hits afterwards.

    Args:
        hits: number of hits of all queries, whose vectors would be read a second time.
        count: number of vectors that are read for the comparison.
    """
    return _CHECKS_PER_HIT * hits > count


def _among(found: Candidates, allowed: Labels, k: int) -> Candidates | None:
    """Return the k nearest candidates with labels in `allowed`, int64 (n > 0,), ascending; None if there are fewer."""
    labels = np.array(found.labels, dtype=np.int64)
    places = np.minimum(np.searchsorted(allowed, labels), len(allowed) - 1)
    chosen = np.flatnonzero(allowed[places] == labels)[:k]
    if len(chosen) < k:
        return None
    return found._replace(
        labels=labels[chosen].tolist(), scores=[found.scores[i] for i in chosen.tolist()], complete=False
    )


def _holds(count: int, *, filtered: bool) -> str:
    """Return text for a shortfall reason: that the collection has `count` records, or so many match (`filtered`)."""
    records = f"{count} record{'' if count == 1 else 's'}"
    return f"{records} match{'es' if count == 1 else ''} the filter" if filtered else f"the collection holds {records}"


def _fill(outcomes: list[SearchOutcome | None], request: DenseRequest, answer: Answer) -> None:
    """Replace each None in `outcomes`, in place, by what `answer` returns for the query, which may be None again."""
    rows = [i for i, outcome in enumerate(outcomes) if outcome is None]
    if rows:
        for i, outcome in zip(rows, answer(request.subset(rows)), strict=True):
            outcomes[i] = outcome


def _outcome(
    found: Candidates, records: dict[int, StoredRecord], k: int, exclude: str | None, matching: int | None
) -> SearchOutcome | None:
    """Return the outcome of a query: the best k candidates with their records, and the plan.

    Args:
        found: the candidates.
        records: records by label.
        k: maximum number of hits to return. If there are fewer, the plan states the reason.
        exclude: id that must not be a hit, or None.
        matching: number of records that meet the filter; None: there is no filter.

    Returns:
        None if a record is missing in `records`, or if there are fewer than k hits although the collection may have
        more.
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
