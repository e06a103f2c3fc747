"""All vectors of a collection in memory: the graph, and the buffer of newer vectors; derived from the store."""

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

#: Vectors that are inserted into the graph while searches wait; some 5 to 15 ms.
_SLICE = 16
#: Computed once, since it is read from files of the operating system.
_CORES = usable_cores()
#: Queries that run before a writer gets its turn, some 32 on each core.
_QUERIES_PER_TURN = 32 * _CORES
#: A query with up to this many candidates counts as one; with more it counts in proportion, since it takes longer.
_EF_PER_QUERY = 1000
_READ_BATCH = 2000
#: Nodes that are checked at a time, while searches wait: about 1 ms for all of them.
_CHECKED_AT_ONCE = 32
#: Nodes that are checked as a sample, to estimate how many the graph cuts off; some 15 ms.
_PROBED = 256
#: A complete check is due when there are 1.5 times as many nodes as at the last one: later nodes may take the links of
#: earlier ones. While no search has missed a node, a sample is checked at that growth, and all nodes at the second.
_CHECK_GROWTH, _SOUND_CHECK_GROWTH = 1.5, 4.0

#: Returns the prepared vectors of those labels that still exist: int64 (n,) and float32 (n, dimensions).
ReadVectors = Callable[[list[int]], tuple[Labels, Matrix]]


class Candidates(NamedTuple):
    """Labels near a query with their scores, nearest first; `complete` if they are all labels of the collection."""

    labels: list[int]
    scores: list[float]
    complete: bool
    plan: Plan


class Neighbours:
    """Searches for the labels nearest to a query. Safe to use from several threads.

    A search sees every write completely or not at all: graph and buffer change under one lock.

    Args:
        spec: the spec of the collection.
        graph: the graph of a snapshot, or an empty one.
    """

    def __init__(self, spec: CollectionSpec, graph: PersistentGraph) -> None:
        self._spec = spec
        self._graph = graph
        self._buffer = Buffer(spec.dimensions, spec.distance)
        self._lock = ReadWriteLock()
        #: Labels that the complete check in progress has still to check. It searches for each node by its own vector.
        self._unchecked: list[int] = []

    @property
    def waiting(self) -> int:
        """Number of vectors in the buffer."""
        return len(self._buffer)

    @property
    def count(self) -> int:
        """Number of labels that searches can find."""
        return self._graph.live + len(self._buffer)

    @property
    def graph_size(self) -> int:
        """Number of labels that the graph finds."""
        return self._graph.live

    @property
    def dead_share(self) -> float:
        """Share of the graph's nodes that are deleted."""
        return self._graph.dead_share

    @property
    def stray_share(self) -> float:
        """Share of strays: vectors that searches of the graph miss, so that they are compared with every query."""
        return self._graph.stray_share

    @property
    def needs_check(self) -> bool:
        """Whether vectors were added since the last complete check, so that nodes may be cut off."""
        return bool(self._graph.added or self._unchecked)

    def representatives(self) -> list[int]:
        """Return labels of the graph: one of each set of equal or nearly equal vectors."""
        with self._lock.read():
            return self._graph.representatives()

    def catch_up(self, stored: Labels, read: ReadVectors) -> None:
        """Make the labels equal to the stored ones, ascending; stored labels that a snapshot lacks go to the buffer."""
        with self._lock.write():
            # Before the removal, since removing the last vector of a group may delete its leader.
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
        """Remove labels that the store no longer has."""
        with self._lock.write():
            self._forget(labels)

    def search(self, queries: Matrix, k: int, ef: int) -> list[Candidates | None]:
        """Search for prepared queries, float32 (queries, dimensions).

        Args:
            queries: the queries.
            k: labels to find for each query.
            ef: candidates that the graph search keeps, at least k.

        Returns:
            Candidates for each query; None if the graph failed, so that all vectors must be compared.
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
        """Return the prepared vectors, float32 (dimensions,), of those labels that searches can find."""
        with self._lock.read():
            return self._graph.held(labels) | self._buffer.held(labels)

    def drain(self, most: int, stop: Callable[[], bool]) -> int:
        """Move up to `most` of the vectors now in the buffer to the graph, slice by slice; return their number."""
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
        """Run a complete check if the graph grew enough: search for every vector of the graph by itself.

        With `at_rest`, any growth is enough. Vectors that are not found become strays, which are compared with every
        query. Searches and writes continue meanwhile. A check that was stopped continues at the next call. Must not run
        concurrently with `drain`.
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
        """Check a sample of the nodes by searching for their own vectors; return the share that was not found.

        As with `check`, missed nodes become strays.
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
        """Make strays of the vectors of labels, since searches of the graph miss them."""
        with self._lock.write():
            self._graph.compare_always(labels)

    def rebuild(
        self, read: ReadVectors, stop: Callable[[], bool], most_waiting: int = 4000, *, shuffled: bool = False
    ) -> bool:
        """Build a new graph of all live vectors beside the present one, and replace the latter.

        Must not run concurrently with `drain`.

        Args:
            read: reads the vectors.
            stop: whether to give up.
            most_waiting: if the buffer grows beyond this, the old graph is filled from it meanwhile, so that searches
                stay fast.
            shuffled: whether to insert in random order instead of the order of labels, and to build a graph for each
                shell; used if many nodes were cut off.

        Returns:
            Whether it was finished.
        """
        shells = self._fitted_shells(read) if shuffled else self._graph.shells
        graph = PersistentGraph(self._spec, self._graph.live, shells=shells)
        taken: set[int] = set()
        # Vectors that the old graph received meanwhile must be in the new one too; each round has fewer.
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
            # Later nodes took the links of some earlier nodes, and the next complete check may be far off.
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
        """Run a complete check of a graph that no other thread uses; return whether it was finished."""
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
        """Begin to write the present graph to a file; searches and writes continue meanwhile."""
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
            # An empty graph needs no ef; without this check its first search would take the write lock to set it.
            if not self._graph.live or self._graph.ef == ef:
                return self._search_both(queries, k, ef)
        # ef belongs to the whole graph. Under the write lock, no concurrent search runs with another search's ef.
        with self._lock.write():
            self._graph.set_ef(ef)
            return self._search_both(queries, k, ef)

    def _search_both(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        """Search graph and buffer, and merge the candidates; the caller holds the lock."""
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
