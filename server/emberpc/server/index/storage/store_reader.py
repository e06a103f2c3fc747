"""What is read of a collection's records in SQLite; see `store`."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.server import cancellation
from emberpc.server.collections.types import WHOLE_RECORD, CollectionSpec, Labels, Matrix, StoredRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import word_index
from emberpc.server.index.storage.damage import Damage
from emberpc.server.index.storage.database import translated
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.readers import Readers
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.response_bytes import SIZES_AT_ONCE, AnswerBytes, only, row_bytes
from emberpc.server.index.storage.rows import (
    AS_ONE_ROW,
    DAMAGES,
    NUMBER_COLUMNS,
    ROW_COLUMNS,
    UNCHECKED_COLUMNS,
    VECTOR_COLUMNS,
    Row,
    columns_of,
    has_sound_numbers,
    record_of,
    records_of_one_row,
)

log = logging.getLogger(__name__)

_MAX_VARIABLES = 900
#: Bytes of metadata that are read to explain why a filter matches nothing: 0.2 s.
_MOST_METADATA = 4 * 2**20
#: The bytes of at most this many records are counted after they are read, which saves a statement. Records too large to
#: be kept whole are read this many at a time.
_FEW = 8


class StoreReader:
    """Reads one collection's database. Reads may come from any number of threads.

    Every method may raise `ServiceError`: INTERNAL if the database fails. Records that are damaged are left out of what
    is read, unless it says otherwise.

    Args:
        path: the database.
        spec: what the collection is.
        cache: keeps records that are found often.
        answers: limits the bytes of the records that are read for one answer.
        on_shortage: called when no file descriptor is free, before another try.
    """

    def __init__(
        self,
        path: Path,
        spec: CollectionSpec,
        cache: RecordCache,
        answers: AnswerBytes,
        on_shortage: Callable[[], None],
    ) -> None:
        self.answers = answers
        self._path = path
        self._spec = spec
        self._damage = Damage(spec)
        #: Called with labels that a search came upon, of records that turned out to be damaged.
        self.on_damage: Callable[[set[int]], None] = lambda _: None
        #: Whether the word index is to be built again, and whether that failed.
        self.words_suspect = False
        self.words_beyond_repair = False
        #: Called when `words_suspect` becomes true.
        self.on_suspect_words: Callable[[], None] = lambda: None
        self._cache = cache
        self._owner = cache.new_owner()
        self._what = f"collection {spec.name!r}"
        self._readers = Readers(path, self._what, on_shortage)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let all reads of this thread in the block see the same state. Not to be nested."""
        connection = self._reader()
        with translated(self._what):
            connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.rollback()

    def get(self, ids: Sequence[str], *, with_vectors: bool) -> dict[str, StoredRecord]:
        """Return the records of those ids that are there, all as of one moment; at least with the answer's parts.

        Raises:
            ServiceError: besides the usual, DATA_LOSS if one of them is damaged.
        """
        with self.snapshot():
            distinct = list(dict.fromkeys(ids))
            whole, found = self._spend("id", distinct), {}
            for part in [distinct] if whole else _slices(distinct):
                for row in self._by(self._reader(), "id", part, columns_of(with_vectors)):
                    record = record_of(row, self._spec, with_vectors=with_vectors)
                    found[record.id] = record if whole else only(self.answers.parts, record)
        return found

    def _spend(self, column: str, keys: Sequence[object]) -> bool:
        """Count records that are about to be read against the limit of the answer; return whether all may be whole."""
        with translated(self._what):
            return self.answers.spend(self._reader(), column, keys)

    def by_label(self, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        """Return the records of those labels that are there, or were when they were last found.

        They have at least the answer's parts.
        """
        found = {} if with_vectors else self._cache.find(self._owner, labels)
        missing = [label for label in labels if label not in found]
        counted = with_vectors or len(missing) > _FEW or self.answers.parts != WHOLE_RECORD
        if missing and counted and not self._spend("label", missing):
            for part in _slices(missing):
                read = self._read(part, with_vectors=with_vectors)
                found |= {label: only(self.answers.parts, record) for label, record in read.items()}
        elif with_vectors:
            return self._read(missing, with_vectors=True)
        elif missing:
            read = self._read_plain(missing)
            if not counted:
                self.answers.count(read.values())
            self._cache.add(self._owner, read)
            found |= read
        return found

    def _read_plain(self, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Read the records of those labels that are there, without vectors.

        All of them as one row: sqlite3 lets go of the interpreter's lock for every row, and waits for it again.
        """
        with translated(self._what):
            try:
                return records_of_one_row(self._reader().execute(AS_ONE_ROW, (json.dumps(labels),)).fetchone()[0])
            except (sqlite3.OperationalError, *DAMAGES):
                pass  # one of them is damaged
        return self._read(labels, with_vectors=False)

    def _read(self, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        """Read the records of those labels that are there, one by one, and say which turned out to be damaged."""
        rows = list(self._by(self._reader(), "label", labels, columns_of(with_vectors)))
        found = dict(self._damage.records(rows, with_vectors=with_vectors))
        if len(found) < len(rows):
            self.on_damage({row[0] for row in rows} - found.keys())
        return found

    def page(
        self, after: str, count: int, *, with_vectors: bool, condition: Clause = EVERYTHING
    ) -> tuple[list[StoredRecord], bool]:
        """Return the records that follow an id in byte order and meet a condition.

        Returns:
            At most `count` records, and whether there are fewer only because they have the bytes of one answer.
        """
        found: list[StoredRecord] = []
        seen = size = 0
        statement = f"SELECT label FROM records WHERE id > ? AND {condition.sql} ORDER BY id LIMIT ? OFFSET ?"  # noqa: S608 - our own conditions
        with self.snapshot(), translated(self._what):
            while (wanted := count - len(found)) > 0:
                parameters = (after, *condition.parameters, wanted, seen)
                labels = [row[0] for row in self._damage.select(self._reader(), statement, parameters)]
                for start in range(0, len(labels), SIZES_AT_ONCE):
                    part = labels[start : start + SIZES_AT_ONCE]
                    rows = {row[0]: row for row in self._by(self._reader(), "label", part, columns_of(with_vectors))}
                    records = dict(self._damage.records(rows.values(), with_vectors=with_vectors))
                    for label in part:
                        size += row_bytes(rows[label], self.answers.parts)
                        if size > self.answers.limit and found:
                            return found, True
                        found += [only(self.answers.parts, records[label])] if label in records else []
                if len(labels) < wanted:
                    break
                seen += len(labels)
        return found, False

    def metadata(self, count: int) -> Generator[dict[str, Any], None, None]:
        """Give the metadata of the first records that are not damaged: at most `count`, and at most 4 MiB as JSON."""
        size = 0
        with translated(self._what):
            rows = self._reader().execute("SELECT CAST(metadata AS BLOB) FROM records ORDER BY label LIMIT ?", (count,))
            for (document,) in rows:
                size += len(document)
                if size > _MOST_METADATA:
                    return
                with suppress(*DAMAGES):
                    yield json.loads(document)

    def count(self, condition: Clause = EVERYTHING) -> int:
        """Return the number of records that meet a condition."""
        with translated(self._what):
            statement = f"SELECT count(*) FROM records WHERE {condition.sql}"  # noqa: S608 - our own conditions
            return int(self._damage.select(self._reader(), statement, condition.parameters)[0][0])

    def matching(self, condition: Clause, after: int | None = None) -> Labels:
        """Return the labels of the records that meet a condition, int64, ascending; only those above `after`."""
        with translated(self._what):
            return self._damage.sound(self._matching(self._reader(), condition, after))

    def with_words(self, expression: str, count: int, condition: Clause) -> list[tuple[int, float]]:
        """Return the labels whose texts best match an FTS5 query, and that meet a condition, with their BM25 scores.

        Args:
            expression: the query, right in FTS5's syntax.
            count: most labels to return.
            condition: what they must meet.

        Raises:
            ServiceError: besides the usual, DATA_LOSS if the word index is damaged.
        """
        # Joined only if it must be, since that takes as long again; and from the words, which are fewer.
        joined = "" if condition is EVERYTHING else "CROSS JOIN records ON label = words.rowid"
        statement = (
            f"SELECT words.rowid, -bm25(words) AS score FROM words {joined} "  # noqa: S608 - our own conditions
            f"WHERE words MATCH ? AND {condition.sql} ORDER BY score DESC, words.rowid LIMIT ?"
        )
        with translated(self._what), self._reading_words():
            return self._damage.select(self._reader(), statement, (expression, *condition.parameters, count))

    def count_with_words(self, expression: str) -> int:
        """Return the number of texts that match an FTS5 query; raises what `with_words` does."""
        with translated(self._what), self._reading_words():
            found = self._reader().execute("SELECT count(*) FROM words WHERE words MATCH ?", (expression,))
            return int(found.fetchone()[0])

    def newest_label(self) -> int:
        """Return the greatest label that any record ever had; 0 if there never was one."""
        with translated(self._what):
            return self._newest_label(self._reader())

    def sequence(self) -> int:
        """Return the number of the last write."""
        return self._sequence(self._reader())

    def labels(self) -> Labels:
        """Return the labels of all records, int64, ascending."""
        with translated(self._what):
            rows = self._reader().execute("SELECT label FROM records ORDER BY label").fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def ids(self, labels: Sequence[int]) -> dict[int, str]:
        """Return the ids of those labels that are there."""
        return {label: record.id for label, record in self._read(labels, with_vectors=False).items()}

    def vectors(self, labels: Sequence[int], *, checked: bool = True) -> tuple[Labels, Matrix]:
        """Return the vectors of those labels that are there, ascending: int64 (n,) and float32 (n, dimensions).

        Args:
            labels: the labels.
            checked: whether to compare vectors with their checksums. If not, a damaged one may be among them: the
                caller has to check what it answers with.
        """
        columns = VECTOR_COLUMNS if checked else UNCHECKED_COLUMNS
        return self._damage.vectors(list(self._by(self._reader(), "label", labels, columns)), checked=checked)

    def scan(
        self, batch: int, condition: Clause = EVERYTHING, *, checked: bool = True
    ) -> Iterator[tuple[Labels, Matrix]]:
        """Return the vectors of all that meet a condition as `vectors` does, `batch` at a time; within a `snapshot`."""
        if condition is not EVERYTHING:
            labels = self.matching(condition).tolist()
            for start in range(0, len(labels), batch):
                yield self.vectors(labels[start : start + batch], checked=checked)
            return
        columns = VECTOR_COLUMNS if checked else UNCHECKED_COLUMNS
        with translated(self._what):
            cursor = self._reader().execute(f"SELECT {columns} FROM records ORDER BY label")  # noqa: S608 - ours
            while rows := cursor.fetchmany(batch):
                cancellation.check()
                yield self._damage.vectors(rows, checked=checked)

    def written_after(self, label: int, count: int) -> list[tuple[int, StoredRecord]]:
        """Return the records whose labels follow one, with theirs, at most `count`, in the order of their writing.

        Raises:
            ServiceError: besides the usual, DATA_LOSS if one of them is damaged.
        """
        with translated(self._what):
            found = self._damage.select(
                self._reader(),
                f"SELECT {columns_of(False)} FROM records WHERE label > ? ORDER BY label LIMIT ?",  # noqa: S608 - ours
                (label, count),
            )
        return [(row[0], record_of(row, self._spec, with_vectors=False)) for row in found]

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the revisions of those ids that are there."""
        return dict(self._by(self._reader(), "id", ids, "id, revision"))

    def next_expiry(self) -> float | None:
        """Return when the next record is gone, in seconds since 1970; None if none ever is."""
        with translated(self._what):
            row = next(self._expiring(self._reader(), Clause("expires IS NOT NULL")), None)
        return None if row is None else float(row[4])

    def _expiring(self, connection: sqlite3.Connection, condition: Clause) -> Iterator[tuple[Any, ...]]:
        """Return the rows of `NUMBER_COLUMNS` of records that meet a condition, by their expiry, the next one first.

        A time that may be damaged deletes no record: one whose numbers do not go with their checksum is left out.
        """
        statement = f"SELECT {NUMBER_COLUMNS} FROM records WHERE {condition.sql} ORDER BY expires"  # noqa: S608 - ours
        for row in connection.execute(statement, condition.parameters):
            if has_sound_numbers(row):
                yield row
            else:
                label = row[0]
                found = self._damage.select(connection, "SELECT id FROM records WHERE label = ?", (label,))
                self._damage.note_record(label, found[0][0])

    def rows(self, after: int, count: int) -> list[Row]:
        """Return the rows that follow a label, at most `count`, by label, damaged or not."""
        with translated(self._what):
            found = self._damage.select(
                self._reader(),
                f"SELECT {ROW_COLUMNS} FROM records WHERE label > ? ORDER BY label LIMIT ?",  # noqa: S608 - ours
                (after, count),
            )
            return [Row(*row) for row in found]

    def damage(self) -> list[str]:
        """Return what SQLite finds wrong with its own structures; empty: nothing."""
        with translated(self._what):
            found = [row[0] for row in self._reader().execute("PRAGMA integrity_check")]
        # Later versions of SQLite check the word index too; `words_are_sound` compares it with the texts.
        return [each for each in found if each != "ok" and "FTS5" not in each]

    def words_are_sound(self) -> bool:
        """Return whether the word index has the words of the texts and no others; reads all of both."""
        with translated(self._what):
            return word_index.is_sound(self._path)

    def suspect_words(self) -> None:
        """Take note that the word index may not have the words of the texts."""
        self.words_suspect = True
        self.on_suspect_words()

    @contextmanager
    def _reading_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if self.words_beyond_repair or not word_index.may_be_damage(error):
                raise
            log.warning("%s: a search by words failed", self._what, exc_info=True)
            self.suspect_words()
            raise word_index.damaged(self._what) from error

    def release(self) -> None:
        """Let other threads have the connection that this one reads with; to be called at the end of each call."""
        self._readers.release()

    def _reader(self) -> sqlite3.Connection:
        """Return this thread's connection, which it has until `release`."""
        return self._readers.take()

    def _by(
        self, connection: sqlite3.Connection, column: str, keys: Sequence[object], columns: str
    ) -> Iterator[tuple[Any, ...]]:
        """Select rows by many keys, as many at a time as SQLite takes."""
        with translated(self._what):
            for start in range(0, len(keys), _MAX_VARIABLES):
                cancellation.check()
                part = keys[start : start + _MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                yield from self._damage.select(
                    connection,
                    f"SELECT {columns} FROM records WHERE {column} IN ({marks}) ORDER BY {column}",  # noqa: S608 - our own names
                    part,
                )

    def _matching(self, connection: sqlite3.Connection, condition: Clause, after: int | None = None) -> Labels:
        # Sorted here: asked for the order, SQLite would rather walk over all records than use an index on metadata.
        newer, parameters = ("", ()) if after is None else ("label > ? AND ", (after,))
        rows = self._damage.select(
            connection,
            f"SELECT label FROM records WHERE {newer}{condition.sql}",  # noqa: S608 - our own conditions
            (*parameters, *condition.parameters),
        )
        return np.sort(np.array([row[0] for row in rows], dtype=np.int64))

    def _newest_label(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return self._whole(row) if row else 0

    def _sequence(self, connection: sqlite3.Connection) -> int:
        with translated(self._what):
            return self._whole(connection.execute("SELECT sequence FROM state").fetchone())

    def _next_label(self, connection: sqlite3.Connection) -> int:
        """Return a label that no record ever had."""
        (greatest,) = connection.execute("SELECT coalesce(max(label), 0) FROM records").fetchone()
        return max(self._newest_label(connection), int(greatest)) + 1

    def _whole(self, row: tuple[Any, ...] | None) -> int:
        """Return the number of a row that has one column; raise INTERNAL if it is damaged."""
        if row is None or type(row[0]) is not int:
            message = f"a counter in the database of {self._what} is damaged; restore a backup"
            raise ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")
        return int(row[0])


def _slices(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut keys of records that are too large to be kept whole."""
    for start in range(0, len(keys), _FEW):
        yield keys[start : start + _FEW]
