"""All vectors of a collection in memory, read from the store: the graph, and the buffer of newer vectors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emberpc.bundle.cores import usable_cores
from emberpc.server import cancellation
from emberpc.server.collections.metric import best_of
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix, Plan, Strategy
from emberpc.server.index.graph.buffer import Buffer
from emberpc.server.index.graph.hnsw import GraphError
from emberpc.server.index.graph.persistent_graph import PendingSave, PersistentGraph
from emberpc.server.index.graph.read_write_lock import ReadWriteLock
from emberpc.server.index.graph.shells import Shells, fitted

#: Number of vectors that are inserted into the graph at a time, while searches wait: some 5 to 15 ms for all of them.
_SLICE = 16
#: Number of cores that the server may use; computed once, since it is read from files of the operating system.
_CORES = usable_cores()
#: Number of queries that a search runs before it gives the lock to a waiting writer: 32 for each core.
_QUERIES_PER_TURN = 32 * _CORES
#: A query with at most this ef counts as one query in `_QUERIES_PER_TURN`. A query with a greater ef takes longer, and
#: counts in proportion to ef, but a turn has at least one query for each core.
_EF_PER_QUERY = 1000
#: Number of labels whose vectors are read from the store at a time; also the most vectors that a rebuild moves from the
#: buffer to the old graph at a time, and the most from which shells are computed.
_READ_BATCH = 2000
#: Number of nodes that are checked at a time, while searches wait: about 1 ms for all of them.
_CHECKED_AT_ONCE = 32
#: Most labels of a sample, which is checked to estimate how many vectors searches miss: some 15 ms for all of them.
_PROBED = 256
#: A complete check is due when the number of vectors in the graph is this many times that at the last complete check,
#: since later nodes may take links of earlier nodes. The second factor holds while `has_misses` of the graph is false.
_CHECK_GROWTH, _SOUND_CHECK_GROWTH = 1.5, 4.0

#: Function that reads vectors from the store: takes labels, and returns those that still exist, int64 (n,), with their
#: prepared vectors, float32 (n, dimensions).
ReadVectors = Callable[[list[int]], tuple[Labels, Matrix]]


class Candidates(NamedTuple):
    """Labels near a query with their scores, nearest first, and the plan of the search.

    `complete` is whether these are known to be all labels of the collection or, with a filter, of the matching records.
    """

    labels: list[int]
    scores: list[float]
    complete: bool
    plan: Plan


class Neighbours:
    """Holds the vectors of a collection, and searches for the labels nearest to a query.

    Safe to use from several threads. A query sees every write completely or not at all: graph and buffer change under
    one lock. Between the turns of a search with many queries, writes may run.

    Args:
        spec: the spec of the collection.
        graph: the graph of a snapshot, or an empty graph.
    """

    def __init__(self, spec: CollectionSpec, graph: PersistentGraph) -> None:
        self._spec = spec
        self._graph = graph
        self._buffer = Buffer(spec.dimensions, spec.distance)
        self._lock = ReadWriteLock()
        #: Ids of the vectors that the complete check in progress has still to check; empty if no check is in progress.
        self._unchecked: list[int] = []

    @property
    def waiting(self) -> int:
        """Number of vectors in the buffer."""
        return len(self._buffer)

    @property
    def count(self) -> int:
        """Number of labels that searches can find; read without the lock, so approximate while `drain` runs."""
        return self._graph.live + len(self._buffer)

    @property
    def graph_size(self) -> int:
        """Number of labels in the graph."""
        return self._graph.live

    @property
    def dead_share(self) -> float:
        """Share of the graph's nodes that are deleted."""
        return self._graph.dead_share

    @property
    def stray_share(self) -> float:
        """Number of strays, vectors that searches of the graph miss, divided by the number of strays and nodes."""
        return self._graph.stray_share

    @property
    def needs_check(self) -> bool:
        """Whether a complete check is in progress, or vectors were added since the last began: some may be missed."""
        return bool(self._graph.added or self._unchecked)

    def representatives(self) -> list[int]:
        """Return one label of each set of equal or nearly equal vectors in the graph.

        Strays and vectors too short for the graph are left out. In a small shell, which has no graph, nearly equal
        vectors are not grouped.
        """
        with self._lock.read():
            return self._graph.representatives()

    def catch_up(self, stored: Labels, read: ReadVectors) -> None:
        """Bring the graph of a snapshot to the state of the store.

        Labels that the store lacks are removed, and stored labels that the graph lacks are added to the buffer. Labels
        for which `read` returns no vector stay out.

        Args:
            stored: all labels in the store, int64 (n,), ascending.
            read: reads vectors from the store.
        """
        with self._lock.write():
            # Vectors are restored before labels are removed: removing the last vector of a group may delete its leader.
            awaited = sorted(self._graph.awaited & set(stored.tolist()))
            for start in range(0, len(awaited), _READ_BATCH):
                self._graph.restore(*read(awaited[start : start + _READ_BATCH]))
            self._graph.restored()
            here = self._graph.labels()
            self._graph.remove(here - set(stored.tolist()))
            missing = [label for label in stored.tolist() if label not in here]
            for start in range(0, len(missing), _READ_BATCH):
                self._buffer.add(*read(missing[start : start + _READ_BATCH]))

    def change(self, added: Labels, vectors: Matrix, removed: set[int]) -> None:
        """Apply one write of the store; writes must come in the store's order.

        Args:
            added: new labels, int64 (n,), ascending.
            vectors: their prepared vectors, float32 (n, dimensions).
            removed: labels that were removed.
        """
        with self._lock.write():
            self._buffer.add(added, vectors)
            self._forget(removed)

    def remove(self, labels: set[int]) -> None:
        """Remove labels that the store no longer has; missing labels are ignored."""
        with self._lock.write():
            self._forget(labels)

    def search(self, queries: Matrix, k: int, ef: int) -> list[Candidates | None]:
        """Search graph and buffer for the labels nearest to each prepared query.

        Args:
            queries: float32 (queries, dimensions).
            k: number of labels to find for each query.
            ef: number of candidates that the search of the graph keeps, at least `k`.

        Returns:
            Candidates for each query. None if the graph cannot answer, as when `k` is at least half of its labels: then
            the other queries of the same turn have None too, and the caller must compare all vectors.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if the call of this thread is cancelled.
        """
        found: list[Candidates | None] = []
        turn = max(_CORES, _QUERIES_PER_TURN * _EF_PER_QUERY // max(ef, _EF_PER_QUERY))
        for start in range(0, len(queries), turn):
            cancellation.check()
            part = queries[start : start + turn]
            try:
                found += self._search(part, k, ef)
            except GraphError:
                found += [None] * len(part)
        return found

    def labels(self) -> set[int]:
        """Return the labels that searches can find."""
        with self._lock.read():
            return self._graph.labels() | self._buffer.labels()

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the prepared vectors, float32 (dimensions,), of those labels that searches can find, by label."""
        with self._lock.read():
            return self._graph.held(labels) | self._buffer.held(labels)

    def drain(self, most: int, stop: Callable[[], bool]) -> int:
        """Move the oldest vectors from the buffer to the graph, in small steps between which searches run.

        Args:
            most: most vectors to move; no more are moved than the buffer has at the start.
            stop: whether to end before the next step.

        Returns:
            The number of vectors that were moved.
        """
        moved, goal = 0, min(most, len(self._buffer))
        while moved < goal and not stop():
            with self._lock.write():
                labels, vectors = self._buffer.oldest(min(_SLICE, goal - moved))
                if not len(labels):
                    break
                self._graph.add(labels, vectors)
                self._buffer.remove(set(labels.tolist()))
            moved += len(labels)
        return moved

    def check(self, stop: Callable[[], bool], *, at_rest: bool = False) -> None:
        """Run a complete check if the graph grew enough since the last: search for every node by its own vector.

        A check that was interrupted is continued. Nodes that the searches miss become strays, which every search
        covers. Searches and writes may run meanwhile, but not `drain`.

        Args:
            stop: whether to end early; the next call continues the check.
            at_rest: whether it is enough that any vector was added since the last check began.
        """
        if not self._unchecked:
            with self._lock.read():
                growth = _CHECK_GROWTH if self._graph.has_misses else _SOUND_CHECK_GROWTH
                has_grown = self._graph.to_check >= max(1, growth * self._graph.checked)
                if not has_grown and not (at_rest and self._graph.added):
                    return
                self._unchecked = self._graph.begin_check()
        while self._unchecked:
            if stop():
                return
            with self._lock.write():
                self._graph.check(self._unchecked[-_CHECKED_AT_ONCE:])
            del self._unchecked[-_CHECKED_AT_ONCE:]
        with self._lock.write():
            self._graph.end_check()

    def probe(self) -> float:
        """Check a random sample of at most 256 labels of the graph: search for each by its own vector.

        Nodes that the searches miss become strays, which every search covers.

        Returns:
            The share of the sample that the searches missed, 0 to 1; 0 for an empty graph.
        """
        with self._lock.read():
            labels = sorted(self._graph.labels())
        chosen = random.Random(len(labels)).sample(labels, min(_PROBED, len(labels)))  # noqa: S311 - a sample, no secret
        missed = 0
        for start in range(0, len(chosen), _CHECKED_AT_ONCE):
            with self._lock.write():
                before = self._graph.strays
                self._graph.check_labels(chosen[start : start + _CHECKED_AT_ONCE])
                missed += self._graph.strays - before
        return missed / max(1, len(chosen))

    def compare_always(self, labels: list[int]) -> None:
        """Make strays of the vectors of labels, which searches of the graph miss; labels outside the graph are ignored.

        Every search covers strays: it compares them one by one or, if they are many, searches a graph of strays.
        """
        with self._lock.write():
            self._graph.compare_always(labels)

    def rebuild(
        self, read: ReadVectors, stop: Callable[[], bool], most_waiting: int = 4000, *, shuffled: bool = False
    ) -> bool:
        """Build a new graph of the old graph's vectors that `read` returns, check it, and replace the old graph.

        Searches and writes may run meanwhile, but no other call of `drain` and no `check`.

        Args:
            read: reads vectors from the store.
            stop: whether to give up; the old graph then stays.
            most_waiting: if the buffer has more vectors than this meanwhile, some are moved to the old graph, so that
                searches stay fast.
            shuffled: whether to insert batches of 2,000 random vectors, each in the order of labels, instead of all in
                that order, and to compute new shells; if not, the shells of the old graph stay. Used if searches of
                the old graph miss many nodes.

        Returns:
            Whether the old graph was replaced.
        """
        shells = self._fitted_shells(read) if shuffled else self._graph.shells
        graph = PersistentGraph(self._spec, self._graph.live, shells=shells)
        taken: set[int] = set()
        # Vectors that the old graph received meanwhile must be in the new graph too. Rounds usually get shorter.
        while labels := sorted(self._graph_labels() - taken):
            first_round = not taken
            taken.update(labels)
            if shuffled:
                random.Random(len(taken)).shuffle(labels)  # noqa: S311 - an order, no secret
            for start in range(0, len(labels), _READ_BATCH):
                found, vectors = read(sorted(labels[start : start + _READ_BATCH]))
                for first in range(0, len(found), _SLICE):
                    if stop():
                        return False
                    graph.add(found[first : first + _SLICE], vectors[first : first + _SLICE])
                    if self.waiting > most_waiting:
                        self.drain(_READ_BATCH, stop)
            # Later nodes took links of some earlier nodes, and the next complete check may be far off, so check now.
            if first_round and not self._check_new(graph, stop, most_waiting):
                return False
        with self._lock.write():
            graph.remove(graph.labels() - self._graph.labels())
            self._graph = graph
            self._unchecked = []
        return True

    def _fitted_shells(self, read: ReadVectors) -> Shells | None:
        labels = sorted(self._graph_labels())
        chosen = random.Random(len(labels)).sample(labels, min(_READ_BATCH, len(labels)))  # noqa: S311 - a sample, no secret
        _, vectors = read(sorted(chosen))
        return fitted(vectors) if len(vectors) else None

    def _check_new(self, graph: PersistentGraph, stop: Callable[[], bool], most_waiting: int) -> bool:
        """Run a complete check of a new graph, which no other thread uses; return False if `stop` ended it early.

        If the buffer has more than `most_waiting` vectors meanwhile, some are moved to the old graph.
        """
        names = graph.begin_check()
        for start in range(0, len(names), _CHECKED_AT_ONCE):
            if stop():
                return False
            graph.check(names[start : start + _CHECKED_AT_ONCE])
            if self.waiting > most_waiting:
                self.drain(_READ_BATCH, stop)
        graph.end_check()
        return True

    def save(self, path: Path) -> PendingSave:
        """Begin to write the present graph to a file; `PendingSave.wait` waits for the end.

        On Linux this returns at once; elsewhere, only when the file is written.

        Raises:
            OSError: writing cannot begin.
        """
        with self._lock.read():
            return self._graph.save(path)

    def _graph_labels(self) -> set[int]:
        with self._lock.read():
            return self._graph.labels()

    def _forget(self, labels: set[int]) -> None:
        if labels:
            self._buffer.remove(labels)
            self._graph.remove(labels)

    def _search(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        with self._lock.read():
            # An empty graph needs no ef. Without this check, its first search would take the write lock to set ef.
            if not self._graph.live or self._graph.ef == ef:
                return self._search_both(queries, k, ef)
        # hnswlib has one ef for the whole graph, not for each search. Under the write lock, no other search runs with
        # the ef of this search.
        with self._lock.write():
            self._graph.set_ef(ef)
            return self._search_both(queries, k, ef)

    def _search_both(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        """Search graph and buffer with prepared queries, and merge the candidates. The caller holds the lock.

        Raises:
            GraphError: the graph cannot answer, so all vectors must be compared.
        """
        found = [self._graph.search(queries, k)] if self._graph.live else []
        if len(self._buffer) or not found:
            found.append(self._buffer.search(queries, k))
        labels, scores = best_of(found, k)
        complete = labels.shape[1] == self._graph.live + len(self._buffer)
        used = bool(self._graph.live)
        plan = Plan(Strategy.HNSW if used else Strategy.EXACT, ef if used else 0, len(self._buffer))
        return [
            Candidates(of_query, its_scores, complete, plan)
            for of_query, its_scores in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
