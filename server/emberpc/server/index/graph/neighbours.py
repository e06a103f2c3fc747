"""The vectors of a collection in memory: the graph, and the buffer of vectors that are not in the graph yet.

A label is the number of the record that a vector belongs to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from emberpc.bundle.cores import usable_cores
from emberpc.server import cancellation
from emberpc.server.collections.metric import best_of
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix, Plan, SearchStrategy
from emberpc.server.index.graph.buffer import Buffer
from emberpc.server.index.graph.hnsw import GraphError
from emberpc.server.index.graph.persistent_graph import PendingSave, PersistentGraph
from emberpc.server.index.graph.read_write_lock import ReadWriteLock
from emberpc.server.index.graph.shells import Shells, fitted

#: Maximum number of vectors that one step inserts into the graph: a step takes some 5 to 15 ms, and searches wait
#: meanwhile, except for steps of a new graph.
_SLICE = 16
#: Number of cores that the server may use; computed once, since it is read from files of the operating system.
_CORES = usable_cores()
#: Maximum number of queries of a turn: after each turn, a search gives the lock to a waiting writer. 32 queries for
#: each core.
_QUERIES_PER_TURN = 32 * _CORES
#: Greatest ef at which a turn may have `_QUERIES_PER_TURN` queries. With a greater ef each query takes longer, so the
#: limit is divided by ef / `_EF_PER_QUERY`, but it is at least one query for each core.
_EF_PER_QUERY = 1000
#: Number of labels whose vectors are read from the store at a time; also the maximum number of vectors that a rebuild
#: moves from the buffer to the old graph at a time, and the maximum number from which shells are computed.
_READ_BATCH = 2000
#: Maximum number of nodes that one step of a check searches for: about 1 ms for all of them. Searches wait meanwhile,
#: except for steps of a new graph.
_CHECKED_AT_ONCE = 32
#: Maximum number of labels of a sample that `probe` checks, to estimate in some milliseconds how many vectors searches
#: miss.
_PROBED = 256
#: A complete check is due when the number of vectors in the graph is this many times the number at the end of the last
#: complete check, since later nodes may take links of earlier nodes. The second factor is used while no node has been
#: missed since the graph was created or loaded (`has_misses` is false), the first factor after that.
_CHECK_GROWTH, _SOUND_CHECK_GROWTH = 1.5, 4.0

#: Function that reads vectors from the store: takes labels, ascending, and returns those whose records exist with an
#: undamaged vector, int64 (n,), ascending, and their prepared vectors, float32 (n, dimensions).
ReadVectors = Callable[[list[int]], tuple[Labels, Matrix]]


class Candidates(NamedTuple):
    """Labels found near a query, nearest first, the score of each label, and the plan of the search.

    `complete` is whether the labels are known to be all labels of the collection or, with a filter, all labels of the
    matching records.
    """

    labels: list[int]
    scores: list[float]
    complete: bool
    plan: Plan


class Neighbours:
    """Holds the vectors of a collection, and searches for the labels nearest to a query.

    Call `catch_up` first. Then searches and writes may run on several threads; `drain`, `check`, `probe` and `rebuild`
    may run beside them, but only one of the four at a time. A query sees every write completely or not at all: graph
    and buffer change under one lock. A search with many queries runs them in turns. Writes may run between the turns,
    so queries of different turns may see different states.

    Args:
        spec: the spec of the collection.
        graph: the graph of a snapshot, or an empty graph.
    """

    def __init__(self, spec: CollectionSpec, graph: PersistentGraph) -> None:
        self._spec = spec
        self._graph = graph
        self._buffer = Buffer(spec.dimensions, spec.distance)
        self._lock = ReadWriteLock()
        #: Ids of the vectors and retained leaders that the complete check in progress has not checked yet; empty
        #: between checks.
        self._unchecked: list[int] = []

    @property
    def waiting(self) -> int:
        """Number of vectors in the buffer."""
        return len(self._buffer)

    @property
    def count(self) -> int:
        """Number of labels in graph and buffer.

        Read without the lock, so approximate while another thread adds, removes or moves vectors.
        """
        return self._graph.live + len(self._buffer)

    @property
    def graph_size(self) -> int:
        """Number of labels outside the buffer: labels of nodes, of members of groups, and of strays."""
        return self._graph.live

    @property
    def dead_share(self) -> float:
        """Share of deleted nodes among all nodes, also in the graphs of groups and strays; 0 if there are no nodes."""
        return self._graph.dead_share

    @property
    def stray_share(self) -> float:
        """Number of strays, divided by the number of strays and of nodes that are not deleted; 0 if there are none.

        Strays are vectors that searches of the graph miss.
        """
        return self._graph.stray_share

    @property
    def needs_check(self) -> bool:
        """Whether a complete check is in progress, or vectors were added to the graph since the last began.

        Searches may miss the added vectors, or vectors whose links these took. Estimated for the graph of a snapshot.
        """
        return bool(self._graph.added or self._unchecked)

    def node_labels(self) -> list[int]:
        """Return labels of different vectors: one of each node, also in the graphs of shells.

        A small shell has no graph: one label of each of its vectors is returned, so some may be nearly equal. Left out
        are the buffer, strays, vectors too short for the graph, and members of groups, even if the leader of the group
        is a stray or was removed.
        """
        with self._lock.read():
            return self._graph.node_labels()

    def catch_up(self, stored: Labels, read: ReadVectors) -> None:
        """Bring the graph of a snapshot to the state of the store; to be called once, before all other methods.

        The vectors that the snapshot's file lacks are read and put into groups and strays. Labels that the store lacks
        are removed, and stored labels that the graph lacks are added to the buffer. Labels for which `read` returns no
        vector stay out.

        Args:
            stored: all labels in the store, int64 (n,), ascending.
            read: reads vectors from the store.
        """
        with self._lock.write():
            # Groups are restored before labels are removed: a leader without labels is deleted if its group is empty.
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
        """Apply one write of the store: add vectors to the buffer, and remove labels; n may be 0.

        The writes must be applied in the order in which the store made them, since labels must grow.

        Args:
            added: new labels, int64 (n,), ascending, above all earlier labels.
            vectors: their prepared vectors, float32 (n, dimensions).
            removed: labels that the write deleted or replaced; missing labels are ignored.
        """
        with self._lock.write():
            self._buffer.add(added, vectors)
            self._forget(removed)

    def remove(self, labels: set[int]) -> None:
        """Remove labels from graph and buffer, so that no search finds them; missing labels are ignored."""
        with self._lock.write():
            self._forget(labels)

    def search(self, queries: Matrix, k: int, ef: int) -> list[Candidates | None]:
        """Search graph and buffer for the labels nearest to each prepared query.

        Args:
            queries: float32 (queries, dimensions).
            k: maximum number of labels to find for each query.
            ef: number of candidates that the search of the graph keeps, at least `k`.

        Returns:
            The candidates for each query, in the order of `queries`. None for all queries of a turn if the graph cannot
            answer one of them: if `k` is at least half of the graph's labels, or links lead to too few nodes. The
            caller can then compare all vectors. A graph without labels always answers: only the buffer is compared.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if the call of this thread is cancelled; checked before each turn.
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
        """Return all labels in graph and buffer."""
        with self._lock.read():
            return self._graph.labels() | self._buffer.labels()

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the prepared vectors, float32 (dimensions,), by label; without labels not in graph or buffer."""
        with self._lock.read():
            return self._graph.held(labels) | self._buffer.held(labels)

    def drain(self, maximum: int, stop: Callable[[], bool]) -> int:
        """Move the oldest vectors, those with the smallest labels, from the buffer to the graph.

        Each step moves at most 16 vectors. Searches and writes may run between the steps.

        Args:
            maximum: maximum number of vectors to move; no more are moved than the buffer has at the start.
            stop: whether to end; called before each step.

        Returns:
            The number of vectors that were moved.
        """
        moved, goal = 0, min(maximum, len(self._buffer))
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
        """Run a complete check: search for every node by its own vector. Do nothing if the graph did not grow enough.

        A check that was interrupted is continued in any case. A node with labels that the searches miss becomes a
        stray, which every search covers. Searches and writes may run meanwhile.

        Args:
            stop: whether to interrupt the check; called before each step of at most 32 nodes. The next call of `check`
                continues it.
            at_rest: whether one vector, added since the last check began, is enough growth. Otherwise the number of
                vectors must have grown by a factor since the end of the last check: `_CHECK_GROWTH`, or
                `_SOUND_CHECK_GROWTH` if no node was missed so far.
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
        """Check a random sample of at most 256 labels outside the buffer: search for their nodes by their own vectors.

        A node that the searches miss becomes a stray, which every search covers. Labels whose vectors are not nodes
        count in the sample, but are not searched for.

        Returns:
            The number of nodes that became strays, divided by the number of labels in the sample; 0 for an empty graph.
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
        """Make strays of the vectors of `labels`; to be called for vectors that searches of the graph miss.

        Every search covers the strays: it compares the query with each stray or, if they are many, searches a graph of
        strays. Ignored are labels in the buffer, missing labels, and vectors that every search compares already.
        """
        with self._lock.write():
            self._graph.compare_always(labels)

    def rebuild(
        self, read: ReadVectors, stop: Callable[[], bool], max_waiting: int = 4000, *, shuffled: bool = False
    ) -> bool:
        """Build a new graph of the labels in the old graph, check it, and replace the old graph.

        Labels for which `read` returns no vector are left out. Searches and writes may run meanwhile. Labels that enter
        or leave the old graph meanwhile also enter or leave the new graph.

        Args:
            read: reads vectors from the store.
            stop: whether to give up; called before each step. The old graph then stays.
            max_waiting: if the buffer has more vectors than this, the rebuild moves up to 2,000 of them to the old
                graph, so that searches stay fast.
            shuffled: if true, batches of 2,000 random vectors are inserted, each batch in the order of labels, and new
                shells are computed; for an old graph whose nodes are often missed by searches. If false, all vectors
                are inserted in the order of labels, and the shells stay.

        Returns:
            Whether the old graph was replaced.
        """
        shells = self._fitted_shells(read) if shuffled else self._graph.shells
        graph = PersistentGraph(self._spec, self._graph.live, shells=shells)
        taken: set[int] = set()
        # The first round inserts all labels, each later round those that the old graph received since the round before.
        # Rounds usually get shorter.
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
                    if self.waiting > max_waiting:
                        self.drain(_READ_BATCH, stop)
            # `add` checked each node after its insertion, but later nodes may have taken its links since. The next
            # complete check may be far off, so check all nodes now. Later rounds are too short for another check.
            if first_round and not self._check_new(graph, stop, max_waiting):
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

    def _check_new(self, graph: PersistentGraph, stop: Callable[[], bool], max_waiting: int) -> bool:
        """Run a complete check of a new graph, which no other thread uses; return False if `stop` ended it early.

        Nodes that searches miss become strays of the new graph. If the buffer has more than `max_waiting` vectors
        meanwhile, up to 2,000 of them are moved to the old graph.
        """
        names = graph.begin_check()
        for start in range(0, len(names), _CHECKED_AT_ONCE):
            if stop():
                return False
            graph.check(names[start : start + _CHECKED_AT_ONCE])
            if self.waiting > max_waiting:
                self.drain(_READ_BATCH, stop)
        graph.end_check()
        return True

    def save(self, path: Path) -> PendingSave:
        """Begin to write the present graph, without the buffer, to a file.

        On Linux the file is written in the background; elsewhere it is written when this returns. The caller must call
        `wait` of the result.

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
            # A graph without labels is not searched, so it needs no ef, and the search no write lock to set ef.
            if not self._graph.live or self._graph.ef == ef:
                return self._search_both(queries, k, ef)
        # hnswlib has one ef for the whole graph, not for each search. Under the write lock, no other search runs with
        # the ef of this search.
        with self._lock.write():
            self._graph.set_ef(ef)
            return self._search_both(queries, k, ef)

    def _search_both(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        """Search graph and buffer with prepared queries; return at most `k` candidates for each query.

        The caller holds the lock, and has set the ef of the graph to `ef`, unless the graph has no labels.

        Raises:
            GraphError: the graph cannot answer one of the queries.
        """
        found = [self._graph.search(queries, k)] if self._graph.live else []
        if len(self._buffer) or not found:
            found.append(self._buffer.search(queries, k))
        labels, scores = best_of(found, k)
        complete = labels.shape[1] == self._graph.live + len(self._buffer)
        used = bool(self._graph.live)
        plan = Plan(SearchStrategy.HNSW if used else SearchStrategy.EXACT, ef if used else 0, len(self._buffer))
        return [
            Candidates(of_query, its_scores, complete, plan)
            for of_query, its_scores in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
