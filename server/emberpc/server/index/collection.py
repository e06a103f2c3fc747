"""A collection of the embedded index: records in SQLite, and their vectors also in memory for searches."""

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
from emberpc.server.index.search_methods import CollectionSearchMethods
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import DISK_FULL, Reserve
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

#: Maximum number of expired records that one write of `expire` deletes. The limit lets other writes run in between.
_EXPIRED_AT_ONCE = 1000


class Collection(Lifecycle, CollectionSearchMethods):
    """A set of records with comparable vectors. Safe to use from several threads.

    While there are no calls, `close_idle` can free the collection's files and memory; later calls open it again.

    Methods may raise `ServiceError`: INVALID_ARGUMENT for bad input, INTERNAL if the database fails or cannot be opened
    again, RESOURCE_EXHAUSTED if no file descriptor is free or the disk is full, DEADLINE_EXCEEDED if the call that the
    thread runs is cancelled, UNAVAILABLE after the collection is closed for good or deleted.

    Args:
        spec: the spec of the collection.
        folder: the folder with the collection's data.
        created: when the collection was created.
        wake: called with this collection when maintenance is due.
        wake_at_rest: called with this collection and seconds; maintenance is due that long after the latest such call.
        expire_at: called with this collection and a time, in seconds since 1970, at which one of its records expires.
        cache: cache of recently returned records, of all collections together.
        reserve: disk space for deletions on a full disk.
        open_collections: the open collections of the server; may close this collection by `close_idle`.
        maintenance_limits: limits that decide when graph maintenance is due.
        probe_share: probability that a search without filters is chosen for an exact repetition, to measure recall.
        max_response_bytes: limit of the bytes of the records in one response.
        create: whether to create the database; the folder must exist and be empty.

    Raises:
        ServiceError: INTERNAL if the database cannot be opened, RESOURCE_EXHAUSTED if no file descriptor is free or, if
            `create`, the disk is full. On a full disk an existing collection stays closed, without an error.
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
        #: Held from before a write changes the store until it has changed memory: both get the writes in one order.
        self._write_lock = threading.Lock()
        self._probe = Probe(probe_share)
        #: Result of `info` while the collection is closed by `close_idle`; None while it is open, or was never opened.
        self._closed_info: CollectionInfo | None = None
        try:
            with self._calls.enter():
                pass
        except ServiceError as error:
            # An existing collection stays closed on a full disk. A deletion can open it later: it may use the reserve.
            if create or error.reason != DISK_FULL:
                raise

    def info(self) -> CollectionInfo:
        """Return record count, sequence of the last write, creation time and bytes of all files of the collection.

        A collection that `close_idle` closed stays closed: count, sequence and bytes are those just before the closing.

        Raises:
            ServiceError: UNAVAILABLE after the collection is closed for good or deleted, RESOURCE_EXHAUSTED if a full
                disk has kept the collection closed since the start.
        """
        self._calls.check()
        info = self._closed_info
        if info is None:
            with self._calls.enter():
                info = self._info()
        return replace(info, create_time=self.created)

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records, or replace those with the same ids: all records or none, on disk when this returns.

        Args:
            records: the records, at least one, with distinct ids.
            vectors: the vector of each record, float32 (records, dimensions), not prepared.
            expected_revisions: the revision that each record must have now, 0 if it must be missing; None: no check.

        Returns:
            The sequence of the write, and the number of inserted and of replaced records.

        Raises:
            ServiceError: INVALID_ARGUMENT if a record or vector is invalid or the numbers of items differ, ABORTED if a
                revision differs from the expected revision, DATA_LOSS if a revision is expected of a record whose
                revision or times are damaged, RESOURCE_EXHAUSTED if the disk is full.
        """
        metadata_texts = check_records(records)
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        if len(vectors) != len(records):
            raise invalid("vectors", f"has {len(vectors)} vectors for {len(records)} records; give one for each")
        prepared = prepare(vectors, self.spec.distance)
        with self._writing():
            change = self._store.upsert(records, metadata_texts, vectors, expected_revisions)
            self._neighbours.change(change.added, prepared, change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        lives = [record.time_to_live for record in records if record.time_to_live is not None]
        if lives:
            self._expire_at(time.time() + min(lives))
        return WriteResult(change.sequence, change.inserted, change.updated)

    def copy(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Write records of another collection with their revisions and times; replace records with the same ids.

        All records are written or none, on disk when this returns. The sequence of the last write does not change.

        Args:
            records: the records, with distinct ids; they are not checked.
            vectors: float32 (records, dimensions), stored instead of the records' own vectors.

        Raises:
            ServiceError: INVALID_ARGUMENT if a vector is invalid, RESOURCE_EXHAUSTED if the disk is full.
        """
        metadata_texts = [record.metadata_text for record in records]
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        prepared = prepare(vectors, self.spec.distance)
        with self._writing():
            change = self._store.copy(records, metadata_texts, vectors)
            self._neighbours.change(change.added, prepared, change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        expiries = [record.expire_time.timestamp() for record in records if record.expire_time is not None]
        if expiries:
            self._expire_at(min(expiries))

    def written_after(self, label: int, count: int) -> list[tuple[int, StoredRecord]]:
        """Return label and record of the first `count` records with labels above `label`, ascending by label.

        A label is here a number that a record gets at each write: a later write gives a greater label. The records have
        no vectors. There may be fewer than `count`. Raise DATA_LOSS if one of them is damaged.
        """
        with self._calls.enter():
            return self._store.written_after(label, count)

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the revisions of those records among `ids` that exist, by id, without a check for damage."""
        with self._calls.enter():
            return self._store.revisions(ids)

    def count_without_text(self) -> int:
        """Return the number of records whose text is empty."""
        with self._calls.enter():
            return self._store.count(Clause("text = ''"))

    @contextmanager
    def frozen(self) -> Iterator[int]:
        """Block all writes to the collection, not reads, during the `with` block; yield the last write's sequence."""
        with self._writing():
            yield self._store.sequence()

    def replace(self, sequence: int) -> None:
        """Set the sequence of the last write to `sequence`, that of the collection that this one will replace."""
        with self._writing():
            self._store.set_sequence(sequence)
            self._selector.note(sequence, ())

    def end_calls(self) -> None:
        """Admit no more calls, for good; let long calls and waiting writes end early. Other reads may go on."""
        self._calls.begin_end()

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id in one write, on disk when this returns; missing ids are ignored.

        Return the sequence of the last write (it grows only if a record is deleted) and the number of deleted records.
        Raise RESOURCE_EXHAUSTED if the disk is full and the reserve for deletions does not suffice.
        """
        return self._delete(lambda: self._store.delete(ids))

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a validated filter in one write, on disk when this returns.

        Return the sequence of the last write (it grows only if a record is deleted) and the number of deleted records.
        Raise RESOURCE_EXHAUSTED if the disk is full and the reserve for deletions does not suffice.
        """
        return self._delete(lambda: self._store.delete_matching(self._store.compile(condition) or EVERYTHING))

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the existing records among the ids, in the order of `ids`; an id given twice has its record twice.

        Args:
            ids: ids of records; missing ids are ignored.
            with_vectors: whether the records contain their vectors, not prepared; if not, `vector` is None.
            parts: parts that each returned record must contain; it may contain more.

        Raises:
            ServiceError: DATA_LOSS if one of the records is damaged, RESOURCE_EXHAUSTED if they, each counted once and
                without its vector, have too many bytes for one response.
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
        """Return undamaged records in byte order of ids, and the token of the next page, empty after the last page.

        Args:
            page_size: maximum number of records, 1 to 1000. The limit of a response's bytes may allow fewer.
            page_token: token that the page before was returned with; empty: the first page.
            with_vectors: whether the records contain their vectors.
            condition: validated filter that the records must meet; None: all records.
            parts: parts that each returned record must contain; it may contain more.

        Raises:
            ServiceError: INVALID_ARGUMENT if the size is out of range or the token is malformed.
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
        """Return sentences on why a filter may match no record, by at most 1000 records; empty: no reason found."""
        with self._calls.enter(), closing(self._store.metadata(MISMATCH_RECORDS)) as all_metadata:
            return mismatches(condition, all_metadata)

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records that meet a validated filter; None: of all records, damaged or not."""
        with self._calls.enter():
            return self._store.count(self._store.compile(condition) or EVERYTHING)

    @property
    def probed(self) -> ProbeFigures:
        """Number of searches whose recall was measured, and the mean recall of the latest 256; NaN before the first."""
        return self._probe.figures

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check the database, all records (at most 500 in a step), counters and word index; other calls run meanwhile.

        Each record must be undamaged and in memory, and searches for its own vector must find it. If they miss it, its
        vector becomes a stray. A wrong word index is rebuilt.

        Args:
            full: whether to search for every record by its own vector; if not, only for about 2,000 random ones.

        Yields:
            After each step, the numbers of records checked so far and of all records, and the problems of the step.
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
        """Yield the bytes of a backup of one state of the collection, piece by piece; nothing if stopped.

        Args:
            stop: whether to give up; called often until the first piece, not later.

        Raises:
            ServiceError: before the first piece, RESOURCE_EXHAUSTED if the disk has no space for a copy of the
                database, INTERNAL if the database fails or a counter is damaged, DATA_LOSS if a record is damaged.
        """
        with self._calls.enter(stop) as ends:
            copy = copy_of(self._folder, self.spec, self.created, ends)
        yield from pieces(copy)

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Return the pairs of records with a cosine of at least `min_score`, greatest first; at most the best 100,000.

        If `stop` returns True, return the pairs found so far. `find_duplicates` says when pairs may be missed.
        """
        with self._calls.enter(stop) as ends:
            return find_duplicates(self.spec, self._store, self._neighbours, min_score, ends)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Cluster the records by their vectors; return the clusters, largest first.

        Args:
            count: number of clusters, at least 1; fewer are returned if some are empty.
            examples: maximum number of records to return of each cluster, those nearest to its centre.
            stop: whether to give up and return no clusters.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the examples have too many bytes for one response.
        """
        with self._calls.enter(stop) as ends, self._store.response_bytes.limited():
            return cluster_records(self.spec, self._store, count, examples, ends)

    def maintain(self) -> None:
        """Run all maintenance that is due: rebuild the word index; fill, check, rebuild, save and measure the graph.

        The word index is first: if its rebuild fails, nothing else is done. Probed searches are repeated last. May take
        minutes; other calls run meanwhile, but writes wait for the word index. The work on the graph ends early when
        closing for good begins; later calls raise UNAVAILABLE. Does nothing while the collection is closed otherwise.
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
        """Delete all expired records; return when the next record expires, in seconds since 1970, None if none will.

        A record whose revision or times are damaged does not expire. Raise RESOURCE_EXHAUSTED if the disk is full and
        the reserve for deletions does not suffice, UNAVAILABLE after the collection is closed for good or deleted.
        """
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
            # While this thread waited, a reembedded copy may have replaced this collection: the write would be lost.
            self._calls.check()
            yield
