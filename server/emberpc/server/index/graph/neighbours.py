"""All vectors of a collection in memory, as the graph and the buffer before it; derived from the store."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emberpc.server import cancellation
from emberpc.server.collections.metric import best_of
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix, Plan, Strategy
from emberpc.server.cores import usable_cores
from emberpc.server.index.graph.buffer import Buffer
from emberpc.server.index.graph.graph import Graph, Saving
from emberpc.server.index.graph.hnsw import GraphError
from emberpc.server.index.graph.read_write_lock import ReadWriteLock
from emberpc.server.index.graph.shells import Shells, fitted

#: Rows that the graph takes in while searches are kept out; some 5 to 15 ms.
_SLICE = 16
#: Asked for once: the answer is read from files of the system.
_CORES = usable_cores()
#: Queries answered before a writer gets its turn, some 32 on each core.
_QUERIES_PER_TURN = 32 * _CORES
#: Candidates up to which a query counts as one; one of more counts as more, since it takes as much longer.
_EF_PER_QUERY = 1000
_READ_BATCH = 2000
#: Nodes that are searched for while other searches wait; some 1 ms.
_CHECKED_AT_ONCE = 32
#: Nodes that are searched for to find out whether a graph cuts off many; some 15 ms.
_PROBED = 256
#: All nodes are checked again when there are 1.5 times as many as at the last check: later nodes may take their links.
#: While no search has missed a node, a sample is searched for at that growth, and all nodes at the second growth.
_CHECK_GROWTH, _SOUND_CHECK_GROWTH = 1.5, 4.0

#: Gives the prepared vectors of those labels that are still there: int64 (n,) and float32 (n, dimensions).
ReadVectors = Callable[[list[int]], tuple[Labels, Matrix]]


class Candidates(NamedTuple):
    """Labels near a query with their scores, nearest first; `complete` if there are no other labels at all."""

    labels: list[int]
    scores: list[float]
    complete: bool
    plan: Plan


class Neighbours:
    """Finds the labels nearest to a query. Safe to use from several threads.

    Every write is seen by a search as a whole or not at all: graph and buffer
    change under one lock.

    Args:
        spec: the collection's.
        graph: what a snapshot held, or an empty one.
    """

    def __init__(self, spec: CollectionSpec, graph: Graph) -> None:
        self._spec = spec
        self._graph = graph
        self._buffer = Buffer(spec.dimensions, spec.distance)
        self._lock = ReadWriteLock()
        #: Nodes that a check of all has still to check.
        self._unchecked: list[int] = []

    @property
    def waiting(self) -> int:
        """Number of vectors that the graph has not taken in."""
        return len(self._buffer)

    @property
    def count(self) -> int:
        """Number of vectors that can be found."""
        return self._graph.live + len(self._buffer)

    @property
    def graph_size(self) -> int:
        """Number of vectors that are found by way of the graph."""
        return self._graph.live

    @property
    def dead_share(self) -> float:
        """Share of the graph's nodes that are deleted."""
        return self._graph.dead_share

    @property
    def stray_share(self) -> float:
        """Share of the vectors of the graph that no link leads to, so that they are compared with every query."""
        return self._graph.stray_share

    @property
    def needs_check(self) -> bool:
        """Whether vectors were added since the last check of all, so that nodes may be cut off."""
        return bool(self._graph.added or self._unchecked)

    def representatives(self) -> list[int]:
        """Return labels in the graph, one of those whose vectors are equal or nearly equal."""
        with self._lock.read():
            return self._graph.representatives()

    def catch_up(self, stored: Labels, read: ReadVectors) -> None:
        """Hold exactly the labels that are stored, ascending: what a snapshot misses waits in the buffer."""
        with self._lock.write():
            # First, since the last vector of a group takes its leader with it.
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
        """Take over what one write of the store did; writes must come in the store's order.

        Args:
            added: new labels, int64 (n,), ascending.
            vectors: their prepared vectors, float32 (n, dimensions).
            removed: labels that are gone.
        """
        with self._lock.write():
            self._buffer.add(added, vectors)
            self._forget(removed)

    def remove(self, labels: set[int]) -> None:
        """Take over that labels are gone from the store."""
        with self._lock.write():
            self._forget(labels)

    def search(self, queries: Matrix, k: int, ef: int) -> list[Candidates | None]:
        """Search for prepared queries, float32 (queries, dimensions).

        Args:
            queries: the queries.
            k: how many labels to find for each.
            ef: candidates that the graph search keeps, at least k.

        Returns:
            What was found for each; None where the graph cannot tell and vectors must be compared one by one.
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
        """Return the labels that a search may find."""
        with self._lock.read():
            return self._graph.labels() | self._buffer.labels()

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the prepared vectors, float32 (dimensions,), of those labels that a search may find."""
        with self._lock.read():
            return self._graph.held(labels) | self._buffer.held(labels)

    def drain(self, most: int, stop: Callable[[], bool]) -> int:
        """Move what waits now to the graph, at most so many, slice by slice; return how many were moved."""
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
        """Search for every node by its own vector, if there are many more than at the last check.

        With `at_rest`, one more is enough.

        One that is not found is compared with every query from then on. Searches and writes go on meanwhile. A check
        that is stopped goes on at the next call. Must not run beside `drain`.
        """
        if not self._unchecked:
            with self._lock.read():
                growth = _CHECK_GROWTH if self._graph.has_misses else _SOUND_CHECK_GROWTH
                has_grown = self._graph.to_check >= max(1, growth * self._graph.checked)
                if not has_grown and not (at_rest and self._graph.added):
                    return
                self._unchecked = self._graph.check_begins()
        while self._unchecked:
            if stop():
                return
            with self._lock.write():
                self._graph.check(self._unchecked[-_CHECKED_AT_ONCE:])
            del self._unchecked[-_CHECKED_AT_ONCE:]
        with self._lock.write():
            self._graph.check_ends()

    def probe(self) -> float:
        """Search for a sample of the nodes by their own vectors; return the share that was not found.

        As with `check`, those are compared with every query from then on.
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
        """Compare the vectors of labels with every query, since searches of the graph miss them."""
        with self._lock.write():
            self._graph.compare_always(labels)

    def rebuild(
        self, read: ReadVectors, stop: Callable[[], bool], most_waiting: int = 4000, *, shuffled: bool = False
    ) -> bool:
        """Build a graph of what is live, beside the one that answers, and put it in its place.

        Must not run beside `drain`.

        Args:
            read: reads the vectors.
            stop: whether to leave it.
            most_waiting: if more wait than that, the old graph takes them in meanwhile, so that searches stay quick.
            shuffled: whether to insert them in random order, instead of that of their labels, and to make a graph for
                each shell, since many nodes were cut off.

        Returns:
            Whether it was finished.
        """
        shells = self._fitted_shells(read) if shuffled else self._graph.shells
        graph = Graph(self._spec, self._graph.live, shells=shells)
        taken: set[int] = set()
        # What the old graph took in meanwhile must be in the new one too; that is less each time.
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
            # Later nodes took the links of some, and the next check of all may be long in coming.
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

    def _check_new(self, graph: Graph, stop: Callable[[], bool], most_waiting: int) -> bool:
        """Check all nodes of a graph that no one else has; return whether that was finished."""
        names = graph.check_begins()
        for start in range(0, len(names), _CHECKED_AT_ONCE):
            if stop():
                return False
            graph.check(names[start : start + _CHECKED_AT_ONCE])
            if self.waiting > most_waiting:
                self.drain(_READ_BATCH, stop)
        graph.check_ends()
        return True

    def save(self, path: Path) -> Saving:
        """Begin to write the graph as it stands; searches and writes go on meanwhile."""
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
            # An empty graph needs no ef; without this its first search would set one for nothing.
            if not self._graph.live or self._graph.ef == ef:
                return self._search_both(queries, k, ef)
        # ef belongs to the whole graph: with the lock held alone, nobody else finds less, or waits longer, than asked.
        with self._lock.write():
            self._graph.set_ef(ef)
            return self._search_both(queries, k, ef)

    def _search_both(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        """Search graph and buffer, and merge what they found; the caller holds the lock."""
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
