"""The truth: a collection's records in SQLite, every write on disk before it is answered."""

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
    ANSWER_BYTES,
    Change,
    CollectionSpec,
    Labels,
    Matrix,
    NewRecord,
    StoredRecord,
)
from emberpc.server.collections.validation import check_revision
from emberpc.server.errors import ServiceError, invalid
from emberpc.server.index.storage import acknowledged, schema, wal, word_index
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.database import connect, empty_log, transaction, translated
from emberpc.server.index.storage.filter_sql import Clause
from emberpc.server.index.storage.metadata_indexes import delete_rows, make_indexes
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.reserve import Reserve
from emberpc.server.index.storage.response_bytes import AnswerBytes
from emberpc.server.index.storage.rows import NUMBER_COLUMNS, bytes_of_name, damaged, has_sound_numbers, insert_row
from emberpc.server.index.storage.store_reader import StoreReader

log = logging.getLogger(__name__)

DATABASE_NAME = "records.db"


class Store(StoreReader):
    """One collection's database. Reads may come from any number of threads; the caller lets one write in at a time.

    Args:
        folder: the collection's folder.
        spec: what the collection is.
        cache: keeps records that are found often.
        reserve: space for deletions on a full disk.
        answer_bytes: most bytes of the records that are read for one answer.
        on_shortage: called when no file descriptor is free for reading, before another try.
        create: make the database anew.
    """

    def __init__(
        self,
        folder: Path,
        spec: CollectionSpec,
        cache: RecordCache,
        reserve: Reserve,
        on_shortage: Callable[[], None] = lambda: None,
        *,
        answer_bytes: int = ANSWER_BYTES,
        create: bool = False,
    ) -> None:
        super().__init__(folder / DATABASE_NAME, spec, cache, AnswerBytes(answer_bytes), on_shortage)
        self._reserve = reserve
        found = wal.look(self._path)
        self._writer = reserve.run(lambda: self._connect(create=create))
        try:
            with translated(self._what):
                wal.report(self._writer, found, self._what)
                schema.prepare(self._writer, self._what, create=create)
                make_indexes(self._writer, spec)
                schema.add_checksum_function(self._writer)
            last = self._sequence(self._writer)
            self._identity = self._read_identity(self._writer)
        except ServiceError:
            self._writer.close()
            raise
        self._report_lost_writes(last)

    def upsert(
        self,
        records: Sequence[NewRecord],
        documents: Sequence[str],
        vectors: Matrix,
        expected_revisions: Sequence[int] | None,
    ) -> Change:
        """Write records, all or none.

        Args:
            records: the records, no id twice.
            documents: the metadata of each, as JSON.
            vectors: float32 (records, dimensions).
            expected_revisions: the present revision of each, 0 for none; None: whatever it is.

        Raises:
            ServiceError: ABORTED if a revision is not the one expected, DATA_LOSS if it is expected and damaged,
                RESOURCE_EXHAUSTED if the disk is full.
        """
        if expected_revisions is not None and len(expected_revisions) != len(records):
            what = f"has {len(expected_revisions)} items for {len(records)} records; give one for each"
            raise invalid("expected_revisions", what)
        self._reserve.check(f"the request wrote nothing to {self._what}")
        return self._write(lambda connection: self._upsert(connection, records, documents, vectors, expected_revisions))

    def _upsert(
        self,
        connection: sqlite3.Connection,
        records: Sequence[NewRecord],
        documents: Sequence[str],
        vectors: Matrix,
        expected_revisions: Sequence[int] | None,
    ) -> Change:
        now = datetime.now(timezone.utc).timestamp()
        ids = [record.id for record in records]
        present = {row[0]: row[1:] for row in self._by(connection, "id", ids, f"id, {NUMBER_COLUMNS}")}
        damaged_ids = {record_id for record_id, row in present.items() if not has_sound_numbers(row)}
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
        added = self._insert(connection, records, documents, vectors, numbers)
        updated = len(present)
        return Change(sequence, added, removed, len(records) - updated, updated)

    def copy(self, records: Sequence[StoredRecord], documents: Sequence[str], vectors: Matrix) -> Change:
        """Write records of another database as they are there, with their revisions and times; this is no new write.

        Args:
            records: the records, no id twice.
            documents: the metadata of each, as JSON.
            vectors: float32 (records, dimensions), instead of the records' own.
        """
        self._reserve.check(f"the request wrote nothing to {self._what}")
        return self._write(lambda connection: self._copy(connection, records, documents, vectors))

    def _copy(
        self,
        connection: sqlite3.Connection,
        records: Sequence[StoredRecord],
        documents: Sequence[str],
        vectors: Matrix,
    ) -> Change:
        removed = {row[0] for row in self._by(connection, "id", [record.id for record in records], "label")}
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
        added = self._insert(connection, records, documents, vectors, numbers)
        return Change(self._sequence(connection), added, removed)

    def _insert(
        self,
        connection: sqlite3.Connection,
        records: Sequence[NewRecord | StoredRecord],
        documents: Sequence[str],
        vectors: Matrix,
        numbers: Sequence[tuple[int, float, float, float | None]],
    ) -> Labels:
        """Insert rows; `numbers` has the revision, create, update and expire time of each. Return their labels."""
        first = self._next_label(connection)
        labels = np.arange(first, first + len(records), dtype=np.int64)
        for label, record, document, vector, its in zip(
            labels.tolist(), records, documents, vectors, numbers, strict=True
        ):
            insert_row(connection, label, (record.id, record.text, document, record.label), vector, its)
        return labels

    def identity(self) -> str:
        """Return what no other database has; a copy of this one has it too, until one of the two takes another."""
        return self._read_identity(self._reader())

    def take_another_identity(self) -> None:
        """Be another one from now on than the databases that this one was copied from, or to."""
        with self._writing() as connection:
            connection.execute(schema.IDENTITY_ANEW)
        self._identity = self._read_identity(self._writer)

    def set_sequence(self, sequence: int) -> None:
        """Say what the number of the last write is."""
        with self._writing() as connection:
            connection.execute("UPDATE state SET sequence = ?", (sequence,))
        self._note_write(sequence)

    def delete(self, ids: Sequence[str]) -> Change:
        """Delete records by id, all at once; ids that are not there are no error, and none there is no write.

        A record whose id is damaged and no text goes by its `name_of`.
        """
        distinct = list(dict.fromkeys(ids))
        damaged_ids = [data for data in map(bytes_of_name, distinct) if data is not None]

        def find(connection: sqlite3.Connection) -> set[int]:
            found = {row[0] for row in self._by(connection, "id", [*distinct, *damaged_ids], "label")}
            # Bytes that are no text in UTF-8 are the id of no other record; elsewhere they are compared as bytes.
            for data in damaged_ids:
                if isinstance(lenient_text(data), bytes):
                    rows = connection.execute("SELECT label FROM records WHERE id = CAST(? AS TEXT)", (data,))
                    found |= {row[0] for row in rows}
            return found

        return self._delete(find)

    def delete_matching(self, condition: Clause) -> Change:
        """Delete the records that meet a condition, all at once; if none does it is no write."""
        return self._delete(lambda connection: set(self._matching(connection, condition).tolist()))

    def delete_expired(self, most: int | None = None) -> Change:
        """Delete records whose time is up, all or at most so many of them at once; none is no write."""
        now = datetime.now(timezone.utc).timestamp()
        due = Clause("expires <= ?", (now,))
        return self._delete(lambda connection: {row[0] for row in islice(self._expiring(connection, due), most)})

    def close(self) -> None:
        """Close every connection; no call may be under way or follow."""
        self._readers.close()
        self._writer.close()

    def _connect(self, *, create: bool = False) -> sqlite3.Connection:
        with translated(self._what):
            return connect(self._path, create=create)

    def _delete(self, find: Callable[[sqlite3.Connection], set[int]]) -> Change:
        change = self._reserve.run(lambda: self._delete_at_once(find))
        if not self._reserve.refill():
            # Most of what the deletion took is in the log, whose pages find room in the database's free ones.
            with translated(self._what):
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
        """Delete rows, damaged or not."""
        # The words of a text leave the index by the text: of a damaged one they stay, with no record behind them.
        damaged_texts = (
            "SELECT EXISTS (SELECT 1 FROM records WHERE label IN (SELECT value FROM json_each(?)) AND text_checksum "
            "IS NOT text_checksum_of("
            "CAST(id AS BLOB), CAST(text AS BLOB), CAST(metadata AS BLOB), CAST(class_label AS BLOB)))"
        )
        if labels and connection.execute(damaged_texts, (json.dumps(list(labels)),)).fetchone()[0]:
            self.suspect_words()
        delete_rows(connection, self._spec, labels)

    def build_words(self) -> None:
        """Build the word index again from the texts, as a write; its caller leaving does not stop it.

        Raises:
            ServiceError: INTERNAL if the database is damaged, RESOURCE_EXHAUSTED if the disk is full.
        """
        with translated(self._what), cancellation.cancelled_when(lambda: False):
            try:
                word_index.build(self._writer)
            except sqlite3.DatabaseError as error:
                self.words_beyond_repair = word_index.may_be_damage(error)
                self.words_suspect = not self.words_beyond_repair
                raise
        self.words_suspect = False
        log.warning("%s: the word index was built again from the texts", self._what)

    def _write(self, work: Callable[[sqlite3.Connection], Change]) -> Change:
        """Write everything that `work` does, or nothing, and note that it is acknowledged."""
        change = self._written(work)
        self._note_write(change.sequence)
        return change

    def _written(self, work: Callable[[sqlite3.Connection], Change]) -> Change:
        """Write everything that `work` does, or nothing; if a damaged word index refuses it, build that again, once."""
        with translated(self._what):
            try:
                with transaction(self._writer):
                    return work(self._writer)
            except sqlite3.DatabaseError as error:
                if self.words_beyond_repair or not word_index.may_be_damage(error):
                    raise
                log.warning("%s: a write failed; is the word index damaged?", self._what, exc_info=True)
            self.build_words()
            with transaction(self._writer):
                return work(self._writer)

    def _note_write(self, sequence: int) -> None:
        acknowledged.note(self._path.parent, self._identity, sequence)

    def _report_lost_writes(self, last: int) -> None:
        """Log how many acknowledged writes the database lacks, whose last write has that number."""
        noted = acknowledged.noted(self._path.parent, self._identity)
        if noted > last:
            log.error(
                "%s: %d acknowledged writes are lost: number %d was acknowledged, and the database ends with number "
                "%d, as after damage or if it is an older copy; compare the records with their source, or restore a "
                "backup",
                self._what,
                noted - last,
                noted,
                last,
            )
            # It is reported once.
            self._note_write(last)

    def _read_identity(self, connection: sqlite3.Connection) -> str:
        with translated(self._what):
            return str(connection.execute("SELECT identity FROM state").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with translated(self._what), transaction(self._writer):
            yield self._writer

    def _next_sequence(self, connection: sqlite3.Connection) -> int:
        connection.execute("UPDATE state SET sequence = sequence + 1")
        return self._sequence(connection)
