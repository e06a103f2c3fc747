"""One collection in Milvus: write, read and search its records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice

from emberpc.server.collections.backend import unsupported
from emberpc.server.collections.filters import MISMATCH_RECORDS, Filter, mismatches
from emberpc.server.collections.metric import check_vectors
from emberpc.server.collections.types import (
    WHOLE_RECORD,
    Cluster,
    CollectionInfo,
    CollectionSpec,
    DuplicatePair,
    Fusion,
    Matrix,
    NewRecord,
    Piece,
    RecordParts,
    SearchOutcome,
    StoredRecord,
    Verified,
    WriteResult,
    check_page_size,
)
from emberpc.server.collections.validation import check_records, check_search
from emberpc.server.errors import invalid, items_of
from emberpc.server.milvus import schema, terms
from emberpc.server.milvus.connection import Connection
from emberpc.server.milvus.reading import Reader
from emberpc.server.milvus.searching import Request, Searcher
from emberpc.server.paging import decode_token, encode_token

BACKEND = "milvus"
_COPY = "copy the collection, or a part of it, to an embedded index and ask that"
_DENSE = "search by DENSE, or use the embedded index"


class MilvusCollection:
    """A collection in Milvus; a `CollectionBackend`. Safe to use from several threads.

    The main differences from a collection of the embedded backend:

    - These raise UNIMPLEMENTED: lexical and hybrid search, `min_recall`, a time to live, `expected_revisions` (since
      Milvus has no conditional write), `verify`, `backup`, `duplicates` and `clusters`.
    - Records always have text and metadata; `parts` is ignored.
    - A write is as durable as Milvus's own log.
    - The sequence of a write is its time in microseconds since 1970, or one more than the last sequence if that is
      greater. So sequences of one server grow over restarts without being stored, unless its clock is set back. `info`
      has the sequence 0 until this server has written.
    - Which ids are new, and the creation times of records, are read just before a write. They are wrong if another
      server writes the same records at that moment.

    Every method that calls Milvus raises the `ServiceError` of `Connection.call` if the call fails.

    Args:
        connection: the connection to Milvus.
        spec: the spec of the collection.
        created: when the collection was created.
    """

    def __init__(self, connection: Connection, spec: CollectionSpec, created: datetime) -> None:
        self.spec = spec
        self.created = created
        self._reader = Reader(connection, spec)
        self._write_lock = threading.Lock()
        self._sequence = 0

    def adopt(self, spec: CollectionSpec) -> bool:
        """Replace the object's spec by `spec`, the present one, if at most model fingerprint and truncation differ.

        Returns:
            Whether `spec` is now the object's spec. If not, another collection has the name now.
        """
        changed = replace(self.spec, model_fingerprint=spec.model_fingerprint, truncation=spec.truncation)
        if changed == spec:
            self.spec = spec
        return changed == spec

    def info(self) -> CollectionInfo:
        """Return record count, sequence and creation time.

        The sequence is that of the last write by this server since its start; 0 if it has not written. The size on disk
        is not known and is 0.
        """
        return CollectionInfo(self.count(), self._sequence, self.created, 0)

    def load(self) -> None:
        """Make Milvus load the collection. Milvus refuses reads of a collection that is not loaded."""
        self._reader.call("load_collection")

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those with the same ids, by one message to Milvus.

        Args:
            records: the records, at least one, with distinct ids.
            vectors: the vector of each record, float32 (records, dimensions).
            expected_revisions: must be None.

        Returns:
            The sequence of the write, which is the records' revision, and the numbers of new and replaced records.

        Raises:
            ServiceError: INVALID_ARGUMENT for records or vectors that are invalid or that Milvus cannot store;
                UNIMPLEMENTED for `expected_revisions`, or a record with a time to live; RESOURCE_EXHAUSTED if the
                message is too large for Milvus.
        """
        metadata_texts = check_records(records)
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        if len(vectors) != len(records):
            raise invalid("vectors", f"has {len(vectors)} vectors for {len(records)} records; give one for each")
        if expected_revisions is not None:
            raise unsupported("expected_revisions", BACKEND, "leave it unset, or use the embedded index")
        if any(record.time_to_live is not None for record in records):
            raise unsupported("time_to_live", BACKEND, "delete the records, or use the embedded index")
        found_terms = [terms.terms(record.metadata) for record in records]
        schema.check_fit(records, found_terms, vectors, self.spec.distance)
        with self._write_lock:
            created = {
                found[schema.ID]: found["created"]
                for found in self._reader.by_id([record.id for record in records], [schema.ID, "created"])
            }
            sequence, now = self._next_sequence(), _now()
            rows = [
                schema.row(record, metadata_text, of_record, vector, sequence, created.get(record.id, now), now)
                for record, metadata_text, of_record, vector in zip(
                    records, metadata_texts, found_terms, vectors, strict=True
                )
            ]
            self._reader.call("upsert", data=rows)
            self._sequence = sequence
        return WriteResult(sequence, len(records) - len(created), len(created), synced=False)

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete the records with the given ids, by one message to Milvus; ids without a record are ignored.

        Return the sequence and the number of deleted records. If no record has one of the ids, nothing is written, and
        the sequence is that of the last write, as in `info`.
        """
        with self._write_lock:
            return self._delete([found[schema.ID] for found in self._reader.by_id(ids, [schema.ID])])

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet the filter `condition`, by one message to Milvus that has their ids.

        Return the sequence and the number of deleted records. If no record meets the filter, nothing is written, and
        the sequence is that of the last write, as in `info`.
        """
        with self._write_lock:
            return self._delete([found[schema.ID] for found in self._reader.walk([schema.ID], condition)])

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the records with the given ids, in the order of `ids`; ids without a record are left out.

        A repeated id gives its record repeatedly. `parts` is ignored: each record has text and metadata. Each has its
        vector only if `with_vectors`.
        """
        rows = self._reader.by_id(ids, schema.fields(with_vectors=with_vectors))
        found = {record.id: record for record in map(schema.stored, rows)}
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
        """Return a page of the records, sorted by id in byte order, and the token of the next page.

        Args:
            page_size: maximum number of records of the page, 1 to 1000.
            page_token: token of the page; empty: the first page.
            with_vectors: whether the records have their vectors.
            condition: the filter; None: all records.
            parts: ignored; the records have text and metadata.

        Returns:
            The records, and the token of the next page; empty for the last page.

        Raises:
            ServiceError: INVALID_ARGUMENT for a page size out of range or a wrong token.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        rows = self._reader.walk(schema.fields(with_vectors=with_vectors), condition, after=after, batch=page_size + 1)
        records = [schema.stored(found) for found in islice(rows, page_size + 1)]
        more = len(records) > page_size
        return records[:page_size], encode_token(records[page_size - 1].id) if more else ""

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records that meet the filter `condition`; None: of all records."""
        return self._reader.count(condition)

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
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Search for the records nearest to each query.

        The plan says HNSW if Milvus searched, even if a segment has no graph yet, since Milvus does not report that.
        The plan says EXACT if the server compared vectors with the query, see `Searcher.search`.

        Args:
            queries: float32 (queries, dimensions).
            top_k: maximum number of hits of each query, 1 to 10,000: one number, or a number for each query.
            ef: candidates that a search of the graph keeps, 0 to 1,000,000, see `Request.ef`; 0: chosen by `top_k`.
            min_recall: must be 0.
            exclude_ids: for each query the id of a record that is no hit, or None; empty: no query has one.
            with_vectors: whether hits have their vectors.
            conditions: the filter of each query, None for a query without; empty: no query has a filter. The caller
                must give one for each query: the number is not checked.
            parts: ignored; hits have text and metadata.

        Returns:
            The outcome of each query, in the order of the queries.

        Raises:
            ServiceError: INVALID_ARGUMENT for a query or number that is invalid; UNIMPLEMENTED for a valid `min_recall`
                above 0.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef, min_recall)
        if min_recall:
            raise unsupported("min_recall", BACKEND, "set ef, or use the embedded index")
        by_condition: dict[Filter | None, list[int]] = {}
        for row, condition in enumerate(list(conditions) or [None] * len(queries)):
            by_condition.setdefault(condition, []).append(row)
        outcomes: dict[int, SearchOutcome] = {}
        for condition, rows in by_condition.items():
            request = Request(queries[rows], [sizes[i] for i in rows], [excluded[i] for i in rows], ef, with_vectors)
            outcomes.update(zip(rows, Searcher(self._reader, condition).search(request), strict=True))
        return [outcomes[row] for row in range(len(queries))]

    def mismatches(self, condition: Filter) -> list[str]:
        """Return sentences that say why no record matches a filter, by the metadata of the first 1,000 records.

        The list is empty if these records show no reason.

        Args:
            condition: a filter that no record matches.
        """
        rows = self._reader.walk([schema.ID, "metadata"], batch=MISMATCH_RECORDS)
        return mismatches(condition, (schema.metadata(row) for row in islice(rows, MISMATCH_RECORDS)))

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Raise UNIMPLEMENTED: Milvus has the only copy of the records, so there is nothing to compare with."""
        raise unsupported("VerifyCollection", BACKEND, "use what Milvus offers for that")

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Raise UNIMPLEMENTED: a collection in Milvus has no file that the server could copy."""
        raise unsupported("BackupCollection", BACKEND, "use `emberpc collection export`")

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Raise UNIMPLEMENTED: the server would have to read all vectors from Milvus."""
        raise unsupported("FindDuplicates", BACKEND, _COPY)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Raise UNIMPLEMENTED: the server would have to read all vectors from Milvus."""
        raise unsupported("ClusterRecords", BACKEND, _COPY)

    def search_lexical(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Raise UNIMPLEMENTED: this backend has no word index, so there is no lexical search."""
        raise unsupported("mode LEXICAL", BACKEND, _DENSE)

    def search_hybrid(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        fusion: Fusion = Fusion.BOUNDS,
        ef: int = 0,
        min_recall: float = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Raise UNIMPLEMENTED: this backend has no word index, so there is no hybrid search."""
        raise unsupported("mode HYBRID", BACKEND, _DENSE)

    def _delete(self, present: Sequence[str]) -> WriteResult:
        """Delete the records with the ids `present`, which were just read; if there are none, send nothing to Milvus.

        The result is that of `delete`. The caller holds the write lock.
        """
        if present:
            self._reader.call("delete", filter=schema.one_of(present))
            self._sequence = self._next_sequence()
        return WriteResult(self._sequence, deleted=len(present), synced=False)

    def _next_sequence(self) -> int:
        return max(self._sequence + 1, _now())


def _now() -> int:
    """Return the present time in microseconds since 1970."""
    return time.time_ns() // 1000
