"""A collection: records in the store, their vectors in memory too, to be searched."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.index import snapshots
from emberpc.server.index.children import ChildKilledError
from emberpc.server.index.clusters import Cluster, cluster_records
from emberpc.server.index.duplicates import DuplicatePair, find_duplicates
from emberpc.server.index.filter_sql import EVERYTHING, Clause, compile_filter
from emberpc.server.index.filters import Filter
from emberpc.server.index.graph import Graph
from emberpc.server.index.hybrid import HybridSearcher, WordsRequest, fused_from
from emberpc.server.index.metric import check_vectors, prepare
from emberpc.server.index.neighbours import Neighbours
from emberpc.server.index.record_cache import RecordCache
from emberpc.server.index.searching import Request, Searcher
from emberpc.server.index.selection import Selector
from emberpc.server.index.store import Change, Store
from emberpc.server.index.types import (
    CollectionInfo,
    CollectionSpec,
    Labels,
    Matrix,
    NewRecord,
    SearchOutcome,
    StoredRecord,
    WriteResult,
    check_page_size,
)
from emberpc.server.index.validation import check_records
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

#: Newest vectors that are compared one by one. Measured at 384 dimensions: up to here that takes no longer than a
#: search of the graph (0.1 ms), and it is exact.
BUFFER_LIMIT = 4000
#: Vectors that the graph takes in between snapshots: some 10 to 20 seconds' work.
SNAPSHOT_EVERY = 20_000
_SNAPSHOT_TRIES = 3
#: A graph with a greater share of deleted nodes is built anew: inserts cost 1.5 times as much at a third.
_MAX_DEAD_SHARE = 0.25
#: Candidates that a search keeps: so many, or so many times top_k. Measured on 20,000 clustered 384-d vectors:
#: recall@10 of 1.00 for queries near them and 0.95 for queries anywhere, at 0.2 ms a query.
_MIN_EF, _EF_PER_HIT = 200, 2
MAX_TOP_K = 10_000
_MAX_EF = 1_000_000


class Collection:
    """A set of records whose vectors may be compared with each other. Safe to use from several threads.

    Every method may raise `ServiceError`: INVALID_ARGUMENT for bad input, INTERNAL if the database fails, UNAVAILABLE
    once the collection is closed or deleted.

    Args:
        spec: what it is.
        folder: where it is.
        created: since when.
        wake: called when there is work for `maintain`.
        cache: keeps records that are found often.
        buffer_limit: vectors that may wait for the graph.
        snapshot_every: vectors that the graph takes in between snapshots.
        create: make its files; the folder must be there and empty.
    """

    def __init__(
        self,
        spec: CollectionSpec,
        folder: Path,
        created: datetime,
        wake: Callable[[Collection], None],
        cache: RecordCache,
        *,
        buffer_limit: int = BUFFER_LIMIT,
        snapshot_every: int = SNAPSHOT_EVERY,
        create: bool = False,
    ) -> None:
        self.spec = spec
        self._folder = folder
        self._created = created
        self._wake = wake
        self._buffer_limit = buffer_limit
        self._snapshot_every = snapshot_every
        #: Set when the collection is to be closed: maintenance ends at the next slice.
        self._ending = threading.Event()
        self._idle = threading.Condition()
        self._calls = 0
        #: Held for a write and for what follows from it, so that memory sees the writes in the store's order.
        self._write_lock = threading.Lock()
        self._maintain_lock = threading.Lock()
        self._unsaved = 0
        self._store = Store(folder, spec.name, cache, spec.indexed_fields, create=create)
        try:
            self._neighbours = Neighbours(spec, snapshots.load(spec, folder) or Graph(spec))
            self._neighbours.catch_up(self._store.labels(), self._read_vectors)
            self._selector = Selector(self._store, spec)
        except BaseException:
            self._store.close()
            raise
        self._searcher = Searcher(self._store, self._neighbours, self._selector, self._write_lock, spec.distance)
        self._hybrid = HybridSearcher(self._store, self._searcher, self._write_lock)
        self._wake_if_needed()

    def info(self) -> CollectionInfo:
        """Say how it stands."""
        with self._call():
            with self._store.snapshot():
                count, sequence = self._store.count(), self._store.sequence()
            return CollectionInfo(count, sequence, self._created, self._size())

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
        with self._call(), self._write_lock:
            change = self._store.upsert(records, documents, vectors, expected_revisions)
            self._neighbours.change(change.added, prepared, change.removed)
            self._selector.note(change.sequence, change.removed)
        self._wake_if_needed()
        return WriteResult(change.sequence, change.inserted, change.updated)

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id, all at once and on disk when this returns; ids that are not there are no error."""
        return self._delete(lambda: self._store.delete(ids))

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a condition, all at once and on disk when this returns."""
        clause = compile_filter(condition)
        return self._delete(lambda: self._store.delete_matching(clause))

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[StoredRecord]:
        """Return the records of those ids that are there, in the order asked for; vectors as they were given."""
        with self._call():
            found = self._store.get(ids, with_vectors=with_vectors)
        return [found[record_id] for record_id in ids if record_id in found]

    def page(
        self, page_size: int, page_token: str, *, with_vectors: bool = False, condition: Filter | None = None
    ) -> tuple[list[StoredRecord], str]:
        """Return a page of records by id in byte order, and the token of the next page, empty after the last.

        With a condition, only records that meet it.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        clause = _clause(condition) or EVERYTHING
        with self._call():
            records = self._store.page(after, page_size + 1, with_vectors=with_vectors, condition=clause)
        more = len(records) > page_size
        return records[:page_size], encode_token(records[page_size - 1].id) if more else ""

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records, with a condition, of those that meet it."""
        with self._call():
            return self._store.count(_clause(condition) or EVERYTHING)

    def search(
        self,
        queries: Matrix,
        top_k: int | Sequence[int],
        *,
        ef: int = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions).
            top_k: most hits, 1 to 10,000; of all queries, or of each.
            ef: candidates that the graph search keeps, up to 1,000,000; 0: chosen by `top_k`.
            exclude_ids: an id to leave out of each query's hits, or None; empty: nothing to leave out.
            with_vectors: whether the hits have their vectors.
            conditions: what the hits of each query must meet, or None; empty: nothing.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef)
        if not len(queries):
            return []
        request = self._request(queries, sizes, excluded, ef, with_vectors, conditions)
        with self._call():
            return self._searcher.search(request)

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Find pairs of records that are much alike; see `find_duplicates`."""
        with self._call(stop) as ends:
            return find_duplicates(self.spec, self._store, self._neighbours, min_score, ends)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Group the records by likeness; see `cluster_records`."""
        with self._call(stop) as ends:
            return cluster_records(self.spec, self._store, count, examples, ends)

    def search_words(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
    ) -> list[SearchOutcome]:
        """Find the records with words of each text, best first by BM25; the other arguments are those of `search`."""
        check_search(len(texts), top_k, len(texts), 0)
        clauses = [_clause(condition) for condition in conditions] or [None] * len(texts)
        with self._call():
            return self._hybrid.by_words(WordsRequest(texts, top_k, clauses, with_vectors))

    def search_both(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        ef: int = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
    ) -> list[SearchOutcome]:
        """Find records by vectors and by words, fused by score.

        Args:
            queries: float32 (queries, dimensions).
            texts: the text of each query.
            top_k: most hits of each.
            dense_weight: weight of the ranking by vectors, 0 to 1; that by words has the rest.
            ef: as in `search`.
            with_vectors: as in `search`.
            conditions: as in `search`.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        if len(texts) != len(queries):
            raise invalid("queries", f"has {len(texts)} texts for {len(queries)} vectors; give one for each")
        check_search(len(queries), top_k, len(queries), ef)
        with self._call():
            return self._hybrid.by_both(
                self._request(queries, fused_from(top_k), [None] * len(queries), ef, with_vectors, conditions),
                texts,
                top_k,
                dense_weight,
            )

    def maintain(self) -> None:
        """Move vectors from the buffer to the graph, and build the graph anew if too much of it is deleted.

        Takes long, and lets searches and writes in between; ends early when the collection is to be closed.
        """
        with self._call(), self._maintain_lock:
            if self._neighbours.waiting > self._buffer_limit:
                while moved := self._neighbours.drain(self._snapshot_every, self._ending.is_set):
                    self._unsaved += moved
                    self._snapshot_if_due()
                    if self._neighbours.waiting <= self._buffer_limit:
                        break
            if self._neighbours.dead_share > _MAX_DEAD_SHARE and self._neighbours.rebuild(
                self._read_vectors, self._ending.is_set
            ):
                # All of the graph is new.
                self._unsaved = self._snapshot_every
            self._snapshot_if_due()

    def close(self) -> None:
        """Wait for the calls under way, save a snapshot if the graph changed, and close the database."""
        if self._end():
            if self._unsaved:
                self._snapshot()
            self._store.close()

    def drop(self) -> None:
        """Wait for the calls under way, close the database, and remove all that the collection has on disk."""
        if self._end():
            self._store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _request(
        self,
        queries: Matrix,
        top_k: Sequence[int],
        excluded: Sequence[str | None],
        ef: int,
        with_vectors: bool,
        conditions: Sequence[Filter | None],
    ) -> Request:
        if conditions and len(conditions) != len(queries):
            raise invalid("conditions", f"has {len(conditions)} items for {len(queries)} queries; give one for each")
        wanted = max(top_k) + 1
        keep = max(ef or max(_MIN_EF, _EF_PER_HIT * wanted), wanted)
        clauses = [_clause(condition) for condition in conditions] or [None] * len(queries)
        return Request(prepare(queries, self.spec.distance), top_k, excluded, keep, with_vectors, clauses)

    def _delete(self, delete: Callable[[], Change]) -> WriteResult:
        with self._call(), self._write_lock:
            change = delete()
            self._neighbours.remove(change.removed)
            self._selector.note(change.sequence, change.removed)
        self._wake_if_needed()
        return WriteResult(change.sequence, deleted=len(change.removed))

    @contextmanager
    def _call(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
        """Hold off `close` for as long as a call lasts.

        A call that lasts long is given what tells it to end, which is when it is to stop or the collection is to be
        closed; then it fails.
        """
        with self._idle:
            if self._ending.is_set():
                raise self._closed()
            self._calls += 1
        cut_short = False

        def ends() -> bool:
            nonlocal cut_short
            cut_short = cut_short or self._ending.is_set()
            return cut_short or stop()

        try:
            yield ends
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()
        if cut_short:
            raise self._closed()

    def _closed(self) -> ServiceError:
        message = f"collection {self.spec.name!r} is closed or deleted; try again"
        return ServiceError(Code.UNAVAILABLE, message, reason="CLOSED")

    def _end(self) -> bool:
        """Let no more calls in and wait for those under way; return False if that was done before."""
        with self._idle:
            first = not self._ending.is_set()
            self._ending.set()
            self._idle.wait_for(lambda: not self._calls)
        return first

    def _size(self) -> int:
        size = 0
        for path in self._folder.iterdir():
            try:
                size += path.stat().st_size
            except FileNotFoundError:  # an old snapshot, dropped meanwhile
                continue
        return size

    def _read_vectors(self, labels: list[int]) -> tuple[Labels, Matrix]:
        found, vectors = self._store.vectors(labels)
        return found, prepare(vectors, self.spec.distance)

    def _wake_if_needed(self) -> None:
        if self._neighbours.waiting > self._buffer_limit or self._neighbours.dead_share > _MAX_DEAD_SHARE:
            self._wake(self)

    def _snapshot_if_due(self) -> None:
        if self._unsaved >= self._snapshot_every:
            self._snapshot()

    def _snapshot(self) -> None:
        for tries_left in reversed(range(_SNAPSHOT_TRIES)):
            try:
                snapshots.save(self._neighbours.save, self.spec, self._folder)
                self._unsaved = 0
            except (OSError, RuntimeError) as error:
                if tries_left and isinstance(error, ChildKilledError):
                    continue
                # Nothing is lost: the graph is built from the store at the next start, which only takes longer.
                log.warning("collection %s: no snapshot: %s", self.spec.name, error)
            return


def _clause(condition: Filter | None) -> Clause | None:
    return None if condition is None else compile_filter(condition)


def check_search(queries: int, top_k: Sequence[int], excluded: int, ef: int) -> None:
    """Raise INVALID_ARGUMENT unless the options of a search fit its queries."""
    if len(top_k) != queries:
        raise invalid("top_k", f"has {len(top_k)} items for {queries} queries; give one for each")
    if excluded != queries:
        raise invalid("exclude_ids", f"has {excluded} items for {queries} queries; give one for each")
    for i, size in enumerate(top_k):
        if not 1 <= size <= MAX_TOP_K:
            raise invalid(f"queries[{i}].top_k", f"is {size}; it must be 1 to {MAX_TOP_K}")
    if not 0 <= ef <= _MAX_EF:
        raise invalid("ef", f"is {ef}; it must be 0 (the server chooses) to {_MAX_EF}")
