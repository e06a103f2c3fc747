"""Opening and closing of a collection: opening connects to the database and loads the vectors, closing frees both."""

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
    """Mixin of `Collection` that opens and closes the collection.

    The attributes that `_open` sets, such as `_store`, exist only while the collection is open. So use them only within
    calls of `_calls`.
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
    #: Result of `info` while `close_idle` has closed the collection; None while it is open, or was never opened.
    _closed_info: CollectionInfo | None
    #: Requests maintenance as soon as possible.
    _wake: Callable[[], None]
    #: Requests maintenance so many seconds from now, in place of its last such request.
    _wake_at_rest: Callable[[float], None]
    #: Requests `expire` at a time, in seconds since 1970.
    _expire_at: Callable[[float], None]
    _store: Store
    _neighbours: Neighbours
    _selector: Selector
    _searcher: DenseSearcher
    _hybrid: HybridSearcher
    _graph_maintenance: GraphMaintenance

    def _open(self) -> None:
        """Open or create the database, delete expired records, load the vectors, and request maintenance and `expire`.

        Both are requested only if they are needed. Other collections may be closed to keep the limit of open
        collections or to free file descriptors. After an error the collection is closed.

        Raises:
            ServiceError: INTERNAL if the database cannot be opened or is damaged, RESOURCE_EXHAUSTED if no file
                descriptor is free or the disk is full, DEADLINE_EXCEEDED if the call of this thread is cancelled.
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
        self._hybrid = HybridSearcher(self._store, self._searcher, self._write_lock, self.spec.distance)
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
        """When the last call of the collection ended, in seconds of `time.monotonic`; maintenance does not count."""
        return self._calls.last_used

    @property
    def is_saved(self) -> bool:
        """Whether closing would write no snapshot: `GraphMaintenance.is_saved`; True while the collection is closed."""
        # Read like this, since another thread may close the collection now, which deletes the attribute.
        maintenance: GraphMaintenance | None = self.__dict__.get("_graph_maintenance")
        return maintenance is None or maintenance.is_saved

    def close_idle(self) -> bool:
        """Close the database if no call or maintenance is in progress, after saving a snapshot unless `is_saved`.

        The next call opens the collection again. If a call begins before the database is closed, or the snapshot cannot
        be written, the collection stays open.

        Returns:
            Whether this closed the collection; False if it was closed already.

        Raises:
            ServiceError, OSError: the result of `info` cannot be computed; the collection stays open.
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
        """Admit no more calls, wait for those in progress, save a snapshot unless `is_saved`, and close the database.

        Maintenance counts as a call, but ends early.

        Args:
            deadline: until when to wait for the calls; None: without limit. If they do not end in time, the database
                stays open. If the deadline has passed when they end, no snapshot is saved, and the next opening takes
                longer. A snapshot that is begun is completed.

        Returns:
            Whether the database is closed, now or before.
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
        """Admit no more calls, wait without limit for those in progress, close the database, and delete the folder."""
        self._calls.end(self._close_files)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _release(self) -> None:
        """Give the connection for reading back to the pool, if the call of this thread took one."""
        self._store.release()

    def _close_files(self) -> None:
        """Close the database, free graph and buffer, and leave the set of open collections.

        No call may be in progress.
        """
        self._store.close()
        del self._store, self._neighbours, self._selector, self._searcher, self._hybrid, self._graph_maintenance
        self._open_collections.discard(self)

    def _info(self) -> CollectionInfo:
        with self._store.snapshot():
            count, sequence = self._store.count(), self._store.sequence()
        return CollectionInfo(count, sequence, self.created, self._size())

    def _snapshot(self) -> PersistentGraph | None:
        """Return the graph of the newest usable snapshot of this collection's database; None if there is none.

        If a snapshot has labels that the database never assigned, the database is an older copy. The database then gets
        a new identity, so that no snapshot belongs to it, and the result is None.
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
            # The disk is full, or no descriptor is free. Reads need no disk space, and the expiry thread tries again.
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
        """Exclude damaged records, given by their labels, from dense searches.

        Remove their vectors from graph and buffer, and clear the selector's cache.
        """
        self._neighbours.remove(labels)
        self._selector.forget()
