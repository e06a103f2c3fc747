"""A collection: records in the store, their vectors in memory too, to be searched."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.index import snapshots
from emberpc.server.index.backup import Piece, copy_of, pieces
from emberpc.server.index.clusters import Cluster, cluster_records
from emberpc.server.index.duplicates import DuplicatePair, find_duplicates
from emberpc.server.index.filter_sql import EVERYTHING, Clause, compile_filter
from emberpc.server.index.filters import Filter
from emberpc.server.index.graph import Graph
from emberpc.server.index.hybrid import HybridSearcher, WordsRequest, fused_from
from emberpc.server.index.metric import check_vectors, prepare
from emberpc.server.index.neighbours import Neighbours
from emberpc.server.index.probing import Probe, ProbeFigures
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
from emberpc.server.index.upkeep import Pace, Upkeep
from emberpc.server.index.validation import check_records, check_search
from emberpc.server.index.verifying import Verified, Verifier
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)


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
        pace: when the graph takes in vectors, and is saved.
        probe_share: share of the searches that are done again, exactly, to measure recall.
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
        pace: Pace,
        probe_share: float = 0,
        create: bool = False,
    ) -> None:
        self.spec = spec
        self._folder = folder
        self._created = created
        self._wake = wake
        #: Set when the collection is to be closed: maintenance ends at the next slice.
        self._ending = threading.Event()
        self._idle = threading.Condition()
        self._calls = 0
        #: Held for a write and for what follows from it, so that memory sees the writes in the store's order.
        self._write_lock = threading.Lock()
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
        self._upkeep = Upkeep(
            spec, folder, self._store, self._neighbours, self._read_vectors, pace, self._ending.is_set
        )
        self._probe = Probe(probe_share)
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
        min_recall: float = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions).
            top_k: most hits, 1 to 10,000; of all queries, or of each.
            ef: candidates that the graph search keeps, up to 1,000,000; 0: chosen by `top_k` and `min_recall`.
            min_recall: share of the true nearest to be found, in (0, 1], as measured of this collection; where that is
                not measured yet, or too much for the graph, every vector is compared. 0: no target. Not beside `ef`.
            exclude_ids: an id to leave out of each query's hits, or None; empty: nothing to leave out.
            with_vectors: whether the hits have their vectors.
            conditions: what the hits of each query must meet, or None; empty: nothing.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef, min_recall)
        if not len(queries):
            return []
        request = self._request(queries, sizes, excluded, ef, with_vectors, conditions, min_recall)
        with self._call():
            # Filtered ones have ways of their own to be exact.
            probed = not any(request.conditions) and self._probe.wants_one()
            sequence = self._store.sequence() if probed else 0
            outcomes = self._searcher.search(request)
        if probed and self._probe.offer(request, outcomes, sequence):
            self._wake(self)
        return outcomes

    @property
    def probed(self) -> ProbeFigures:
        """What probes of its searches found."""
        return self._probe.figures

    def verify(self) -> Iterator[Verified]:
        """Check that every record is there, undamaged and found, some hundred records a step; calls go on meanwhile."""
        steps = Verifier(self._store, self._neighbours, self._write_lock, self.spec).steps()
        while True:
            with self._call():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Give a copy of one state of the collection, piece by piece; it is made, or refused, at the first."""
        with self._call(stop) as ends:
            copy = copy_of(self._folder, self.spec, self._created, ends)
        yield from pieces(copy)

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
        min_recall: float = 0,
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
            min_recall: as in `search`, of the candidates by vectors.
            with_vectors: as in `search`.
            conditions: as in `search`.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        if len(texts) != len(queries):
            raise invalid("queries", f"has {len(texts)} texts for {len(queries)} vectors; give one for each")
        check_search(len(queries), top_k, len(queries), ef, min_recall)
        with self._call():
            return self._hybrid.by_both(
                self._request(
                    queries, fused_from(top_k), [None] * len(queries), ef, with_vectors, conditions, min_recall
                ),
                texts,
                top_k,
                dense_weight,
            )

    def maintain(self) -> None:
        """Move vectors from the buffer to the graph, and build the graph anew if too much of it is deleted.

        Takes long, and lets searches and writes in between; ends early when the collection is to be closed.
        """
        with self._call():
            self._upkeep.run()
            self._probe.run(self._searcher.search, lambda ids: self._store.get(ids, with_vectors=False))

    def close(self) -> None:
        """Wait for the calls under way, save a snapshot if the graph changed, and close the database."""
        if self._end():
            self._upkeep.save()
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
        min_recall: float,
    ) -> Request:
        if conditions and len(conditions) != len(queries):
            raise invalid("conditions", f"has {len(conditions)} items for {len(queries)} queries; give one for each")
        most = max(top_k)
        keep = self._upkeep.effort.ef(most, ef, min_recall)
        return Request(
            prepare(queries, self.spec.distance),
            top_k,
            excluded,
            max(keep or 0, most + 1),
            with_vectors,
            [_clause(condition) for condition in conditions] or [None] * len(queries),
            exact=keep is None,
        )

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
        if self._upkeep.due:
            self._wake(self)


def _clause(condition: Filter | None) -> Clause | None:
    return None if condition is None else compile_filter(condition)
