"""Opening and closing of a collection: opening loads the database and the vectors, closing frees them between calls."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from emberpc.server import descriptors
from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import CollectionInfo, CollectionSpec, Labels, Matrix
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.call_gate import CallGate
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.graph.persistent_graph import PersistentGraph
from emberpc.server.index.jobs.graph_maintenance import GraphMaintenance, MaintenanceLimits
from emberpc.server.index.open_collections import OpenCollections
from emberpc.server.index.search.dense import DenseSearcher
from emberpc.server.index.search.filtered import Selector
from emberpc.server.index.search.hybrid import HybridSearcher
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import Reserve
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)


class Lifecycle:
    """Mixin of `Collection` that opens and closes it.

    The attributes that `_open` sets, such as `_store`, exist only while the collection is open: use them only in calls.
    """

    spec: CollectionSpec
    created: datetime
    _folder: Path
    _cache: RecordCache
    _open_collections: OpenCollections
    _reserve: Reserve
    _max_response_bytes: int
    _maintenance_limits: MaintenanceLimits
    _calls: CallGate
    _write_lock: threading.Lock
    #: Whether the next opening must create the database.
    _create: bool
    #: Result of `info` while the collection is closed; None while it is open.
    _closed_info: CollectionInfo | None
    #: Functions that request maintenance now, maintenance after some seconds without a write, and `expire` at a time in
    #: seconds since 1970.
    _wake: Callable[[], None]
    _wake_at_rest: Callable[[float], None]
    _expire_at: Callable[[float], None]
    _store: Store
    _neighbours: Neighbours
    _selector: Selector
    _searcher: DenseSearcher
    _hybrid: HybridSearcher
    _graph_maintenance: GraphMaintenance

    def _open(self) -> None:
        """Open the database, delete expired records, load the graph, and request maintenance if it is due.

        Other collections may be closed to keep the limit of open collections or to free file descriptors.

        Raises:
            ServiceError: INTERNAL if the database is damaged, RESOURCE_EXHAUSTED if no file descriptor is free or the
                disk is full.
        """
        self._open_collections.admit(self)
        try:
            try:
                self._load()
            except ServiceError as error:
                if error.reason != descriptors.SHORTAGE or self._create:
                    raise
                self._open_collections.shrink()
                self._load()
        except BaseException:
            self._open_collections.discard(self)
            raise
        self._create = False
        self._closed_info = None
        self._wake_if_needed()

    def _load(self) -> None:
        self._store = Store(
            self._folder,
            self.spec,
            self._cache,
            self._reserve,
            self._open_collections.shrink,
            max_response_bytes=self._max_response_bytes,
            create=self._create,
        )
        try:
            self._delete_expired_before_use()
            self._neighbours = Neighbours(self.spec, self._snapshot() or PersistentGraph(self.spec))
            self._neighbours.catch_up(self._store.labels(), self._read_vectors)
            self._selector = Selector(self._store, self.spec)
            self._store.on_damage = self._forget_damaged
            self._store.on_suspect_words = self._wake
            next_expiry = self._store.next_expiry()
        except BaseException:
            self._store.close()
            raise
        self._searcher = DenseSearcher(
            self._store, self._neighbours, self._selector, self._write_lock, self.spec.distance
        )
        self._hybrid = HybridSearcher(self._store, self._searcher, self._write_lock)
        self._graph_maintenance = GraphMaintenance(
            self.spec,
            self._folder,
            self._store,
            self._neighbours,
            self._read_vectors,
            self._maintenance_limits,
            self._calls.ending,
        )
        if next_expiry is not None:
            self._expire_at(next_expiry)

    @property
    def last_used(self) -> float:
        """When the last call of the collection ended, in seconds of `time.monotonic`."""
        return self._calls.last_used

    @property
    def is_saved(self) -> bool:
        """Whether closing writes no snapshot: the collection is closed, or its last snapshot has the whole graph."""
        # The attribute may be missing, since another thread may close the collection now.
        maintenance: GraphMaintenance | None = self.__dict__.get("_graph_maintenance")
        return maintenance is None or maintenance.is_saved

    def close_idle(self) -> bool:
        """Close the database if no call is in progress, after saving a snapshot if vectors were inserted.

        The next call opens the collection again. If a call begins while the snapshot is written, or the snapshot cannot
        be written, the collection stays open.

        Returns:
            Whether this closed the collection.
        """
        try:
            if not self._calls.begin_maintenance(idle=True):
                return False
        except ServiceError:  # closed for good
            return False
        try:
            begun = self._calls.begun
            self._graph_maintenance.save()
            if not self._graph_maintenance.is_saved:
                return False
            info = self._info()
        finally:
            self._calls.finish_maintenance()

        def close() -> None:
            self._close_files()
            self._closed_info = info

        return self._calls.suspend(begun, close)

    def close(self, deadline: Deadline | None = None) -> bool:
        """Wait for the calls in progress, save a snapshot if vectors were inserted, and close the database for good.

        Args:
            deadline: until when to wait for the calls; None: without limit. If the calls do not end in time, the
                database stays open. If the deadline has passed when they end, no snapshot is saved, and the next
                opening takes longer.

        Returns:
            Whether the database is closed.
        """
        until = deadline or Deadline()

        def close() -> None:
            if until.seconds_left:
                self._graph_maintenance.save()
            self._close_files()

        closed = self._calls.end(close, until)
        if not closed:
            log.warning("collection %s: calls still run, so its database is not closed", self.spec.name)
        return closed

    def drop(self) -> None:
        """Admit no more calls, wait for those in progress, close the database, and delete the collection's folder."""
        self._calls.end(self._close_files)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _release(self) -> None:
        """Give the connection that this thread's call used for reading back to the pool."""
        self._store.release()

    def _close_files(self) -> None:
        """Close the database, free all memory, and leave the set of open collections; no call may be in progress."""
        self._store.close()
        del self._store, self._neighbours, self._selector, self._searcher, self._hybrid, self._graph_maintenance
        self._open_collections.discard(self)

    def _info(self) -> CollectionInfo:
        with self._store.snapshot():
            count, sequence = self._store.count(), self._store.sequence()
        return CollectionInfo(count, sequence, self.created, self._size())

    def _snapshot(self) -> PersistentGraph | None:
        """Return the graph of the newest usable snapshot of this collection's database, or None.

        If the snapshot is newer than the database, which is then an old copy, give the database a new identity.
        """
        try:
            return snapshots.load(self.spec, self._store.identity(), self._store.newest_label(), self._folder)
        except snapshots.AheadError:
            log.warning("collection %s: its database is older than its graph, which is rebuilt", self.spec.name)
            self._store.take_new_identity()
            return None

    def _delete_expired_before_use(self) -> None:
        """Delete records that expired while the collection was closed; if RESOURCE_EXHAUSTED, only log a warning."""
        try:
            self._store.delete_expired()
        except ServiceError as error:
            # The disk is full, or no descriptor is free. The records can be read, and the deletion is retried later.
            if error.code is not Code.RESOURCE_EXHAUSTED:
                raise
            log.warning("expired records are not deleted yet: %s", error.message)

    def _size(self) -> int:
        size = 0
        try:
            paths = [*self._folder.iterdir()]
        except OSError as error:
            if descriptors.is_shortage(error):
                raise descriptors.shortage() from error
            raise
        for path in paths:
            try:
                size += path.stat().st_size
            except FileNotFoundError:  # an old snapshot, deleted meanwhile
                continue
        return size

    def _read_vectors(self, labels: list[int]) -> tuple[Labels, Matrix]:
        found, vectors = self._store.vectors(labels)
        return found, prepare(vectors, self.spec.distance)

    def _wake_if_needed(self) -> None:
        self._graph_maintenance.note_write()
        if self._graph_maintenance.due or self._store.words_suspect:
            self._wake()
        elif (seconds := self._graph_maintenance.due_at_rest) is not None:
            self._wake_at_rest(seconds)

    def _forget_damaged(self, labels: set[int]) -> None:
        """Exclude damaged records, given by their labels, from searches: remove their vectors and forget selections."""
        self._neighbours.remove(labels)
        self._selector.forget()
