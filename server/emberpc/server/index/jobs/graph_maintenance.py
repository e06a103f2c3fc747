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

#: Once it has begun, the graph is filled from the buffer until the buffer has at most this share of its limit.
_REST_SHARE = 1 / 16
#: A graph with a greater share of deleted nodes is rebuilt: inserts cost 1.5 times as much at a third.
_MAX_DEAD_SHARE = 0.25
#: A graph with a greater share of strays is rebuilt in another order: every search compares all strays.
_MAX_STRAY_SHARE = 0.02
#: This many strays cost a search less than 5 %.
_FEW_STRAYS = 100
#: A graph that cuts off a greater share of a sample is rebuilt in shells before more vectors are added.
_MAX_MISSED_SHARE = 0.02
#: Vectors in the graph at the first sample; the next sample follows at 1.5 times as many.
_FIRST_SAMPLE = 1000
_SAMPLE_GROWTH = 1.5
#: Share of the time that checks of a graph without writes may take: 100,000 nodes take some 5 s.
_CHECK_SHARE = 0.01
_SNAPSHOT_TRIES = 3
#: A snapshot writes the whole graph, so a large graph is saved only when this share of it is new.
_NEW_SHARE = 0.25


@dataclass(frozen=True)
class MaintenanceLimits:
    """When vectors move from the buffer to the graph, and when the graph is saved."""

    #: Number of vectors in the buffer from which they are moved to the graph. A collection with fewer vectors has no
    #: graph, so its searches are exact. Comparing a full buffer takes four times as long as searching the graph, so
    #: the buffer is full for a short time only.
    buffer_limit: int = 4000
    #: Least number of vectors that are inserted into the graph between snapshots: some 10 to 20 seconds' work.
    snapshot_every: int = 20_000
    #: Seconds without a write after which the graph is filled with the whole buffer.
    rest_seconds: float = 1.0


class GraphMaintenance:
    """Maintains a collection's graph; only one thread at a time may call `run`.

    Args:
        spec: the spec of the collection.
        folder: the folder of its snapshots.
        store: its records.
        neighbours: its vectors in memory.
        read: reads vectors from the store.
        limits: limits that decide when each step is due.
        stop: whether to end at the next slice, since the collection is about to be closed.
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
        #: Vectors in the graph when it was last rebuilt because of strays.
        self._size_shuffled = 0
        #: Vectors in the graph when a sample was last checked.
        self._size_sampled = 0
        self._last_write = time.monotonic()
        #: When a graph without writes may be checked again.
        self._next_check = 0.0
        self.ef_chooser = EfChooser(folder, neighbours)

    def note_write(self) -> None:
        """Note the time of a write."""
        self._last_write = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether maintenance is due now."""
        return (
            self._neighbours.waiting > self._limits.buffer_limit
            or self._neighbours.dead_share > _MAX_DEAD_SHARE
            or self.ef_chooser.due
        )

    @property
    def due_at_rest(self) -> float | None:
        """Seconds without a write after which maintenance is due; None if it is not."""
        if self._neighbours.waiting and self._neighbours.graph_size:
            return self._limits.rest_seconds
        if self._neighbours.needs_check:
            return max(self._limits.rest_seconds, self._next_check - time.monotonic())
        return None

    def run(self) -> None:
        """Run all maintenance that is due; takes long, and searches and writes may run meanwhile."""
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
        """Whether the graph is unchanged since the last snapshot."""
        return not self._unsaved

    def save(self) -> None:
        """Save a snapshot if the graph changed since the last; skipped while `run` runs, which takes long."""
        if self._unsaved and self._lock.acquire(blocking=False):
            try:
                self.snapshot()
            finally:
                self._lock.release()

    def snapshot(self) -> None:
        """Save a snapshot; a failure is logged."""
        for tries_left in reversed(range(_SNAPSHOT_TRIES)):
            try:
                snapshots.save(self._neighbours.save, self._spec, self._store.identity(), self._folder)
                self._unsaved = 0
            except (OSError, RuntimeError) as error:
                if tries_left and isinstance(error, ChildKilledError):
                    continue
                # Nothing is lost: at the next start the graph is built from the store, which only takes longer.
                log.warning("collection %s: no snapshot: %s", self._spec.name, error)
            return

    def _drain(self) -> None:
        """Move vectors from the buffer to the graph if the buffer is too full; if writes have stopped, all of them."""
        if self._neighbours.waiting <= self._limits.buffer_limit and not self._rests():
            return
        least = self._limits.buffer_limit * _REST_SHARE
        while moved := self._neighbours.drain(min(self._between_snapshots, self._until_sample), self._stop):
            self._unsaved += moved
            self._snapshot_if_due()
            if self._neighbours.graph_size >= max(_FIRST_SAMPLE, _SAMPLE_GROWTH * self._size_sampled):
                self._size_sampled = self._neighbours.graph_size
                if self._neighbours.probe() > _MAX_MISSED_SHARE:
                    # Searches miss many vectors of the sample. Rebuild now: more inserts into this graph are wasted
                    # work.
                    self._rebuild_if_due(misses=True)
            if self._neighbours.waiting <= least:
                return

    @property
    def _until_sample(self) -> int:
        """Vectors that may be inserted before the next sample."""
        wanted = max(_FIRST_SAMPLE, int(_SAMPLE_GROWTH * self._size_sampled))
        return max(1000, wanted - self._neighbours.graph_size)

    def _rebuild_if_due(self, *, misses: bool = False) -> None:
        """Rebuild the graph if many nodes are deleted or strays, or if searches miss many of a sample."""
        limit = self._limits.buffer_limit
        shuffled = self._has_many_strays() or (misses and self._may_get_better())
        if not shuffled and self._neighbours.dead_share <= _MAX_DEAD_SHARE:
            return
        if self._neighbours.rebuild(self._read, self._stop, limit, shuffled=shuffled):
            # The whole graph is new.
            self._unsaved = self._between_snapshots
            self.ef_chooser.forget()
        if shuffled:
            self._size_shuffled = self._neighbours.graph_size

    def _check(self, stop: Callable[[], bool]) -> None:
        """Check all nodes if the graph grew much, or if it grew at all, no records are written and a check is due.

        Checks without writes are spaced so that they take at most `_CHECK_SHARE` of the time.
        """
        start = time.monotonic()
        self._neighbours.check(stop, at_rest=self._no_writes() and start >= self._next_check)
        end = time.monotonic()
        self._next_check = max(self._next_check, end + (end - start) / _CHECK_SHARE)

    def _has_many_strays(self) -> bool:
        """Return whether a rebuild may reduce strays; not if the last attempt had nearly the same vectors."""
        share, size = self._neighbours.stray_share, self._neighbours.graph_size
        return share > max(_MAX_STRAY_SHARE, _FEW_STRAYS / max(1, size)) and self._may_get_better()

    def _may_get_better(self) -> bool:
        """Return whether the graph has many more vectors than when it was last rebuilt because of strays."""
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
