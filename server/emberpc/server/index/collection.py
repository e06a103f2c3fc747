"""A collection: records in the store, their vectors in buffer and graph."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from emberpc.server.errors import Code, ServiceError, Violation, invalid_fields, items_of
from emberpc.server.index import snapshots
from emberpc.server.index.buffer import Buffer
from emberpc.server.index.graph import SLICE, Graph, GraphError
from emberpc.server.index.locks import ReadWriteLock
from emberpc.server.index.metric import check_vectors, prepare, scores
from emberpc.server.index.store import Change, Store
from emberpc.server.index.types import (
    CollectionInfo,
    CollectionSpec,
    Matrix,
    NewRecord,
    Plan,
    SearchOutcome,
    StoredRecord,
    Strategy,
    WriteResult,
)
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

#: Newest vectors that are compared one by one: up to here that is as fast as a search of the graph, and exact.
BUFFER_LIMIT = 2000
#: A graph with a greater share of deleted nodes is built anew: inserts cost 1.5 times as much at a third.
_MAX_DEAD_SHARE = 0.25
#: Vectors that the graph takes in between snapshots.
_SNAPSHOT_EVERY = 20_000
#: Candidates that a search keeps: so many, or so many times top_k.
_MIN_EF, _EF_PER_HIT = 128, 2
_MAX_ID_BYTES = 512
_MAX_METADATA_BYTES = 64 * 1024
_READ_BATCH = 2000


class Collection:
    """A set of records whose vectors may be compared with each other. Safe to use from several threads.

    Every method may raise `ServiceError`: INVALID_ARGUMENT for bad input, INTERNAL if the database fails, UNAVAILABLE
    once the collection is closed.

    Args:
        spec: what it is.
        folder: where it is.
        created: since when.
        wake: called when there is work for `maintain`.
        buffer_limit: vectors that may wait for the graph.
    """

    def __init__(
        self,
        spec: CollectionSpec,
        folder: Path,
        created: datetime,
        wake: Callable[[Collection], None],
        buffer_limit: int = BUFFER_LIMIT,
    ) -> None:
        self.spec = spec
        self._folder = folder
        self._created = created
        self._wake = wake
        self._buffer_limit = buffer_limit
        self._gate = ReadWriteLock()
        self._closed = False
        #: Set when the collection is to be closed: maintenance ends at the next slice.
        self._ending = threading.Event()
        #: Held for a write and for what follows from it, so that memory sees the writes in the store's order.
        self._write_lock = threading.Lock()
        self._maintain_lock = threading.Lock()
        self._store = Store(folder)
        self._buffer = Buffer(spec.dimensions, spec.distance)
        self._graph = snapshots.load(spec, folder) or Graph(spec)
        self._unsaved = 0
        self._catch_up()

    def info(self) -> CollectionInfo:
        """Say how it stands."""
        with self._open():
            size = sum(path.stat().st_size for path in self._folder.iterdir() if path.is_file())
            return CollectionInfo(self._store.count(), self._store.sequence(), self._created, size)

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those of the same id; all or none, and on disk when this returns.

        Args:
            records: the records, no id twice.
            vectors: float32 (records, dimensions).
            expected_revisions: the present revision of each record, 0 for one that must not be there.

        Raises:
            ServiceError: besides the usual, ABORTED if a revision is another, RESOURCE_EXHAUSTED if the disk is full.
        """
        _check_records(records)
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        with self._open(), self._write_lock:
            change = self._store.upsert(records, vectors, expected_revisions)
            self._buffer.add(change.added, prepare(vectors, self.spec.distance))
            self._forget(change)
        self._wake_if_needed()
        return WriteResult(change.sequence, change.inserted, change.updated)

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id, all at once and on disk when this returns; ids that are not there are no error."""
        with self._open(), self._write_lock:
            change = self._store.delete(ids)
            self._forget(change)
        self._wake_if_needed()
        return WriteResult(change.sequence, deleted=len(change.removed))

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[StoredRecord]:
        """Return the records of those ids that are there, in the order asked for."""
        with self._open():
            found = self._store.get(ids, with_vectors=with_vectors)
        return [found[record_id] for record_id in ids if record_id in found]

    def page(self, page_size: int, page_token: str, *, with_vectors: bool = False) -> tuple[list[StoredRecord], str]:
        """Return a page of records by id in byte order, and the token of the next page, empty after the last."""
        after = decode_token(page_token)
        with self._open():
            records = self._store.page(after, page_size + 1, with_vectors=with_vectors)
        more = len(records) > page_size
        return records[:page_size], encode_token(records[page_size - 1].id) if more else ""

    def count(self) -> int:
        """Return the number of records."""
        with self._open():
            return self._store.count()

    def search(
        self,
        queries: Matrix,
        top_k: Sequence[int],
        *,
        ef: int = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions).
            top_k: most hits of each, at least 1.
            ef: candidates that the graph search keeps; 0: chosen by `top_k`.
            exclude_ids: an id to leave out of each query's hits, or None; empty: nothing to leave out.
            with_vectors: whether the hits have their vectors.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        prepared = prepare(queries, self.spec.distance)
        exclude = list(exclude_ids) or [None] * len(queries)
        widest = max(top_k) + 1
        ef = max(ef or max(_MIN_EF, _EF_PER_HIT * widest), widest)
        with self._open():
            outcomes = self._search(prepared, top_k, ef, exclude, with_vectors=with_vectors)
            for i, outcome in enumerate(outcomes):
                if outcome is None:
                    outcomes[i] = self._scan(prepared[i], top_k[i], exclude[i], with_vectors=with_vectors)
        return [outcome for outcome in outcomes if outcome is not None]

    def maintain(self) -> None:
        """Move vectors from the buffer to the graph, and build the graph anew if too much of it is deleted.

        Takes long, and lets searches and writes in between; ends early when the collection is to be closed.
        """
        with self._maintain_lock, self._open():
            if len(self._buffer) > self._buffer_limit:
                self._drain()
            if self._graph.dead_share > _MAX_DEAD_SHARE:
                self._rebuild()
            if self._unsaved >= _SNAPSHOT_EVERY:
                self._snapshot()

    def close(self) -> None:
        """Save a snapshot if the graph changed, and close the database; later calls get UNAVAILABLE."""
        self._ending.set()
        with self._maintain_lock, self._gate.write():
            if self._closed:
                return
            self._closed = True
            if self._unsaved:
                self._snapshot()
            self._store.close()

    def drop(self) -> None:
        """Close the collection and remove all that it has on disk."""
        self._ending.set()
        with self._maintain_lock, self._gate.write():
            if not self._closed:
                self._closed = True
                self._store.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold off `close` for as long as a call lasts."""
        with self._gate.read():
            if self._closed:
                raise ServiceError(
                    Code.UNAVAILABLE, f"collection {self.spec.name!r} is closed; try again", reason="CLOSED"
                )
            yield

    def _catch_up(self) -> None:
        """Make graph and buffer hold exactly what the store holds: the graph may be older, or new."""
        stored = set(self._store.labels().tolist())
        self._graph.remove(self._graph.labels() - stored)
        missing = sorted(stored - self._graph.labels())
        for start in range(0, len(missing), _READ_BATCH):
            labels, vectors = self._store.vectors(missing[start : start + _READ_BATCH])
            self._buffer.add(labels, prepare(vectors, self.spec.distance))
        self._wake_if_needed()

    def _forget(self, change: Change) -> None:
        """Take what a write removed out of the buffer and, after that, of the graph; `_drain` relies on the order."""
        if change.removed:
            self._buffer.remove(change.removed)
            self._graph.remove(change.removed)

    def _wake_if_needed(self) -> None:
        if len(self._buffer) > self._buffer_limit or self._graph.dead_share > _MAX_DEAD_SHARE:
            self._wake(self)

    def _drain(self) -> None:
        labels, vectors = self._buffer.contents()
        for start in range(0, len(labels), SLICE):
            if self._ending.is_set():
                return
            part = labels[start : start + SLICE]
            self._graph.add(part, vectors[start : start + SLICE])
            # What a write removed meanwhile is out of the buffer; it may have missed the graph, which did not have it.
            still = set(self._buffer.contents()[0].tolist())
            self._graph.remove(set(part.tolist()) - still)
            self._buffer.remove(set(part.tolist()))
            self._unsaved += len(part)

    def _rebuild(self) -> None:
        """Build a graph of what is live, beside the one that answers, and put it in its place."""
        graph = Graph(self.spec)
        labels = sorted(self._graph.labels())
        for start in range(0, len(labels), _READ_BATCH):
            if self._ending.is_set():
                return
            found, vectors = self._store.vectors(labels[start : start + _READ_BATCH])
            if len(found):
                graph.add(found, prepare(vectors, self.spec.distance))
        with self._write_lock:
            graph.remove(graph.labels() - self._graph.labels())
            self._graph = graph
        self._unsaved += len(labels)

    def _snapshot(self) -> None:
        try:
            snapshots.save(self._graph, self.spec, self._folder)
            self._unsaved = 0
        except (OSError, RuntimeError) as error:
            # Nothing is lost: the graph is built from the store at the next start, which only takes longer.
            log.warning("collection %s: no snapshot: %s", self.spec.name, error)

    def _search(
        self,
        queries: Matrix,
        top_k: Sequence[int],
        ef: int,
        exclude: Sequence[str | None],
        *,
        with_vectors: bool,
    ) -> list[SearchOutcome | None]:
        """Search buffer and graph; None where that found fewer than there are."""
        k = max(top_k) + 1
        # The buffer first: what moves to the graph meanwhile is then found twice, not missed.
        new_labels, new_scores, compared = self._buffer.search(queries, k)
        graph = self._graph
        plan = Plan(Strategy.HNSW if graph.live else Strategy.EXACT, ef if graph.live else 0, compared)
        try:
            old_labels, old_scores = graph.search(queries, k, ef)
        except GraphError:
            return [None] * len(queries)
        candidates = []
        for i in range(len(queries)):
            best = dict(zip(old_labels[i].tolist(), old_scores[i].tolist(), strict=True))
            best.update(zip(new_labels[i].tolist(), new_scores[i].tolist(), strict=True))
            candidates.append(sorted(best.items(), key=lambda item: -item[1])[:k])
        labels = sorted({label for row in candidates for label, _ in row})
        records = self._store.by_label(labels, with_vectors=with_vectors)
        total = self._store.count()
        return [_outcome(candidates[i], records, top_k[i], exclude[i], total, plan) for i in range(len(queries))]

    def _scan(self, query: Matrix, k: int, exclude: str | None, *, with_vectors: bool) -> SearchOutcome:
        """Compare a query with every vector in the store: slow and right, whatever the graph's state."""
        best: list[tuple[int, float]] = []
        labels = self._store.labels().tolist()
        for start in range(0, len(labels), _READ_BATCH):
            found, vectors = self._store.vectors(labels[start : start + _READ_BATCH])
            if len(found):
                row = scores(query[None], prepare(vectors, self.spec.distance), self.spec.distance)[0]
                best = sorted([*best, *zip(found.tolist(), row.tolist(), strict=True)], key=lambda item: -item[1])[
                    : k + 1
                ]
        records = self._store.by_label([label for label, _ in best], with_vectors=with_vectors)
        plan = Plan(Strategy.EXACT, 0, len(labels))
        return _outcome(best, records, k, exclude, len(records), plan) or SearchOutcome([], plan)


def _outcome(
    candidates: Sequence[tuple[int, float]],
    records: dict[int, StoredRecord],
    k: int,
    exclude: str | None,
    total: int,
    plan: Plan,
) -> SearchOutcome | None:
    """Turn candidates into hits; None if they are fewer than the records that there are."""
    hits = [
        (records[label], score) for label, score in candidates if label in records and records[label].id != exclude
    ][:k]
    if len(hits) == k:
        return SearchOutcome(hits, plan)
    if len(hits) < total - (exclude is not None):
        return None
    without = ", the record asked about left out" if exclude is not None else ""
    reason = f"the collection holds {total} records{without}"
    return SearchOutcome(hits, replace(plan, shortfall_reason=reason))


def _check_records(records: Sequence[NewRecord]) -> None:
    """Raise INVALID_ARGUMENT, naming each record that is not fit to be stored."""
    violations = []
    seen: dict[str, int] = {}
    for i, record in enumerate(records):
        path = f"records[{i}].id"
        if not record.id:
            violations.append(Violation(path, "is empty; give every record an id"))
        elif len(record.id.encode()) > _MAX_ID_BYTES:
            size = len(record.id.encode())
            violations.append(Violation(path, f"has {size} bytes, an id has at most {_MAX_ID_BYTES}; shorten it"))
        elif any(unicodedata.category(character) == "Cc" for character in record.id):
            violations.append(Violation(path, "has a control character; leave it out"))
        elif record.id in seen:
            violations.append(Violation(path, f"is {record.id!r} as that of records[{seen[record.id]}]; leave one out"))
        seen.setdefault(record.id, i)
        size = len(json.dumps(record.metadata, ensure_ascii=False).encode())
        if size > _MAX_METADATA_BYTES:
            description = f"has {size} bytes as JSON, it may have {_MAX_METADATA_BYTES}; shorten it"
            violations.append(Violation(f"records[{i}].metadata", description))
    if violations:
        raise invalid_fields(violations)
