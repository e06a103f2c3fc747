"""Reads of a collection's records from SQLite; `store` adds the writes."""

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
from emberpc.server.collections.filters import Filter
from emberpc.server.collections.types import WHOLE_RECORD, CollectionSpec, Labels, Matrix, StoredRecord
from emberpc.server.index.storage import counters, nul_metadata, word_index
from emberpc.server.index.storage.damage import DamageFilter
from emberpc.server.index.storage.database import translated
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.readers import Readers
from emberpc.server.index.storage.record_cache import RecordCache
from emberpc.server.index.storage.response_bytes import (
    FEW_RECORDS,
    SIZES_AT_ONCE,
    ResponseBytes,
    row_bytes,
    select_parts,
    slices,
)
from emberpc.server.index.storage.rows import (
    AS_ONE_ROW,
    DAMAGE_ERRORS,
    NUMBER_COLUMNS,
    ROW_COLUMNS,
    UNCHECKED_COLUMNS,
    VECTOR_COLUMNS,
    Row,
    columns_of,
    has_intact_numbers,
    record_of,
    records_of_one_row,
)

log = logging.getLogger(__name__)

_MAX_VARIABLES = 900
#: Limit in bytes of metadata that is read to explain why a filter matches nothing; reading this takes some 0.2 s.
_MAX_METADATA = 4 * 2**20


class StoreReader:
    """Reads one collection's database. Any number of threads may read; each calls `release` after its reads.

    Every method may raise the errors of `translated`, such as INTERNAL if the database fails. Damaged records are left
    out of results unless the method says otherwise.

    Args:
        path: the database file.
        spec: the spec of the collection.
        cache: cache of recently read records, of all collections together.
        response_bytes: counts and limits the bytes of the records that are read for one response.
        on_shortage: called when no file descriptor is free, before the second attempt to connect.
    """

    def __init__(
        self,
        path: Path,
        spec: CollectionSpec,
        cache: RecordCache,
        response_bytes: ResponseBytes,
        on_shortage: Callable[[], None],
    ) -> None:
        self.response_bytes = response_bytes
        self._path = path
        self._spec = spec
        self._damage = DamageFilter(spec)
        #: Called by `by_label` and `ids` with the labels of the damaged records that they found.
        self.on_damage: Callable[[set[int]], None] = lambda _: None
        #: Whether maintenance must rebuild the word index.
        self.words_suspect = False
        #: Whether damage may be why the last rebuild failed. A failed search or write then requests no other rebuild.
        self.words_beyond_repair = False
        #: Called by `suspect_words`, to request the maintenance that rebuilds the word index.
        self.on_suspect_words: Callable[[], None] = lambda: None
        self._cache = cache
        self._owner = cache.new_owner()
        self._subject = f"collection {spec.name!r}"
        self._readers = Readers(path, self._subject, on_shortage)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let this thread's reads in the block see one state. Do not nest it, or call `get` or `page`, which use it."""
        connection = self._connection()
        with translated(self._subject):
            connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.rollback()

    def get(self, ids: Sequence[str], *, with_vectors: bool) -> dict[str, StoredRecord]:
        """Return the existing records by id, of one state of the database, with at least `response_bytes.parts`.

        Raises:
            ServiceError: DATA_LOSS if a record is damaged, RESOURCE_EXHAUSTED over the limit of `response_bytes`.
        """
        with self.snapshot():
            distinct = list(dict.fromkeys(ids))
            whole, found = self._spend("id", distinct), {}
            for part in [distinct] if whole else slices(distinct):
                for row in self._select_by(self._connection(), "id", part, columns_of(with_vectors)):
                    record = record_of(row, self._spec, with_vectors=with_vectors)
                    found[record.id] = record if whole else select_parts(self.response_bytes.parts, record)
        return found

    def _spend(self, column: str, keys: Sequence[object]) -> bool:
        """Count the bytes of records before they are read; see `ResponseBytes.spend` for arguments and result."""
        with translated(self._subject):
            return self.response_bytes.spend(self._connection(), column, keys)

    def by_label(self, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        """Return the existing, undamaged records by label, with at least `response_bytes.parts`.

        Without vectors, the cache is used. RESOURCE_EXHAUSTED over the limit of `response_bytes`, apart from the cache.
        """
        found = {} if with_vectors else self._cache.find(self._owner, labels)
        missing = [label for label in labels if label not in found]
        counted = with_vectors or len(missing) > FEW_RECORDS or self.response_bytes.parts != WHOLE_RECORD
        if missing and counted and not self._spend("label", missing):
            for part in slices(missing):
                read = self._read(part, with_vectors=with_vectors)
                found |= {label: select_parts(self.response_bytes.parts, record) for label, record in read.items()}
        elif with_vectors:
            return self._read(missing, with_vectors=True)
        elif missing:
            read = self._read_plain(missing)
            if not counted:
                self.response_bytes.count(read.values())
            self._cache.add(self._owner, read)
            found |= read
        return found

    def _read_plain(self, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Do what `_read` does without vectors, but faster if no record is damaged."""
        # The statement returns all records in one row, since sqlite3 releases and retakes Python's GIL for each row.
        with translated(self._subject):
            try:
                return records_of_one_row(self._connection().execute(AS_ONE_ROW, (json.dumps(labels),)).fetchone()[0])
            except (sqlite3.OperationalError, *DAMAGE_ERRORS):
                pass  # a record is damaged; read them row by row
        return self._read(labels, with_vectors=False)

    def _read(self, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        """Return the existing, undamaged records by label, from the database; report damaged ones to `on_damage`."""
        rows = list(self._select_by(self._connection(), "label", labels, columns_of(with_vectors)))
        found = dict(self._damage.records(rows, with_vectors=with_vectors))
        if len(found) < len(rows):
            self.on_damage({row[0] for row in rows} - found.keys())
        return found

    def page(
        self, after: str, count: int, *, with_vectors: bool, condition: Clause = EVERYTHING
    ) -> tuple[list[StoredRecord], bool]:
        """Return the first `count` undamaged records that meet a condition, of those with ids greater than `after`.

        Returns:
            The records in byte order of ids, the first whatever its size; whether the limit of bytes ended the list.
        """
        found: list[StoredRecord] = []
        seen = size = 0
        statement = f"SELECT label FROM records WHERE id > ? AND {condition.sql} ORDER BY id LIMIT ? OFFSET ?"  # noqa: S608 - our own conditions
        with self.snapshot(), translated(self._subject):
            while (wanted := count - len(found)) > 0:
                parameters = (after, *condition.parameters, wanted, seen)
                labels = [row[0] for row in self._damage.select(self._connection(), statement, parameters)]
                for start in range(0, len(labels), SIZES_AT_ONCE):
                    part = labels[start : start + SIZES_AT_ONCE]
                    rows = {
                        row[0]: row
                        for row in self._select_by(self._connection(), "label", part, columns_of(with_vectors))
                    }
                    records = dict(self._damage.records(rows.values(), with_vectors=with_vectors))
                    for label in part:
                        size += row_bytes(rows[label], self.response_bytes.parts)
                        if size > self.response_bytes.limit and found:
                            return found, True
                        found += [select_parts(self.response_bytes.parts, records[label])] if label in records else []
                if len(labels) < wanted:
                    break
                seen += len(labels)
        return found, False

    def metadata(self, count: int) -> Generator[dict[str, Any], None, None]:
        """Yield the metadata of the first `count` records by label, at most 4 MiB of JSON; skip what is not JSON."""
        size = 0
        with translated(self._subject):
            rows = self._connection().execute(
                "SELECT CAST(metadata AS BLOB) FROM records ORDER BY label LIMIT ?", (count,)
            )
            for (metadata_text,) in rows:
                size += len(metadata_text or b"")
                if size > _MAX_METADATA:
                    return
                with suppress(*DAMAGE_ERRORS):
                    yield json.loads(metadata_text)

    def compile(self, condition: Filter | None) -> Clause | None:
        """Compile a validated filter to SQL that is valid until the next write; None if there is no filter."""
        with translated(self._subject):
            return None if condition is None else nul_metadata.compiled(self._connection(), condition)

    def count(self, condition: Clause = EVERYTHING) -> int:
        """Count records, damaged or not, that meet a condition; one on metadata excludes metadata that is not JSON."""
        with translated(self._subject):
            statement = f"SELECT count(*) FROM records WHERE {condition.sql}"  # noqa: S608 - our own conditions
            return int(self._damage.select(self._connection(), statement, condition.parameters)[0][0])

    def matching(self, condition: Clause, after: int | None = None) -> Labels:
        """Return labels, int64, ascending, of records that meet a condition; if `after` is given, only greater labels.

        Records that an earlier read found damaged are left out.
        """
        with translated(self._subject):
            return self._damage.undamaged(self._matching(self._connection(), condition, after))

    def lexical_matches(self, expression: str, count: int, condition: Clause) -> list[tuple[int, float]]:
        """Search the word index; return the best `count` labels with BM25 scores, greatest score first.

        `expression` is a valid FTS5 query. Labels may be of damaged records or, if the index is wrong, of no record.

        Raises:
            ServiceError: DATA_LOSS if the word index is found damaged, and a rebuild is requested; INTERNAL if
                `words_beyond_repair` is true, or the database fails.
        """
        # The join doubles the time, so only a condition uses it. CROSS JOIN: SQLite begins with the matches in `words`.
        joined = "" if condition is EVERYTHING else "CROSS JOIN records ON label = words.rowid"
        statement = (
            f"SELECT words.rowid, -bm25(words) AS score FROM words {joined} "  # noqa: S608 - our own conditions
            f"WHERE words MATCH ? AND {condition.sql} ORDER BY score DESC, words.rowid LIMIT ?"
        )
        with translated(self._subject), self._reading_words():
            return self._damage.select(self._connection(), statement, (expression, *condition.parameters, count))

    def count_lexical_matches(self, expression: str = "") -> int:
        """Count the indexed texts that match a valid FTS5 query; empty: all. For the errors, see `lexical_matches`."""
        texts, parameters = ("words WHERE words MATCH ?", (expression,)) if expression else ("words_docsize", ())
        with translated(self._subject), self._reading_words():
            return int(self._connection().execute(f"SELECT count(*) FROM {texts}", parameters).fetchone()[0])  # noqa: S608

    def newest_label(self) -> int:
        """Return the counter of labels, the greatest one ever assigned; 0 if none was. INTERNAL if it is no integer."""
        with translated(self._subject):
            return self._newest_label(self._connection())

    def sequence(self) -> int:
        """Return the sequence of the last write; raise INTERNAL if it is missing or no integer."""
        return self._sequence(self._connection())

    def labels(self) -> Labels:
        """Return all records' labels, int64, ascending, damaged or not; skip (damaged) labels outside 1 to 2**62."""
        with translated(self._subject):
            rows = self._connection().execute(counters.SELECT_LABELS).fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def ids(self, labels: Sequence[int]) -> dict[int, str]:
        """Return the ids of the existing, undamaged records, by label."""
        return {label: record.id for label, record in self._read(labels, with_vectors=False).items()}

    def vectors(self, labels: Sequence[int], *, checked: bool = True) -> tuple[Labels, Matrix]:
        """Return labels, int64 (n,), and stored vectors, float32 (n, dimensions), of those given records that exist.

        Args:
            labels: the labels of the records, ascending, as in the result.
            checked: whether to verify checksums and leave out damaged vectors. If not, damaged vectors may be among the
                result, and the caller must verify those that it uses. Records that an earlier read found damaged are
                left out in both cases.
        """
        columns = VECTOR_COLUMNS if checked else UNCHECKED_COLUMNS
        return self._damage.vectors(
            list(self._select_by(self._connection(), "label", labels, columns)), checked=checked
        )

    def vector_batches(
        self, batch: int, condition: Clause = EVERYTHING, *, checked: bool = True
    ) -> Iterator[tuple[Labels, Matrix]]:
        """Read the vectors of records that meet a condition, `batch` at a time; yield what `vectors` returns for them.

        Labels ascend. Use it in a block of `snapshot`, so that all batches are of one state. `checked`: see `vectors`.
        """
        if condition is not EVERYTHING:
            labels = self.matching(condition).tolist()
            for start in range(0, len(labels), batch):
                yield self.vectors(labels[start : start + batch], checked=checked)
            return
        columns = VECTOR_COLUMNS if checked else UNCHECKED_COLUMNS
        with translated(self._subject):
            cursor = self._connection().execute(f"SELECT {columns} FROM records ORDER BY label")  # noqa: S608 - ours
            while rows := cursor.fetchmany(batch):
                cancellation.check()
                yield self._damage.vectors(rows, checked=checked)

    def written_after(self, label: int, count: int) -> list[tuple[int, StoredRecord]]:
        """Return the first `count` labels above `label`, ascending, with their records; DATA_LOSS if one is damaged."""
        with translated(self._subject):
            found = self._damage.select(
                self._connection(),
                f"SELECT {columns_of(False)} FROM records WHERE label > ? ORDER BY label LIMIT ?",  # noqa: S608 - ours
                (label, count),
            )
        return [(row[0], record_of(row, self._spec, with_vectors=False)) for row in found]

    def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the revisions of the existing records, by id, without a check for damage."""
        return dict(self._select_by(self._connection(), "id", ids, "id, revision"))

    def next_expiry(self) -> float | None:
        """Return the earliest expire time, maybe past, in seconds since 1970; None: no (undamaged) record expires."""
        with translated(self._subject):
            row = next(self._expiring(self._connection(), Clause("expires IS NOT NULL")), None)
        return None if row is None else float(row[4])

    def _expiring(self, connection: sqlite3.Connection, condition: Clause) -> Iterator[tuple[Any, ...]]:
        """Yield rows of `NUMBER_COLUMNS` of the records that meet a condition, earliest expiry first.

        Rows with damaged numbers are marked as damaged and left out: a damaged time must not cause a deletion.
        """
        statement = f"SELECT {NUMBER_COLUMNS} FROM records WHERE {condition.sql} ORDER BY expires"  # noqa: S608 - ours
        for row in connection.execute(statement, condition.parameters):
            if has_intact_numbers(row):
                yield row
            else:
                label = row[0]
                found = self._damage.select(connection, "SELECT id FROM records WHERE label = ?", (label,))
                self._damage.note_record(label, found[0][0])

    def rows(self, first: int, count: int) -> list[Row]:
        """Return the first `count` rows with labels from `first` on, in the order of labels, damaged or not."""
        with translated(self._subject):
            found = self._damage.select(
                self._connection(),
                f"SELECT {ROW_COLUMNS} FROM records WHERE label >= ? ORDER BY label LIMIT ?",  # noqa: S608 - ours
                (first, count),
            )
            return [Row(*row) for row in found]

    def integrity_errors(self) -> list[str]:
        """Run SQLite's integrity check; return its messages of damage, at most 100, without those of FTS5."""
        with translated(self._subject):
            found = [row[0] for row in self._connection().execute("PRAGMA integrity_check")]
        # Later versions of SQLite let FTS5 check the word index. `words_are_intact` also compares it with the texts.
        return [each for each in found if each != "ok" and "FTS5" not in each]

    def counter_problem(self, newest_label: int, newest_revision: int) -> str:
        """Return what is wrong with the counters, or ""; see `counters.problem` for the arguments."""
        with translated(self._subject):
            return counters.problem(self._connection(), newest_label, newest_revision)

    def words_are_intact(self) -> bool:
        """Return `word_index.is_intact`: whether the word index matches the prepared texts. All of both are read."""
        with translated(self._subject):
            return word_index.is_intact(self._path)

    def suspect_words(self) -> None:
        """Mark the word index as possibly damaged, and call `on_suspect_words`, so that the index is rebuilt."""
        self.words_suspect = True
        self.on_suspect_words()

    @contextmanager
    def _reading_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if self.words_beyond_repair or not word_index.may_be_damage(error):
                raise
            log.warning("%s: a lexical search failed", self._subject, exc_info=True)
            self.suspect_words()
            raise word_index.damaged(self._subject) from error

    def release(self) -> None:
        """Give this thread's connection back to the pool, at the end of a call; do nothing in a block of `snapshot`."""
        self._readers.release()

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection, which it holds until `release`."""
        return self._readers.take()

    def _select_by(
        self, connection: sqlite3.Connection, column: str, keys: Sequence[object], columns: str
    ) -> Iterator[tuple[Any, ...]]:
        """Yield `columns` of the rows whose `column` is one of `keys`, sorted by `column` in each part of 900 keys."""
        with translated(self._subject):
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
        # Python sorts: with ORDER BY, SQLite may scan all records instead of using a metadata index.
        newer, parameters = ("", ()) if after is None else ("label > ? AND ", (after,))
        rows = self._damage.select(
            connection,
            f"SELECT label FROM records WHERE {newer}{condition.sql}",  # noqa: S608 - our own conditions
            (*parameters, *condition.parameters),
        )
        return np.sort(np.array([row[0] for row in rows], dtype=np.int64))

    def _newest_label(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return counters.integer_of(row, self._subject) if row else 0

    def _sequence(self, connection: sqlite3.Connection) -> int:
        with translated(self._subject):
            return counters.integer_of(connection.execute("SELECT sequence FROM state").fetchone(), self._subject)
