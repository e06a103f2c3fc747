"""Maintenance of a collection's graph in the background: insert, check, rebuild, save and measure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.child_process import ChildKilledError
from emberpc.server.index.graph.neighbours import Neighbours, ReadVectors
from emberpc.server.index.search.ef import EfChooser
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)

#: When the buffer has more than `buffer_limit` vectors, they are moved to the graph until the buffer has at most this
#: share of `buffer_limit`.
_REST_SHARE = 1 / 16
#: Greatest share of deleted nodes of a graph; with more the graph is rebuilt. With a third of deleted nodes, an insert
#: takes 1.5 times as long.
_MAX_DEAD_SHARE = 0.25
#: Greatest share of strays, vectors that searches of the graph miss; with more the graph is rebuilt, shuffled and in
#: shells, if that may help (`_may_get_better`). Every search covers all strays.
_MAX_STRAY_SHARE = 0.02
#: Most strays that never cause a rebuild: comparing this many makes a search less than 5 % slower.
_FEW_STRAYS = 100
#: Greatest share of a sample of nodes that searches may miss. If they miss more, the graph is rebuilt in shells before
#: more vectors are added, if that may help (`_may_get_better`).
_MAX_MISSED_SHARE = 0.02
#: Number of vectors in the graph at which a sample of its nodes is first checked, and the factor for the number at the
#: next check.
_FIRST_SAMPLE = 1000
_SAMPLE_GROWTH = 1.5
#: Share of the time that complete checks may take while there are no writes. A check of 100,000 nodes takes some 5 s.
_CHECK_SHARE = 0.01
#: Attempts to write a snapshot, if a signal ends the process that writes it.
_SNAPSHOT_TRIES = 3
#: Least share of a graph's vectors that are inserted between two snapshots, since a snapshot writes the whole graph.
_NEW_SHARE = 0.25


@dataclass(frozen=True)
class MaintenanceLimits:
    """Limits that decide when vectors move from the buffer to the graph, and when a snapshot of the graph is saved."""

    #: Most vectors in the buffer; if there are more, they are moved to the graph. A collection that never had more
    #: vectors than this has no graph, so its searches are exact. Comparing a full buffer takes four times as long as
    #: searching the graph, but the buffer is full for a short time only.
    buffer_limit: int = 4000
    #: Fewest vectors that are inserted into the graph between two snapshots. Inserting this many takes 10 to 20 s. A
    #: rebuild, and closing after any insert, also save a snapshot.
    snapshot_every: int = 20_000
    #: Seconds without a write after which all vectors of the buffer are moved to the graph, if there is a graph.
    rest_seconds: float = 1.0


class GraphMaintenance:
    """Maintains a collection's graph.

    Args:
        spec: the spec of the collection.
        folder: the folder of the collection, where snapshots and measurements of recall are saved.
        store: the records of the collection.
        neighbours: the vectors of the collection in memory.
        read: reads prepared vectors from the store, by label.
        limits: limits that decide when vectors are moved to the graph, and when snapshots are saved.
        stop: whether to stop, since the collection is about to be closed; called every few milliseconds.
    """

    def __init__(
        self,
        spec: CollectionSpec,
        folder: Path,
        store: Store,
        neighbours: Neighbours,
        read: ReadVectors,
        limits: MaintenanceLimits,
        stop: Callable[[], bool],
    ) -> None:
        self._spec = spec
        self._folder = folder
        self._store = store
        self._neighbours = neighbours
        self._read = read
        self._limits = limits
        self._stop = stop
        self._lock = threading.Lock()
        self._unsaved = 0
        #: Number of vectors in the graph at the end of the last shuffled rebuild, finished or not; 0: never.
        self._size_shuffled = 0
        #: Number of vectors in the graph when a sample of its nodes was last checked; 0: never.
        self._size_sampled = 0
        self._last_write = time.monotonic()
        #: From when on any growth of the graph suffices for a check while there are no writes, in seconds of
        #: `time.monotonic`. A graph that grew much is checked earlier.
        self._next_check = 0.0
        self.ef_chooser = EfChooser(folder, neighbours)

    def note_write(self) -> None:
        """Note that the collection was written to now."""
        self._last_write = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether maintenance is due now: a full buffer, too many deleted nodes, or a measurement of recall."""
        return (
            self._neighbours.waiting > self._limits.buffer_limit
            or self._neighbours.dead_share > _MAX_DEAD_SHARE
            or self.ef_chooser.due
        )

    @property
    def due_at_rest(self) -> float | None:
        """Seconds to wait for maintenance that is due only without writes meanwhile; None: there is none.

        At least `rest_seconds`, however long ago the last write was. Maintenance that is `due` at once is left out.
        """
        if self._neighbours.waiting and self._neighbours.graph_size:
            return self._limits.rest_seconds
        if self._neighbours.needs_check:
            return max(self._limits.rest_seconds, self._next_check - time.monotonic())
        return None

    def run(self) -> None:
        """Fill, check, rebuild, save and measure the graph, as far as each step is due.

        This may take minutes; searches and writes continue meanwhile. A second thread that calls `run` waits.
        """
        with self._lock:
            self._drain()
            limit = self._limits.buffer_limit
            self._check(lambda: self._stop() or self._neighbours.waiting > limit)
            self._rebuild_if_due()
            self._snapshot_if_due()
            if self.ef_chooser.due:
                self.ef_chooser.measure(self._store, self._spec.distance, self._stop)

    @property
    def is_saved(self) -> bool:
        """Whether the graph was neither filled nor rebuilt since the last snapshot or since the opening.

        The removal of vectors and new strays do not count.
        """
        return not self._unsaved

    def save(self) -> None:
        """Save a snapshot unless `is_saved`; do nothing while `run` is in progress."""
        if self._unsaved and self._lock.acquire(blocking=False):
            try:
                self.snapshot()
            finally:
                self._lock.release()

    def snapshot(self) -> None:
        """Save a snapshot of the graph in the collection's folder; the caller holds the lock of `run`.

        If the process that writes the snapshot is killed, there are two more attempts. An error of writing is only
        logged.
        """
        for tries_left in reversed(range(_SNAPSHOT_TRIES)):
            try:
                snapshots.save(self._neighbours.save, self._spec, self._store.identity(), self._folder)
                self._unsaved = 0
            except (OSError, RuntimeError) as error:
                if tries_left and isinstance(error, ChildKilledError):
                    continue
                # The store has all vectors: without a snapshot the next start builds the graph from them, and takes
                # longer.
                log.warning("collection %s: no snapshot: %s", self._spec.name, error)
            return

    def _drain(self) -> None:
        """Move vectors from the buffer to the graph, if the buffer is over its limit or writes have stopped.

        Saves snapshots that become due. Checks samples of the nodes, and rebuilds the graph if searches miss too many.
        """
        if self._neighbours.waiting <= self._limits.buffer_limit and not self._rests():
            return
        least = self._limits.buffer_limit * _REST_SHARE
        while moved := self._neighbours.drain(min(self._between_snapshots, self._until_sample), self._stop):
            self._unsaved += moved
            self._snapshot_if_due()
            if self._neighbours.graph_size >= max(_FIRST_SAMPLE, _SAMPLE_GROWTH * self._size_sampled):
                self._size_sampled = self._neighbours.graph_size
                if self._neighbours.probe() > _MAX_MISSED_SHARE:
                    # Searches miss many vectors of the sample, so the graph must be rebuilt. It is rebuilt now, since
                    # more inserts into the old graph would be wasted.
                    self._rebuild_if_due(misses=True)
            if self._neighbours.waiting <= least:
                return

    @property
    def _until_sample(self) -> int:
        """Number of vectors to insert before the next sample of nodes is checked, at least 1000."""
        wanted = max(_FIRST_SAMPLE, int(_SAMPLE_GROWTH * self._size_sampled))
        return max(1000, wanted - self._neighbours.graph_size)

    def _rebuild_if_due(self, *, misses: bool = False) -> None:
        """Rebuild the graph if too many nodes are deleted, or too many vectors are strays and a rebuild may help.

        Args:
            misses: whether searches missed too many nodes of a sample. Then the graph is rebuilt too, unless the last
                attempt had nearly as many vectors.
        """
        limit = self._limits.buffer_limit
        shuffled = self._has_many_strays() or (misses and self._may_get_better())
        if not shuffled and self._neighbours.dead_share <= _MAX_DEAD_SHARE:
            return
        if self._neighbours.rebuild(self._read, self._stop, limit, shuffled=shuffled):
            # The whole graph is new, so a snapshot is due.
            self._unsaved = self._between_snapshots
            self.ef_chooser.forget()
        if shuffled:
            self._size_shuffled = self._neighbours.graph_size

    def _check(self, stop: Callable[[], bool]) -> None:
        """Check that searches find all nodes of the graph, if the graph grew much since the last check.

        Nodes that searches miss become strays. While there are no writes, any growth is enough for a check, but checks
        take at most `_CHECK_SHARE` of the time.

        Args:
            stop: whether to interrupt the check; the next call continues it.
        """
        start = time.monotonic()
        self._neighbours.check(stop, at_rest=self._no_writes() and start >= self._next_check)
        end = time.monotonic()
        self._next_check = max(self._next_check, end + (end - start) / _CHECK_SHARE)

    def _has_many_strays(self) -> bool:
        """Return whether there are too many strays, and a rebuild may reduce their number."""
        share, size = self._neighbours.stray_share, self._neighbours.graph_size
        return share > max(_MAX_STRAY_SHARE, _FEW_STRAYS / max(1, size)) and self._may_get_better()

    def _may_get_better(self) -> bool:
        """Return whether the graph has at least 1.5 times the vectors that it had after its last shuffled rebuild.

        True before the first. With fewer vectors another rebuild would probably have as many strays.
        """
        return self._neighbours.graph_size >= 1.5 * self._size_shuffled

    def _rests(self) -> bool:
        return self.due_at_rest is not None and self._no_writes()

    def _no_writes(self) -> bool:
        return time.monotonic() - self._last_write >= self._limits.rest_seconds

    def _snapshot_if_due(self) -> None:
        if self._unsaved >= self._between_snapshots:
            self.snapshot()

    @property
    def _between_snapshots(self) -> int:
        return max(self._limits.snapshot_every, int(_NEW_SHARE * self._neighbours.graph_size))
