"""Maintenance of a collection's graph: insert vectors, check nodes, rebuild, save snapshots, measure recall."""

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

#: When the buffer has more than `buffer_limit` vectors, vectors are moved to the graph until at most this share of
#: `buffer_limit` remains in the buffer. The share is not 0, so that the moving ends although writes continue.
_REST_SHARE = 1 / 16
#: Greatest share of deleted nodes of a graph; with more the graph is rebuilt. With a third of deleted nodes, an insert
#: takes 1.5 times as long.
_MAX_DEAD_SHARE = 0.25
#: Greatest share of strays among strays and nodes. With more, and more than `_FEW_STRAYS`, the graph is rebuilt,
#: shuffled and in shells, if that may help (`_may_get_better`). Every search covers all strays, so many make it slow.
_MAX_STRAY_SHARE = 0.02
#: Up to about this many strays cause no rebuild, whatever their share: comparing this many makes a search less than
#: 5 % slower. The number is lower in a graph with equal or nearly equal vectors.
_FEW_STRAYS = 100
#: Greatest share of a sample of nodes that searches may miss. If they miss more, the graph is rebuilt, shuffled and in
#: shells, if that may help (`_may_get_better`).
_MAX_MISSED_SHARE = 0.02
#: Number of vectors in the graph from which a sample of its nodes is checked while the graph is filled.
_FIRST_SAMPLE = 1000
#: The next sample is checked when the graph has this many times the vectors that it had at the last sample.
_SAMPLE_GROWTH = 1.5
#: Share of the time that complete checks may take while there are no writes, apart from checks after much growth. A
#: check of 100,000 nodes takes some 5 s.
_CHECK_SHARE = 0.01
#: Maximum number of attempts to write a snapshot. Another follows only if a signal ended the process that wrote the
#: file.
_SNAPSHOT_TRIES = 3
#: While a graph is filled, a snapshot is saved only after inserts of at least this share of the graph's vectors, since
#: a snapshot writes the whole graph.
_NEW_SHARE = 0.25


@dataclass(frozen=True)
class MaintenanceLimits:
    """Limits that decide when vectors move from the buffer to the graph, and when a snapshot of the graph is saved."""

    #: With more vectors than this in the buffer, most of them are moved to the graph. A collection that never had more
    #: vectors than this has no graph, so its searches are exact. Comparing a full buffer takes four times as long as
    #: searching the graph, but with a graph the buffer is full for a short time only.
    buffer_limit: int = 4000
    #: While a graph is filled, a snapshot is saved after this many inserts, or after `_NEW_SHARE` of the graph if that
    #: is more. A rebuild, and closing after any insert, also save one. After a crash, vectors that the last snapshot
    #: lacks are inserted again: 20,000 in 10 to 20 s.
    snapshot_every: int = 20_000
    #: Seconds without a write after which the vectors of the buffer are moved to the graph, if there is a graph, and
    #: the graph may be checked.
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
        stop: whether to end `run` early, since the collection is about to be closed for good or deleted; called
            between the steps of `run`, but not while a snapshot is written.
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
        #: Number of vectors in the graph at the end of the last shuffled rebuild, finished or not, since the opening;
        #: 0: there was none.
        self._size_shuffled = 0
        #: Number of vectors in the graph when a sample of its nodes was last checked; 0: never since the opening.
        self._size_sampled = 0
        self._last_write = time.monotonic()
        #: From when on any growth of the graph suffices for a check while there are no writes, in seconds of
        #: `time.monotonic`. A graph that grew much is checked earlier.
        self._next_check = 0.0
        self.ef_chooser = EfChooser(folder, neighbours)

    def note_write(self) -> None:
        """Note the present time as that of the last write, from which `rest_seconds` count."""
        self._last_write = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether `run` is due now, even during writes.

        It is if the buffer is over its limit, too many nodes are deleted, or recall must be measured. Strays and
        unchecked nodes do not count.
        """
        return (
            self._neighbours.waiting > self._limits.buffer_limit
            or self._neighbours.dead_share > _MAX_DEAD_SHARE
            or self.ef_chooser.due
        )

    @property
    def due_at_rest(self) -> float | None:
        """Seconds from now after which `run` is due if no write comes meanwhile; None: there is nothing to do then.

        Without writes, the rest of the buffer is moved to the graph, if there is one, and vectors added to the graph
        are checked. At least `rest_seconds`, however long ago the last write was; more if checks must pause.
        """
        if self._neighbours.waiting and self._neighbours.graph_size:
            return self._limits.rest_seconds
        if self._neighbours.needs_check:
            return max(self._limits.rest_seconds, self._next_check - time.monotonic())
        return None

    def run(self) -> None:
        """Fill, check, rebuild, save and measure the graph, as far as each step is due.

        This may take minutes; searches and writes may run meanwhile. Ends early if `stop` returns True, but a snapshot
        is written to its end. A second thread that calls `run` waits for the first, and then does what is still due.
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
        """Whether the graph was neither filled nor rebuilt since the opening or, if there was one, the last snapshot.

        Removed vectors and new strays do not count, nor do vectors that a stopped rebuild moved to the graph.
        """
        return not self._unsaved

    def save(self) -> None:
        """Save a snapshot unless `is_saved`; do nothing while `run` or another `save` is in progress.

        If the snapshot cannot be written, this is logged, and `is_saved` stays False.

        Raises:
            ServiceError: the identity of the database cannot be read.
        """
        if self._unsaved and self._lock.acquire(blocking=False):
            try:
                self.snapshot()
            finally:
                self._lock.release()

    def snapshot(self) -> None:
        """Save a snapshot of the graph in the collection's folder; the caller holds the lock of `run`.

        If a signal ends the process that writes the snapshot, there are at most two more attempts. An error of writing
        is only logged; `is_saved` stays as it was.

        Raises:
            ServiceError: the identity of the database cannot be read.
        """
        for tries_left in reversed(range(_SNAPSHOT_TRIES)):
            try:
                snapshots.save(self._neighbours.save, self._spec, self._store.identity(), self._folder)
                self._unsaved = 0
            except (OSError, RuntimeError) as error:
                if tries_left and isinstance(error, ChildKilledError):
                    continue
                # The store has all vectors. The next opening reads those that the last usable snapshot lacks, which
                # takes longer.
                log.warning("collection %s: no snapshot: %s", self._spec.name, error)
            return

    def _drain(self) -> None:
        """Move vectors from the buffer to the graph if the buffer is over its limit, or at rest if there is a graph.

        At rest means that no write came for `rest_seconds`.

        Meanwhile save snapshots that become due, and check samples of the nodes. If searches miss too many nodes of a
        sample, and a rebuild may help, rebuild the graph.
        """
        if self._neighbours.waiting <= self._limits.buffer_limit and not self._rests():
            return
        minimum = self._limits.buffer_limit * _REST_SHARE
        while moved := self._neighbours.drain(min(self._between_snapshots, self._until_sample), self._stop):
            self._unsaved += moved
            self._snapshot_if_due()
            if self._neighbours.graph_size >= max(_FIRST_SAMPLE, _SAMPLE_GROWTH * self._size_sampled):
                self._size_sampled = self._neighbours.graph_size
                if self._neighbours.probe() > _MAX_MISSED_SHARE:
                    # Searches miss many nodes of the sample. If a rebuild may help, it comes now, since more inserts
                    # into the old graph would be wasted.
                    self._rebuild_if_due(misses=True)
            if self._neighbours.waiting <= minimum:
                return

    @property
    def _until_sample(self) -> int:
        """Maximum number of vectors to insert before the next look whether a sample of nodes is due.

        Enough to reach the size at which a sample is due, but at least 1000.
        """
        wanted = max(_FIRST_SAMPLE, int(_SAMPLE_GROWTH * self._size_sampled))
        return max(1000, wanted - self._neighbours.graph_size)

    def _rebuild_if_due(self, *, misses: bool = False) -> None:
        """Rebuild the graph if too many nodes are deleted, or too many vectors are strays and a rebuild may help.

        If `stop` returns True, the old graph stays.

        Args:
            misses: whether searches missed too many nodes of a sample. Then the graph is rebuilt too if that may help
                (`_may_get_better`).
        """
        limit = self._limits.buffer_limit
        shuffled = self._has_many_strays() or (misses and self._may_get_better())
        if not shuffled and self._neighbours.dead_share <= _MAX_DEAD_SHARE:
            return
        if self._neighbours.rebuild(self._read, self._stop, limit, shuffled=shuffled):
            # The whole graph is new, so make a snapshot due.
            self._unsaved = self._between_snapshots
            self.ef_chooser.forget()
        if shuffled:
            self._size_shuffled = self._neighbours.graph_size

    def _check(self, stop: Callable[[], bool]) -> None:
        """Check that searches find all nodes of the graph, if the graph grew much since the last check.

        Nodes that searches miss become strays. An interrupted check is continued in any case. While there are no
        writes, any growth is enough for a check, after a pause that limits these checks to `_CHECK_SHARE` of the time.

        Args:
            stop: whether to interrupt the check; the next call continues it.
        """
        start = time.monotonic()
        self._neighbours.check(stop, at_rest=self._no_writes() and start >= self._next_check)
        end = time.monotonic()
        self._next_check = max(self._next_check, end + (end - start) / _CHECK_SHARE)

    def _has_many_strays(self) -> bool:
        """Return whether there are too many strays, and a rebuild may reduce their number (`_may_get_better`)."""
        share, size = self._neighbours.stray_share, self._neighbours.graph_size
        return share > max(_MAX_STRAY_SHARE, _FEW_STRAYS / max(1, size)) and self._may_get_better()

    def _may_get_better(self) -> bool:
        """Return whether the graph has at least 1.5 times the vectors that it had after its last shuffled rebuild.

        Stopped rebuilds count, those before the opening do not; True if there was none. With fewer vectors, another
        rebuild would probably give as many strays.
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
