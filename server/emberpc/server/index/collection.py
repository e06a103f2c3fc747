"""A collection: records in the store, their vectors in memory too, to be searched."""

from __future__ import annotations

import json
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
from emberpc.server.errors import invalid, items_of
from emberpc.server.index.call_gate import CallGate
from emberpc.server.index.jobs.backup import copy_of, pieces
from emberpc.server.index.jobs.clusters import cluster_records
from emberpc.server.index.jobs.duplicates import find_duplicates
from emberpc.server.index.jobs.graph_maintenance import Pace
from emberpc.server.index.jobs.verify import Verifier
from emberpc.server.index.lifecycle import Lifecycle
from emberpc.server.index.open_collections import OpenCollections
from emberpc.server.index.search.probe import Probe
from emberpc.server.index.search_methods import SearchMethods, clause_of
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause, compile_filter
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import Reserve
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

#: Records that are deleted in one write when their time is up; others' writes come in between.
_EXPIRED_AT_ONCE = 1000


class Collection(Lifecycle, SearchMethods):
    """A set of records whose vectors may be compared with each other. Safe to use from several threads.

    While nobody uses it, its files and memory can be given up by `close_idle`; the next call opens it again.

    Every method may raise `ServiceError`: INVALID_ARGUMENT for bad input, INTERNAL if the database fails or the
    collection cannot be opened again, RESOURCE_EXHAUSTED if no file descriptor is free, UNAVAILABLE once the collection
    is closed for good or deleted.

    Args:
        spec: what it is.
        folder: where it is.
        created: since when.
        wake: called when there is work for `maintain`.
        wake_at_rest: called when there will be, after so many seconds without another such call.
        expire_at: called when there will be work for `expire`, with when, in seconds since 1970.
        cache: keeps records that are found often.
        reserve: space for deletions on a full disk.
        open_collections: those that are open; it may close this one by `close_idle`.
        pace: when the graph takes in vectors, and is saved.
        probe_share: share of the searches that are done again, exactly, to measure recall.
        max_response_bytes: most bytes of the records of one answer.
        create: make its files; the folder must be there and empty.
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
        pace: Pace,
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
        self._pace = pace
        self._create = create
        self._calls = CallGate(f"collection {spec.name!r}", self._open, self._release)
        #: Held for a write and for what follows from it, so that memory sees the writes in the store's order.
        self._write_lock = threading.Lock()
        self._probe = Probe(probe_share)
        #: How it stands; while it is closed.
        self._closed_info: CollectionInfo | None = None
        with self._calls.one():
            pass

    def info(self) -> CollectionInfo:
        """Say how it stands; does not open the collection if that is closed."""
        self._calls.check()
        info = self._closed_info
        if info is None:
            with self._calls.one():
                info = self._info()
        return replace(info, create_time=self.created)

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those of the same id; all or none, and on disk when this returns.

        Args:
            records: the records, at least one, no id twice.
            vectors: float32 (records, dimensions).
            expected_revisions: the present revision of each record, 0 for one that must not be there; None: whatever
                it is.

        Raises:
            ServiceError: besides the usual, ABORTED if a revision is another, RESOURCE_EXHAUSTED if the disk is full.
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
        """Write records of another collection as they are there, with their revisions and times.

        Args:
            records: the records, no id twice.
            vectors: float32 (records, dimensions), instead of the records' own.
        """
        documents = [json.dumps(record.metadata, ensure_ascii=False) for record in records]
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
        """Return the records whose labels follow one, with theirs, at most `count`, in the order of their writing."""
        with self._calls.one():
            return self._store.written_after(label, count)

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the revisions of those ids that are there."""
        with self._calls.one():
            return self._store.revisions(ids)

    def count_without_text(self) -> int:
        """Return the number of records that have a vector only."""
        with self._calls.one():
            return self._store.count(Clause("text = ''"))

    @contextmanager
    def frozen(self) -> Iterator[int]:
        """Let nothing be written in the block; gives the number of the last write."""
        with self._writing():
            yield self._store.sequence()

    def replace(self, sequence: int) -> None:
        """Take another one's place, whose last write has this number."""
        with self._writing():
            self._store.set_sequence(sequence)
            self._selector.note(sequence, ())

    def end_calls(self) -> None:
        """Let no more calls in, and have long ones stop. Those under way can still read."""
        self._calls.begin_end()

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id, all at once and on disk when this returns; ids that are not there are no error."""
        return self._delete(lambda: self._store.delete(ids))

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a condition, all at once and on disk when this returns."""
        clause = compile_filter(condition)
        return self._delete(lambda: self._store.delete_matching(clause))

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the records of those ids that are there, in the order asked for; vectors as they were given.

        Args:
            ids: which records.
            with_vectors: whether they have their vectors.
            parts: what they must have; they may have more.
        """
        with self._calls.one(), self._store.response_bytes.limited(parts):
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
        """Return a page of records by id in byte order, and the token of the next page, empty after the last.

        A page has fewer records if these have the bytes of one answer.
        With a condition, only records that meet it.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        clause = clause_of(condition) or EVERYTHING
        with self._calls.one(), self._store.response_bytes.limited(parts):
            found, cut = self._store.page(after, page_size + 1, with_vectors=with_vectors, condition=clause)
        records = found[:page_size]
        more = cut or len(found) > page_size
        return records, encode_token(records[-1].id) if more else ""

    def mismatches(self, condition: Filter) -> list[str]:
        """Return a sentence for each comparison with a number whose field holds strings only, in the first records."""
        with self._calls.one(), closing(self._store.metadata(MISMATCH_RECORDS)) as documents:
            return mismatches(condition, lambda: documents)

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records, with a condition, of those that meet it."""
        with self._calls.one():
            return self._store.count(clause_of(condition) or EVERYTHING)

    @property
    def probed(self) -> ProbeFigures:
        """What probes of its searches found."""
        return self._probe.figures

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check that every record is there, undamaged and found, some hundred records a step; calls go on meanwhile.

        Args:
            full: search for every record by its own vector; otherwise for a random sample.
        """
        with self._calls.one():
            verifier = Verifier(self._store, self._neighbours, self._write_lock, self.spec, full)
        steps = verifier.steps()
        while True:
            with self._calls.one():
                # It may have been closed and opened again since the last step.
                verifier.store, verifier.neighbours = self._store, self._neighbours
                step = next(steps, None)
            if step is None:
                return
            yield step

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Give a copy of one state of the collection, piece by piece; it is made, or refused, at the first."""
        with self._calls.one(stop) as ends:
            copy = copy_of(self._folder, self.spec, self.created, ends)
        yield from pieces(copy)

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Find pairs of records that are much alike; see `find_duplicates`."""
        with self._calls.one(stop) as ends:
            return find_duplicates(self.spec, self._store, self._neighbours, min_score, ends)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Group the records by likeness; see `cluster_records`."""
        with self._calls.one(stop) as ends, self._store.response_bytes.limited():
            return cluster_records(self.spec, self._store, count, examples, ends)

    def maintain(self) -> None:
        """Move vectors from the buffer to the graph, and rebuild the graph or the word index if needed.

        Takes long, and lets searches and writes in between; ends early when the collection is to be closed. A closed
        one stays closed: when it is opened it asks for what there is to do.
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
        """Delete the records whose time is up; return when the next one's is, in seconds since 1970, None for none."""
        while self._delete(lambda: self._store.delete_expired(_EXPIRED_AT_ONCE)).deleted == _EXPIRED_AT_ONCE:
            pass
        with self._calls.one():
            return self._store.next_expiry()

    def _delete(self, delete: Callable[[], Change]) -> WriteResult:
        with self._writing():
            change = delete()
            self._neighbours.remove(change.removed)
            self._selector.note(change.sequence, change.removed)
            self._wake_if_needed()
        return WriteResult(change.sequence, deleted=len(change.removed))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._calls.one(), self._write_lock:
            # Who waited here while another took this one's place must not write to what is to be thrown away.
            self._calls.check()
            yield
