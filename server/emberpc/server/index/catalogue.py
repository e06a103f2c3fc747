"""The embedded index backend: all collections in a data directory, by name."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from emberpc.server.collections.backend import CollectionBackend, ReembeddingBackend, collection_exists, no_collection
from emberpc.server.collections.types import (
    MAX_RESPONSE_BYTES,
    CollectionSpec,
    ProbeFigures,
    check_name,
    check_page_size,
)
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.collection import Collection
from emberpc.server.index.jobs.expiry import ExpiryThread
from emberpc.server.index.jobs.graph_maintenance import MaintenanceLimits
from emberpc.server.index.jobs.maintenance_thread import MaintenanceThread
from emberpc.server.index.open_collections import OpenCollections, derived_limit
from emberpc.server.index.reembedding import Reembedding, already_reembedding, records_without_text, unreplaced
from emberpc.server.index.restoring import Restoration
from emberpc.server.index.storage.data_directory import CatalogueEntry, DataDirectory
from emberpc.server.index.storage.files import new_folder, translated_os_errors
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)


class Index:
    """All collections in a data directory. Safe to use from several threads.

    The name of a collection's folder differs from the collection's name, so that a name can be used again while the
    files of a deleted collection are being removed.

    Most methods may raise `ServiceError`: UNAVAILABLE after the index is closed, INTERNAL if a database or the data
    directory fails, RESOURCE_EXHAUSTED if no file descriptor is free or the disk is full.

    Args:
        data_dir: the data directory; created if it is missing.
        buffer_limit: if a collection's buffer has more vectors, a background thread moves them to the graph.
        snapshot_every: minimum number of inserted vectors between two snapshots of a graph; a rebuild and closing do
            not wait for this many.
        record_cache_bytes: approximate limit of the bytes of the record cache; 0: no cache.
        probe_share: share of the searches that are repeated exactly to measure recall, 0 to 1; 0: none.
        max_response_bytes: limit of the bytes of the records in one response.
        max_collections: limit of the number of collections, which `create` and `restore` check.
        max_open: limit of open collections; calls in progress may exceed it; 0: derived from the descriptors' limit.
        idle_seconds: a collection without a call for this many seconds is closed until its next call; 0: never.

    Raises:
        ServiceError: FAILED_PRECONDITION if the directory cannot be used, is in use, or is of a newer version.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        buffer_limit: int = MaintenanceLimits.buffer_limit,
        snapshot_every: int = MaintenanceLimits.snapshot_every,
        record_cache_bytes: int = 0,
        probe_share: float = 0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        max_collections: int = 10_000,
        max_open: int = 0,
        idle_seconds: float = 0,
    ) -> None:
        self._max_collections = max_collections
        self._maintenance_limits = MaintenanceLimits(buffer_limit, snapshot_every)
        self._probe_share = probe_share
        self._max_response_bytes = max_response_bytes
        self._cache = RecordCache(record_cache_bytes)
        self._lock = threading.RLock()
        self._closed = False
        #: Collections by name that were opened, even if idle and closed, or that a thread opens now without the lock.
        self._open: dict[str, Future[Collection]] = {}
        #: Collections by name that were opened, even if idle and closed; read without the lock.
        self._at_hand: dict[str, Collection] = {}
        self._reembeddings: dict[str, Reembedding] = {}
        self._open_collections = OpenCollections(max_open or derived_limit(), idle_seconds)
        self._maintenance_thread = MaintenanceThread()
        self._expiry_thread = ExpiryThread()
        self._directory = DataDirectory(Path(data_dir))

    def create(self, spec: CollectionSpec) -> Collection:
        """Create an empty collection and return it.

        Raises:
            ServiceError: INVALID_ARGUMENT if the spec is invalid, ALREADY_EXISTS if a collection has the name,
                RESOURCE_EXHAUSTED if the disk is full or there are too many collections.
        """
        spec.check()
        with self._use(), translated_os_errors("no collection was made"):
            self._check_free(spec.name)
            entry, collection = self._new(spec)
            self._enter(entry, collection)
        return collection

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> Restoration:
        """Begin to restore a backup as a new collection; the returned object receives the bytes of the backup.

        Args:
            name: the name of the new collection; the name in the backup is ignored.
            total: bytes of the backup; 0: not known.
            accept: raises ValueError or ServiceError if a collection with the given spec cannot be served.

        Raises:
            ServiceError: INVALID_ARGUMENT if the name is invalid, ALREADY_EXISTS if a collection has it, and
                RESOURCE_EXHAUSTED if there is not enough disk space or there are too many collections.
        """
        check_name(name, "name")
        with self._use():
            self._check_free(name)
            return Restoration(self._directory.collections, name, total, accept, self._adopt)

    def get(self, name: str) -> Collection:
        """Return a collection; open it if it was not opened before. Calls for other collections do not wait for that.

        Raises:
            ServiceError: NOT_FOUND if no collection has the name, INTERNAL if the collection is damaged.
        """
        with self._use():
            opened = self._open.get(name)
            if opened is None:
                entry = self._existing(name)
                opening = self._open[name] = Future()
        if opened is not None:
            return opened.result()
        try:
            collection = self._collection(entry)
        except BaseException as error:
            with self._lock:
                if self._open.get(name) is opening:
                    del self._open[name]
            opening.set_exception(error)
            raise
        opening.set_result(collection)
        with self._lock:
            if self._open.get(name) is opening:
                self._at_hand[name] = collection
        return collection

    def opened(self, name: str) -> Collection | None:
        """Return a collection if it was opened before, else None; never wait."""
        return self._at_hand.get(name)

    def probed(self) -> dict[str, ProbeFigures]:
        """Return the measured recall of searches of each collection that was opened and has been measured, by name."""
        return {name: each.probed for name, each in list(self._at_hand.items()) if each.probed.count}

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return at most `page_size` specs, sorted by name, and the token of the next page, empty after the last page.

        An empty `page_token` gives the first page. INVALID_ARGUMENT if the size is not 1 to 1000 or the token is wrong.
        A collection with a damaged entry has a spec with 0 dimensions.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        with self._use():
            specs = self._directory.specs(after, page_size + 1)
        token = encode_token(specs[page_size - 1].name) if len(specs) > page_size else ""
        return specs[:page_size], token

    def update(self, name: str, truncation: str) -> None:
        """Set the truncation of a collection, "refuse", "end" or "start", and that of its reembedding if there is one.

        Raises:
            ServiceError: NOT_FOUND if no collection has the name, INVALID_ARGUMENT if the truncation is invalid,
                UNAVAILABLE if the collection is replaced meanwhile, RESOURCE_EXHAUSTED if the disk is full.
        """
        collection = self.get(name)
        with self._use(), translated_os_errors("the collection stays as it was"):
            unreplaced(self._open, collection)
            spec = replace(self._existing(name).spec, truncation=truncation)
            spec.check()
            self._directory.update(spec)
            collection.spec = spec
            if (reembedding := self._reembeddings.get(name)) is not None:
                reembedding.target.spec = replace(reembedding.target.spec, truncation=truncation)

    def update_fingerprint(self, name: str, legacy: str, fingerprint: str) -> Collection:
        """Bind a collection to another fingerprint of its model, and return the collection.

        Args:
            name: the name of the collection.
            legacy: the fingerprint that is replaced; a collection with another fingerprint stays unchanged.
            fingerprint: the new fingerprint.

        Raises:
            ServiceError: NOT_FOUND if no collection has the name, UNAVAILABLE if the collection is replaced meanwhile,
                RESOURCE_EXHAUSTED if the disk is full.
        """
        collection = self.get(name)
        with self._use(), translated_os_errors("the collection stays bound as it was"):
            unreplaced(self._open, collection)
            spec = self._existing(name).spec
            if spec.model_fingerprint == legacy:
                spec = replace(spec, model_fingerprint=fingerprint)
                self._directory.update(spec)
                collection.spec = spec
                log.info("collection %s: bound to the bytes of model %s", name, spec.model)
        return collection

    def delete(self, name: str) -> None:
        """Delete a collection and its reembedding; wait for the calls in progress on both, and delete their files.

        Raises:
            ServiceError: NOT_FOUND if no collection has the name.
        """
        with self._use():
            folder = self._directory.folder(name)
            if folder is None:
                raise no_collection(name)
            self.cancel_reembedding(name)
            self._directory.delete(name)
            opened = self._open.pop(name, None)
            self._at_hand.pop(name, None)
        if opened is None or opened.exception() is not None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            opened.result().drop()
        self._directory.reserve.refill()

    def reembed(self, source: CollectionBackend, *, model: str, fingerprint: str, dimensions: int) -> Reembedding:
        """Begin to reembed a collection's records with another model.

        Args:
            source: the collection, as `get` returned it.
            model: name of the new model.
            fingerprint: fingerprint of the new model.
            dimensions: dimensions of the new vectors.

        Raises:
            ServiceError: UNAVAILABLE if the collection was deleted or replaced, FAILED_PRECONDITION if a record has no
                text or a reembedding exists, INVALID_ARGUMENT for bad dimensions, RESOURCE_EXHAUSTED on a full disk.
        """
        if without := unreplaced(self._open, source).count_without_text():
            raise records_without_text(source.spec.name, without)
        with self._use(), translated_os_errors("the collection stays under its model"):
            present = unreplaced(self._open, source)
            if (name := present.spec.name) in self._reembeddings:
                raise already_reembedding(name)
            # The present spec is copied, since UpdateCollection may have changed it while this call waited.
            spec = replace(present.spec, model=model, model_fingerprint=fingerprint, dimensions=dimensions)
            entry, target = self._new(spec)
            with ExitStack() as undo:
                undo.callback(target.drop)
                self._directory.add_reembedding(entry)
                undo.pop_all()
            self._reembeddings[name] = Reembedding(present, target, entry.since)
            return self._reembeddings[name]

    def reembeddings(self) -> list[Reembedding]:
        """Open and return the unfinished reembeddings; cancel those that fail to open for another reason than space."""
        with self._use():
            for entry in self._directory.reembeddings():
                name = entry.spec.name
                try:
                    found = self._reembeddings.get(name) or Reembedding(
                        self.get(name), self._collection(entry), entry.since
                    )
                except ServiceError as error:
                    log.warning("collection %s stays under its model: %s", name, error.message)
                    if error.code is not Code.RESOURCE_EXHAUSTED:  # for lack of space, the next start opens it
                        self._directory.delete_reembedding(name)
                else:
                    self._reembeddings[name] = found
            return list(self._reembeddings.values())

    def switch(self, reembedding: ReembeddingBackend) -> bool:
        """Replace a collection by its reembedded copy, atomically and durably, if the copy has all records.

        Calls in progress finish on the old collection, but long calls and waiting writes fail with UNAVAILABLE; then
        the old files are deleted. Return whether the collection was replaced; if not, records remain or the reembedding
        was cancelled. May raise RESOURCE_EXHAUSTED.
        """
        name = reembedding.spec.name
        own = self._reembeddings.get(name)
        if own is None or own is not reembedding:
            return False
        source, target = own.source, own.target
        own.prune()
        created = source.info().create_time
        with source.frozen() as sequence, self._use():
            if self._reembeddings.get(name) is not own or not own.is_complete():
                return False
            target.replace(sequence)
            self._directory.switch(name)
            target.created = created
            del self._reembeddings[name]
            self._set_open(target)
            source.end_calls()
        source.drop()
        return True

    def cancel_reembedding(self, name: str) -> None:
        """Drop the reembedding of a collection, with its files; do nothing if there is none."""
        with self._use():
            reembedding = self._reembeddings.pop(name, None)
            self._directory.delete_reembedding(name)
        if reembedding is not None:
            reembedding.target.drop()

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop long calls, wait for all calls, save snapshots, close every collection, and unlock the directory.

        Args:
            deadline: until when to wait and to save snapshots; None: without limit. Unless everything is closed, the
                directory stays locked. No acknowledged write is lost.

        Returns:
            Whether everything is closed. A second call has no effect and returns True, whatever the first returned.
        """
        deadline = deadline or Deadline()
        locked = self._lock.acquire(timeout=deadline.seconds_left)
        try:
            if self._closed:
                return True
            self._closed = True
            opened, reembeddings = list(self._open.values()), list(self._reembeddings.values())
        finally:
            if locked:
                self._lock.release()
        collections, closed = [reembedding.target for reembedding in reembeddings], [locked]
        for each in opened:
            try:
                if each.exception(deadline.seconds_left) is None:
                    collections.append(each.result())
            except FutureTimeoutError:  # it is still being opened
                closed.append(False)
        for collection in collections:
            collection.end_calls()  # so that long calls stop, in all collections at once
        with ExitStack() as stack:
            stack.callback(self._give_up_directory, closed)
            stack.callback(lambda: closed.append(self._maintenance_thread.close(deadline)))
            stack.callback(lambda: closed.append(self._expiry_thread.close(deadline)))
            stack.callback(lambda: closed.append(self._open_collections.close(deadline)))
            for collection in collections:
                stack.callback(lambda each: closed.append(each.close(deadline)), collection)
        return all(closed)

    def _give_up_directory(self, closed: list[bool]) -> None:
        if all(closed):  # otherwise the next server would use it while this one still writes
            self._directory.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Hold the lock during the block; raise UNAVAILABLE if the index is closed."""
        with self._lock:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "the index is closed; try again", reason="CLOSED")
            yield

    def _existing(self, name: str) -> CatalogueEntry:
        entry = self._directory.find(name)
        if entry is None:
            raise no_collection(name)
        return entry

    def _check_free(self, name: str) -> None:
        """Raise ALREADY_EXISTS if a collection has the name, RESOURCE_EXHAUSTED at the limit of collections."""
        if self._directory.folder(name) is not None:
            raise collection_exists(name)
        self._directory.check_count(self._max_collections)

    def _new(self, spec: CollectionSpec) -> tuple[CatalogueEntry, Collection]:
        """Check a spec, and create an empty collection in a new folder, which the catalogue does not name yet."""
        spec.check()
        entry = CatalogueEntry(spec, new_folder(self._directory.collections), datetime.now(timezone.utc))
        return entry, self._collection(entry, create=True)

    def _adopt(self, entry: CatalogueEntry) -> Collection:
        """Open a restored collection, which may take long, add it to the catalogue, and return it."""
        collection = self._collection(entry)
        self._enter(entry, collection)
        return collection

    def _enter(self, entry: CatalogueEntry, collection: Collection) -> None:
        """Add a new collection to the catalogue; if that fails, drop it, and raise ServiceError or OSError."""
        with ExitStack() as undo:
            undo.callback(collection.drop)
            with self._use():
                self._check_free(entry.spec.name)
                self._directory.add(entry)
                self._set_open(collection)
            undo.pop_all()

    def _set_open(self, collection: Collection) -> None:
        opened: Future[Collection] = Future()
        opened.set_result(collection)
        self._open[collection.spec.name] = opened
        self._at_hand[collection.spec.name] = collection

    def _collection(self, entry: CatalogueEntry, *, create: bool = False) -> Collection:
        return Collection(
            entry.spec,
            entry.folder,
            entry.since,
            self._maintenance_thread.wake,
            self._maintenance_thread.wake_at_rest,
            self._expiry_thread.note,
            self._cache,
            self._directory.reserve,
            self._open_collections,
            maintenance_limits=self._maintenance_limits,
            probe_share=self._probe_share,
            max_response_bytes=self._max_response_bytes,
            create=create,
        )
