"""Writes of a collection's records to SQLite, the source of truth; a write is on disk when its method returns."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import numpy as np

from emberpc.server import cancellation
from emberpc.server.collections.types import (
    MAX_RESPONSE_BYTES,
    Change,
    CollectionSpec,
    Labels,
    Matrix,
    NewRecord,
    StoredRecord,
)
from emberpc.server.collections.validation import check_revision
from emberpc.server.errors import ServiceError, invalid
from emberpc.server.index.storage import acknowledged, counters, nul_metadata, schema, wal, word_index
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.database import connect, empty_log, transaction, translated
from emberpc.server.index.storage.filter_sql import Clause
from emberpc.server.index.storage.metadata_indexes import delete_rows, make_indexes
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import DISK_FULL, Reserve
from emberpc.server.index.storage.response_bytes import ResponseBytes
from emberpc.server.index.storage.rows import (
    NUMBER_COLUMNS,
    bytes_of_printable_id,
    damaged,
    has_intact_numbers,
    insert_row,
)
from emberpc.server.index.storage.store_reader import StoreReader

log = logging.getLogger(__name__)

DATABASE_NAME = "records.db"


class Store(StoreReader):
    """The database of one collection. Any number of threads may read; the caller serializes writes.

    Opening the database migrates tables of an older version, creates missing metadata indexes, and logs lost writes and
    damaged counters. A sequence that is missing or no integer is an error.

    Args:
        folder: the collection's folder.
        spec: the spec of the collection.
        cache: cache of recently read records, of all collections together.
        reserve: disk space for deletions on a full disk.
        on_shortage: called when no file descriptor is free for reading, before the second attempt to connect.
        max_response_bytes: limit of the bytes of the records that are read for one response.
        create: whether to create the database; if not, a missing database is an error.

    Raises:
        ServiceError: INTERNAL if the database cannot be opened, is damaged or is of a newer version, RESOURCE_EXHAUSTED
            if the disk is full or no file descriptor is free, DEADLINE_EXCEEDED if the call is cancelled.
        OSError: the write-ahead log cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        spec: CollectionSpec,
        cache: RecordCache,
        reserve: Reserve,
        on_shortage: Callable[[], None] = lambda: None,
        *,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        create: bool = False,
    ) -> None:
        super().__init__(folder / DATABASE_NAME, spec, cache, ResponseBytes(max_response_bytes), on_shortage)
        self._reserve = reserve
        found = wal.inspect(self._path)
        self._writer = reserve.run_for_deletion(lambda: self._connect(create=create))
        try:
            with translated(self._subject):
                wal.report_lost_commits(self._writer, found, self._subject)
                schema.prepare(self._writer, self._subject, create=create)
                make_indexes(self._writer, spec)
                nul_metadata.make_index(self._writer, self._subject)
                schema.add_checksum_function(self._writer)
                counter_problem = counters.problem(self._writer)
            last = self._sequence(self._writer)
            self._identity = self._read_identity(self._writer)
        except ServiceError:
            self._writer.close()
            raise
        if counter_problem:
            log.error("%s", counters.damaged(self._subject, counter_problem).message)
        self._report_lost_writes(last)

    def upsert(
        self,
        records: Sequence[NewRecord],
        metadata: Sequence[str],
        vectors: Matrix,
        expected_revisions: Sequence[int] | None,
    ) -> Change:
        """Insert records, or replace those with the same ids, in one transaction: all records or none.

        The sequence grows by 1, and is the revision of the written records. A replaced record keeps its create time,
        unless its revision or times are damaged (`has_intact_numbers`).

        Args:
            records: the records, with distinct ids; a time to live counts from now.
            metadata: the metadata of each record, as JSON.
            vectors: float32 (records, dimensions), not prepared.
            expected_revisions: the expected present revision of each record, 0 for a missing record; None: no check.

        Returns:
            The sequence of the write, the labels added and removed, and the numbers of inserted and replaced records.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong number of expected revisions, ABORTED if a revision differs,
                DATA_LOSS if a revision is expected of a record whose revision or times are damaged, RESOURCE_EXHAUSTED
                if the disk is full, INTERNAL if the database fails or a counter is damaged, DEADLINE_EXCEEDED if the
                call is cancelled.
        """
        if expected_revisions is not None and len(expected_revisions) != len(records):
            message = f"has {len(expected_revisions)} items for {len(records)} records; give one for each"
            raise invalid("expected_revisions", message)
        self._reserve.check(f"the request wrote nothing to {self._subject}")
        return self._write(lambda connection: self._upsert(connection, records, metadata, vectors, expected_revisions))

    def _upsert(
        self,
        connection: sqlite3.Connection,
        records: Sequence[NewRecord],
        metadata: Sequence[str],
        vectors: Matrix,
        expected_revisions: Sequence[int] | None,
    ) -> Change:
        counters.check(connection, self._subject)
        now = datetime.now(timezone.utc).timestamp()
        ids = [record.id for record in records]
        present = {row[0]: row[1:] for row in self._select_by(connection, "id", ids, f"id, {NUMBER_COLUMNS}")}
        damaged_ids = {record_id for record_id, row in present.items() if not has_intact_numbers(row)}
        for record_id, revision in zip(ids, expected_revisions or (), strict=False):
            if record_id in damaged_ids:
                raise damaged(record_id)
            check_revision(record_id, revision, present[record_id][1] if record_id in present else 0)
        sequence = self._next_sequence(connection)
        removed = {row[0] for row in present.values()}
        self._remove(connection, removed)
        created = {record_id: row[2] for record_id, row in present.items() if record_id not in damaged_ids}
        numbers = [
            (
                sequence,
                created.get(record.id, now),
                now,
                None if record.time_to_live is None else now + record.time_to_live,
            )
            for record in records
        ]
        added = self._insert(connection, records, metadata, vectors, numbers)
        updated = len(present)
        return Change(sequence, added, removed, len(records) - updated, updated)

    def copy(self, records: Sequence[StoredRecord], metadata: Sequence[str], vectors: Matrix) -> Change:
        """Write records of another database with their revisions and times; replace records with the same ids.

        All records are written in one transaction. The sequence does not grow.

        Args:
            records: the records, with distinct ids.
            metadata: the metadata of each record, as JSON.
            vectors: float32 (records, dimensions), stored instead of the records' own vectors.

        Returns:
            The unchanged sequence of this database, and the labels that were added and removed.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the database fails or a counter is
                damaged, DEADLINE_EXCEEDED if the call is cancelled.
        """
        self._reserve.check(f"the request wrote nothing to {self._subject}")
        return self._write(lambda connection: self._copy(connection, records, metadata, vectors))

    def _copy(
        self,
        connection: sqlite3.Connection,
        records: Sequence[StoredRecord],
        metadata: Sequence[str],
        vectors: Matrix,
    ) -> Change:
        counters.check(connection, self._subject)
        removed = {row[0] for row in self._select_by(connection, "id", [record.id for record in records], "label")}
        self._remove(connection, removed)
        numbers = [
            (
                record.revision,
                record.create_time.timestamp(),
                record.update_time.timestamp(),
                None if record.expire_time is None else record.expire_time.timestamp(),
            )
            for record in records
        ]
        added = self._insert(connection, records, metadata, vectors, numbers)
        return Change(self._sequence(connection), added, removed)

    def _insert(
        self,
        connection: sqlite3.Connection,
        records: Sequence[NewRecord | StoredRecord],
        metadata: Sequence[str],
        vectors: Matrix,
        numbers: Sequence[tuple[int, float, float, float | None]],
    ) -> Labels:
        """Insert rows under new labels, and return these labels, int64 (records,), ascending.

        `metadata` has the metadata of each record as JSON. `numbers` has the revision and the create, update and
        expire time of each record; times in seconds since 1970, None: never expires.
        """
        first = counters.next_label(connection, self._subject)
        labels = np.arange(first, first + len(records), dtype=np.int64)
        for label, record, metadata_text, vector, its in zip(
            labels.tolist(), records, metadata, vectors, numbers, strict=True
        ):
            insert_row(connection, label, (record.id, record.text, metadata_text, record.label), vector, its)
        return labels

    def identity(self) -> str:
        """Return the identity of this database. A copy of its files has the same identity until `take_new_identity`."""
        return self._read_identity(self._connection())

    def take_new_identity(self) -> None:
        """Give this database a new random identity. Snapshots and files `acknowledged` of the old one are ignored."""
        with self._writing() as connection:
            connection.execute(schema.NEW_IDENTITY)
        self._identity = self._read_identity(self._writer)

    def set_sequence(self, sequence: int) -> None:
        """Set the sequence of the last write, in the database and in the file `acknowledged`."""
        with self._writing() as connection:
            connection.execute("UPDATE state SET sequence = ?", (sequence,))
        self._note_write(sequence)

    def delete(self, ids: Sequence[str]) -> Change:
        """Delete records by id in one transaction; ignore missing ids. The sequence grows only if a record is deleted.

        A record whose damaged id is read as bytes is deleted by the `printable_id` of these bytes.

        Returns:
            The sequence of the last write, and the labels that were removed.

        Raises:
            ServiceError: INTERNAL if the database fails or its sequence is damaged, DEADLINE_EXCEEDED if the call is
                cancelled, RESOURCE_EXHAUSTED if the disk is full and the reserve does not suffice.
        """
        distinct = list(dict.fromkeys(ids))
        damaged_ids = [data for data in map(bytes_of_printable_id, distinct) if data is not None]

        def find(connection: sqlite3.Connection) -> set[int]:
            found = {row[0] for row in self._select_by(connection, "id", [*distinct, *damaged_ids], "label")}
            # An id that is read as bytes is a BLOB, which is found above, or a TEXT that is not UTF-8, which needs the
            # cast. Bytes in UTF-8 are not cast: that would find the undamaged record whose id has these bytes.
            for data in damaged_ids:
                if isinstance(lenient_text(data), bytes):
                    rows = connection.execute("SELECT label FROM records WHERE id = CAST(? AS TEXT)", (data,))
                    found |= {row[0] for row in rows}
            return found

        return self._delete(find)

    def delete_matching(self, condition: Clause) -> Change:
        """Delete the records that meet a condition in one transaction. The sequence grows only if one is deleted.

        A record whose metadata is not JSON may be kept, if the condition reads metadata. Result and errors are those of
        `delete`.
        """
        return self._delete(lambda connection: set(self._matching(connection, condition).tolist()))

    def delete_expired(self, maximum: int | None = None) -> Change:
        """Delete expired records in one transaction, earliest expiry first. The sequence grows only if one is deleted.

        A record whose revision or times are damaged is not deleted. Result and errors are those of `delete`.

        Args:
            maximum: maximum number of records to delete; None: all that have expired.
        """
        now = datetime.now(timezone.utc).timestamp()
        due = Clause("expires <= ?", (now,))
        return self._delete(lambda connection: {row[0] for row in islice(self._expiring(connection, due), maximum)})

    def close(self) -> None:
        """Close every connection. No other method may run meanwhile or later."""
        self._readers.close()
        self._writer.close()

    def _connect(self, *, create: bool = False) -> sqlite3.Connection:
        with translated(self._subject):
            return connect(self._path, create=create)

    def _delete(self, find: Callable[[sqlite3.Connection], set[int]]) -> Change:
        try:
            change = self._reserve.run(lambda: self._delete_at_once(find))
        except ServiceError as error:
            if error.reason != DISK_FULL:
                raise
            # A reader may have kept an earlier deletion from emptying the log, which then holds the space.
            with translated(self._subject):
                empty_log(self._writer, wait=True)
            change = self._reserve.run(lambda: self._delete_at_once(find))
        if not self._reserve.refill():
            # The log mostly uses the space of the reserve. A deletion makes the database itself hardly larger.
            with translated(self._subject):
                empty_log(self._writer)
            self._reserve.refill()
        return change

    def _delete_at_once(self, find: Callable[[sqlite3.Connection], set[int]]) -> Change:
        def delete(connection: sqlite3.Connection) -> Change:
            removed = find(connection)
            cancellation.check()
            sequence = self._next_sequence(connection) if removed else self._sequence(connection)
            self._remove(connection, removed)
            return Change(sequence, np.empty(0, dtype=np.int64), removed)

        return self._write(delete)

    def _remove(self, connection: sqlite3.Connection, labels: set[int]) -> None:
        """Delete rows by label, damaged or not; if one of them has a wrong text checksum, call `suspect_words`."""
        # FTS5 removes the words of the present text. Words that a damaged text had before may stay in the index.
        damaged_texts = (
            "SELECT EXISTS (SELECT 1 FROM records WHERE label IN (SELECT value FROM json_each(?)) AND text_checksum "
            "IS NOT text_checksum_of("
            "CAST(id AS BLOB), CAST(text AS BLOB), CAST(metadata AS BLOB), CAST(class_label AS BLOB)))"
        )
        if labels and connection.execute(damaged_texts, (json.dumps(list(labels)),)).fetchone()[0]:
            self.suspect_words()
        delete_rows(connection, self._spec, labels)

    def build_words(self) -> None:
        """Rebuild the word index from the texts, even if the call of this thread is cancelled.

        The caller must hold the lock of writes. If damage may be why the rebuild fails, `words_beyond_repair` becomes
        true and `words_suspect` false. After another failure `words_suspect` is true, so that maintenance tries again,
        and `words_beyond_repair` false. After a rebuild both are false.

        Raises:
            ServiceError: INTERNAL if the database fails or is damaged, RESOURCE_EXHAUSTED if the disk is full.
        """
        with translated(self._subject), cancellation.cancelled_when(lambda: False):
            try:
                word_index.build(self._writer)
            except sqlite3.DatabaseError as error:
                self.words_beyond_repair = word_index.may_be_damage(error)
                self.words_suspect = not self.words_beyond_repair
                raise
        self.words_suspect = self.words_beyond_repair = False
        log.warning("%s: the word index was rebuilt from the texts", self._subject)

    def _write(self, work: Callable[[sqlite3.Connection], Change]) -> Change:
        """Do what `_run_transaction` does, and then write the sequence of the change to the file `acknowledged`."""
        change = self._run_transaction(work)
        self._note_write(change.sequence)
        return change

    def _run_transaction(self, work: Callable[[sqlite3.Connection], Change]) -> Change:
        """Run `work` in a transaction and return its change.

        If a damaged word index may be why `work` failed, rebuild the index and run `work` once more, unless
        `words_beyond_repair` is true.
        """
        with translated(self._subject):
            try:
                with transaction(self._writer):
                    return work(self._writer)
            except sqlite3.DatabaseError as error:
                if self.words_beyond_repair or not word_index.may_be_damage(error):
                    raise
                log.warning("%s: a write failed; is the word index damaged?", self._subject, exc_info=True)
            self.build_words()
            with transaction(self._writer):
                return work(self._writer)

    def _note_write(self, sequence: int) -> None:
        acknowledged.write(self._path.parent, self._identity, sequence)

    def _report_lost_writes(self, last: int) -> None:
        """Log how many writes the database lacks, if its sequence `last` is less than that in file `acknowledged`."""
        noted = acknowledged.read(self._path.parent, self._identity)
        if noted > last:
            log.error(
                "%s: %d acknowledged writes are lost: number %d was acknowledged, and the database ends with number "
                "%d, as after damage or if it is an older copy; compare the records with their source, or restore a "
                "backup",
                self._subject,
                noted - last,
                noted,
                last,
            )
            # The next opening must not report the loss again.
            self._note_write(last)

    def _read_identity(self, connection: sqlite3.Connection) -> str:
        with translated(self._subject):
            return str(connection.execute("SELECT identity FROM state").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with translated(self._subject), transaction(self._writer):
            yield self._writer

    def _next_sequence(self, connection: sqlite3.Connection) -> int:
        if not 0 <= self._sequence(connection) <= counters.LARGEST:
            raise counters.damaged(self._subject)
        connection.execute("UPDATE state SET sequence = sequence + 1")
        return self._sequence(connection)
