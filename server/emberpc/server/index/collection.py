"""A collection of the embedded index: records in the store, and their vectors in memory for searches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from emberpc.server.collections.filters import MISMATCH_RECORDS, Filter, mismatches
from emberpc.server.collections.metric import check_vectors, prepare
from emberpc.server.collections.types import (
    MAX_RESPONSE_BYTES,
    WHOLE_RECORD,
    Change,
    Cluster,
    CollectionInfo,
    CollectionSpec,
    DuplicatePair,
    Matrix,
    NewRecord,
    Piece,
    ProbeFigures,
    RecordParts,
    StoredRecord,
    Verified,
    WriteResult,
    check_page_size,
)
from emberpc.server.collections.validation import check_records
from emberpc.server.errors import ServiceError, invalid, items_of
from emberpc.server.index.call_gate import CallGate
from emberpc.server.index.jobs.backup import copy_of, pieces
from emberpc.server.index.jobs.clusters import cluster_records
from emberpc.server.index.jobs.duplicates import find_duplicates
from emberpc.server.index.jobs.graph_maintenance import MaintenanceLimits
from emberpc.server.index.jobs.verify import Verifier
from emberpc.server.index.lifecycle import Lifecycle
from emberpc.server.index.open_collections import OpenCollections
from emberpc.server.index.search.probe import Probe
from emberpc.server.index.search_methods import SearchMethods
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import DISK_FULL, Reserve
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

#: Expired records that are deleted in one write; other writes can run between two.
_EXPIRED_AT_ONCE = 1000


class Collection(Lifecycle, SearchMethods):
    """A set of records with comparable vectors. Safe to use from several threads.

    While there are no calls, `close_idle` can free its files and memory; the next call opens it again.

    Every method may raise `ServiceError`: INVALID_ARGUMENT for bad input, INTERNAL if the database fails or the
    collection cannot be opened again, RESOURCE_EXHAUSTED if no file descriptor is free, UNAVAILABLE after the
    collection is closed for good or deleted.

    Args:
        spec: the spec of the collection.
        folder: the folder with its data.
        created: when it was created.
        wake: called when maintenance is due.
        wake_at_rest: called when maintenance will be due after this many seconds without another such call.
        expire_at: called with the time of the next expiry, in seconds since 1970.
        cache: cache of recently returned records.
        reserve: disk space for deletions on a full disk.
        open_collections: all open collections; it may close this one by `close_idle`.
        maintenance_limits: limits that decide when graph maintenance is due.
        probe_share: share of the searches that are repeated exactly to measure recall.
        max_response_bytes: limit of the bytes of the records in one response.
        create: create its files; the folder must exist and be empty.
    """

    def __init__(
        self,
        spec: CollectionSpec,
        folder: Path,
        created: datetime,
        wake: Callable[[Collection], None],
        wake_at_rest: Callable[[Collection, float], None],
        expire_at: Callable[[Collection, float], None],
        cache: RecordCache,
        reserve: Reserve,
        open_collections: OpenCollections,
        *,
        maintenance_limits: MaintenanceLimits,
        probe_share: float = 0,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        create: bool = False,
    ) -> None:
        self.spec = spec
        self._folder = folder
        self.created = created
        self._wake = lambda: wake(self)
        self._wake_at_rest: Callable[[float], None] = lambda seconds: wake_at_rest(self, seconds)
        self._expire_at: Callable[[float], None] = lambda when: expire_at(self, when)
        self._cache = cache
        self._open_collections = open_collections
        self._reserve = reserve
        self._max_response_bytes = max_response_bytes
        self._maintenance_limits = maintenance_limits
        self._create = create
        self._calls = CallGate(f"collection {spec.name!r}", self._open, self._release)
        #: Held during a write and its application to memory, so that memory sees the writes in the store's order.
        self._write_lock = threading.Lock()
        self._probe = Probe(probe_share)
        #: The last `info` while the collection is closed.
        self._closed_info: CollectionInfo | None = None
        try:
            with self._calls.enter():
                pass
        except ServiceError as error:
            # It stays closed. Only a deletion may use the reserve to open it.
            if create or error.reason != DISK_FULL:
                raise

    def info(self) -> CollectionInfo:
        """Return record count, sequence, creation time and size; does not open a closed collection."""
        self._calls.check()
        info = self._closed_info
        if info is None:
            with self._calls.enter():
                info = self._info()
        return replace(info, create_time=self.created)

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those with the same ids; all or none, and on disk when this returns.

        Args:
            records: the records, at least one, with distinct ids.
            vectors: float32 (records, dimensions).
            expected_revisions: the expected present revision of each record, 0 for a missing record; None: no check.

        Raises:
            ServiceError: besides the usual, ABORTED if a revision differs, RESOURCE_EXHAUSTED if the disk is full.
        """
        documents = check_records(records)
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        if len(vectors) != len(records):
            raise invalid("vectors", f"has {len(vectors)} vectors for {len(records)} records; give one for each")
        prepared = prepare(vectors, self.spec.distance)
        with self._writing():
            change = self._store.upsert(records, documents, vectors, expected_revisions)
            self._neighbours.change(change.added, prepared, change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        lives = [record.time_to_live for record in records if record.time_to_live is not None]
        if lives:
            self._expire_at(time.time() + min(lives))
        return WriteResult(change.sequence, change.inserted, change.updated)

    def copy(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Write records of another collection unchanged, with their revisions and times.

        Args:
            records: the records, with distinct ids.
            vectors: float32 (records, dimensions), which replace the records' own vectors.
        """
        documents = [record.document for record in records]
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        prepared = prepare(vectors, self.spec.distance)
        with self._writing():
            change = self._store.copy(records, documents, vectors)
            self._neighbours.change(change.added, prepared, change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        expiries = [record.expire_time.timestamp() for record in records if record.expire_time is not None]
        if expiries:
            self._expire_at(min(expiries))

    def written_after(self, label: int, count: int) -> list[tuple[int, StoredRecord]]:
        """Return at most `count` pairs of label and record with labels above `label`, in the order of writing."""
        with self._calls.enter():
            return self._store.written_after(label, count)

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the revisions of the existing records among the ids."""
        with self._calls.enter():
            return self._store.revisions(ids)

    def count_without_text(self) -> int:
        """Return the number of records without text."""
        with self._calls.enter():
            return self._store.count(Clause("text = ''"))

    @contextmanager
    def frozen(self) -> Iterator[int]:
        """Block writes during the block; yields the sequence of the last write."""
        with self._writing():
            yield self._store.sequence()

    def replace(self, sequence: int) -> None:
        """Continue the sequence of a collection that this one replaces, given by its last write."""
        with self._writing():
            self._store.set_sequence(sequence)
            self._selector.note(sequence, ())

    def end_calls(self) -> None:
        """Admit no more calls, and make long calls stop. Calls in progress can still read."""
        self._calls.begin_end()

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id in one write, on disk when this returns; missing ids are ignored."""
        return self._delete(lambda: self._store.delete(ids))

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a filter in one write, on disk when this returns."""
        return self._delete(lambda: self._store.delete_matching(self._store.compile(condition) or EVERYTHING))

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the existing records among the ids, in their order; vectors as they were given.

        Args:
            ids: the ids.
            with_vectors: whether the records contain their vectors.
            parts: parts of a record that they must contain; they may contain more.
        """
        with self._calls.enter(), self._store.response_bytes.limited(parts):
            found = self._store.get(ids, with_vectors=with_vectors)
        return [found[record_id] for record_id in ids if record_id in found]

    def page(
        self,
        page_size: int,
        page_token: str,
        *,
        with_vectors: bool = False,
        condition: Filter | None = None,
        parts: RecordParts = WHOLE_RECORD,
    ) -> tuple[list[StoredRecord], str]:
        """Return a page of records in byte order of ids, and the token of the next page, empty after the last.

        With a filter, only records that meet it. A page has fewer records if these reach the limit of the response's
        bytes.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        with self._calls.enter(), self._store.response_bytes.limited(parts):
            clause = self._store.compile(condition) or EVERYTHING
            found, cut = self._store.page(after, page_size + 1, with_vectors=with_vectors, condition=clause)
        records = found[:page_size]
        more = cut or len(found) > page_size
        return records, encode_token(records[-1].id) if more else ""

    def mismatches(self, condition: Filter) -> list[str]:
        """Return why a filter without matches probably matches nothing, by the metadata of the first records."""
        with self._calls.enter(), closing(self._store.metadata(MISMATCH_RECORDS)) as documents:
            return mismatches(condition, documents)

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records, or of those that meet a filter."""
        with self._calls.enter():
            return self._store.count(self._store.compile(condition) or EVERYTHING)

    @property
    def probed(self) -> ProbeFigures:
        """Figures of the probes of its searches."""
        return self._probe.figures

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check every record while calls continue: it exists, is undamaged and is found; some hundred records a step.

        Args:
            full: whether to search for every record by its own vector; otherwise for a random sample.
        """
        with self._calls.enter():
            verifier = Verifier(self._store, self._neighbours, self._write_lock, self.spec, full)
        steps = verifier.steps()
        while True:
            with self._calls.enter():
                # The collection may have been closed and opened again since the last step.
                verifier.store, verifier.neighbours = self._store, self._neighbours
                step = next(steps, None)
            if step is None:
                return
            yield step

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Yield a copy of one state of the collection, piece by piece; errors come before the first piece."""
        with self._calls.enter(stop) as ends:
            copy = copy_of(self._folder, self.spec, self.created, ends)
        yield from pieces(copy)

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Find pairs of duplicate records; see `find_duplicates`."""
        with self._calls.enter(stop) as ends:
            return find_duplicates(self.spec, self._store, self._neighbours, min_score, ends)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Cluster the records by similarity; see `cluster_records`."""
        with self._calls.enter(stop) as ends, self._store.response_bytes.limited():
            return cluster_records(self.spec, self._store, count, examples, ends)

    def maintain(self) -> None:
        """Move vectors from the buffer to the graph, and rebuild the graph or the word index if needed.

        Takes long; searches and writes continue meanwhile. Ends early when the collection is about to be closed. A
        closed collection stays closed: it requests the maintenance that is due when it is opened.
        """
        if not self._calls.begin_maintenance():
            return
        try:
            if self._store.words_suspect:
                with self._write_lock:
                    self._store.build_words()
            self._graph_maintenance.run()
            if (seconds := self._graph_maintenance.due_at_rest) is not None:
                self._wake_at_rest(seconds)
            self._probe.run(self._searcher.search, lambda ids: self._store.get(ids, with_vectors=False))
        finally:
            self._calls.finish_maintenance()

    def expire(self) -> float | None:
        """Delete expired records; return when the next one expires, in seconds since 1970, or None."""
        while self._delete(lambda: self._store.delete_expired(_EXPIRED_AT_ONCE)).deleted == _EXPIRED_AT_ONCE:
            pass
        with self._calls.enter():
            return self._store.next_expiry()

    def _delete(self, delete: Callable[[], Change]) -> WriteResult:
        with self._reserve.for_deletion(), self._writing():
            change = delete()
            self._neighbours.remove(change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        return WriteResult(change.sequence, deleted=len(change.removed))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._calls.enter(), self._write_lock:
            # The collection may have been replaced while this thread waited; writes to the old one would be lost.
            self._calls.check()
            yield
