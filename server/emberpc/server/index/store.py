"""The truth: a collection's records in SQLite, every write on disk before it is answered."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.index.types import Labels, Matrix, NewRecord, StoredRecord

DATABASE_NAME = "records.db"
_MAX_VARIABLES = 900
#: SQLite's message; its code is in the exception only from Python 3.11 on.
_DISK_FULL = "database or disk is full"
_COLUMNS = "label, id, text, metadata, class_label, revision, created, updated"

# The label is the record's number in the graph. AUTOINCREMENT: it is never used again, and an update gets a new one,
# so the graph's content follows from the set of labels alone.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    label INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    class_label TEXT NOT NULL,
    vector BLOB NOT NULL,
    revision INTEGER NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL);
INSERT OR IGNORE INTO state VALUES (1, 0);
"""


@dataclass(frozen=True)
class Change:
    """What a write did: its number, the labels that came and went, how many ids were new, and how many replaced."""

    sequence: int
    added: Labels
    removed: set[int]
    inserted: int = 0
    updated: int = 0


class Store:
    """One collection's database.

    Args:
        folder: the collection's folder.

    Raises:
        ServiceError: INTERNAL if the database cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DATABASE_NAME
        self._write_lock = threading.Lock()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._closed = False
        self._writer = self._connect()
        with self._failing():
            self._writer.executescript(_SCHEMA)

    def upsert(self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None) -> Change:
        """Write records with their vectors, float32 (n, dimensions), all or none.

        Raises:
            ServiceError: ABORTED if a revision is not the one expected, RESOURCE_EXHAUSTED if the disk is full.
        """
        now = datetime.now(timezone.utc).timestamp()
        with self._transaction() as connection:
            present = {
                row[0]: row[1:]
                for row in self._by(connection, "id", [record.id for record in records], "id, label, revision, created")
            }
            if expected_revisions is not None:
                _check_revisions(records, expected_revisions, {key: row[1] for key, row in present.items()})
            sequence = self._next_sequence(connection)
            removed = {row[0] for row in present.values()}
            connection.executemany("DELETE FROM records WHERE label = ?", [(label,) for label in removed])
            added = []
            for record, vector in zip(records, vectors, strict=True):
                created = present[record.id][2] if record.id in present else now
                cursor = connection.execute(
                    "INSERT INTO records (id, text, metadata, class_label, vector, revision, created, updated) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        record.id,
                        record.text,
                        json.dumps(record.metadata, ensure_ascii=False, allow_nan=False),
                        record.label,
                        vector.astype("<f4").tobytes(),
                        sequence,
                        created,
                        now,
                    ),
                )
                added.append(cursor.lastrowid)
        updated = len(present)
        return Change(sequence, np.array(added, dtype=np.int64), removed, len(records) - updated, updated)

    def delete(self, ids: Sequence[str]) -> Change:
        """Delete records by id, all at once; ids that are not there are no error."""
        with self._transaction() as connection:
            removed = {row[0] for row in self._by(connection, "id", list(dict.fromkeys(ids)), "label")}
            sequence = self._next_sequence(connection) if removed else self._sequence(connection)
            connection.executemany("DELETE FROM records WHERE label = ?", [(label,) for label in removed])
        return Change(sequence, np.empty(0, dtype=np.int64), removed)

    def get(self, ids: Sequence[str], *, with_vectors: bool) -> dict[str, StoredRecord]:
        """Return the records of those ids that are there."""
        rows = self._by(self._reader(), "id", list(dict.fromkeys(ids)), _columns(with_vectors))
        return {row[1]: _record(row) for row in rows}

    def by_label(self, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        """Return the records of those labels that are there."""
        rows = self._by(self._reader(), "label", labels, _columns(with_vectors))
        return {row[0]: _record(row) for row in rows}

    def page(self, after: str, count: int, *, with_vectors: bool) -> list[StoredRecord]:
        """Return the records that follow an id in byte order, at most `count`."""
        with self._failing():
            rows = self._reader().execute(
                f"SELECT {_columns(with_vectors)} FROM records WHERE id > ? ORDER BY id LIMIT ?",  # noqa: S608 - our columns
                (after, count),
            )
            return [_record(row) for row in rows]

    def count(self) -> int:
        """Return the number of records."""
        with self._failing():
            return int(self._reader().execute("SELECT count(*) FROM records").fetchone()[0])

    def sequence(self) -> int:
        """Return the number of the last write."""
        return self._sequence(self._reader())

    def labels(self) -> Labels:
        """Return the labels of all records, ascending."""
        with self._failing():
            rows = self._reader().execute("SELECT label FROM records ORDER BY label").fetchall()
        return np.array([row[0] for row in rows], dtype=np.int64)

    def vectors(self, labels: Sequence[int]) -> tuple[Labels, Matrix]:
        """Return the vectors of those labels that are there: int64 (n,) and float32 (n, dimensions)."""
        rows = list(self._by(self._reader(), "label", labels, "label, vector"))
        found = np.array([row[0] for row in rows], dtype=np.int64)
        if not rows:
            return found, np.empty((0, 0), dtype=np.float32)
        return found, np.stack([np.frombuffer(row[1], dtype="<f4") for row in rows])

    def close(self) -> None:
        """Close every connection; later calls fail with UNAVAILABLE."""
        with self._write_lock, self._readers_lock:
            self._closed = True
            for connection in (self._writer, *self._readers):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        with self._failing():
            connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30)
            connection.execute("PRAGMA journal_mode = WAL")
            # In WAL mode anything less than FULL may lose what was acknowledged.
            connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _reader(self) -> sqlite3.Connection:
        """Return this thread's own connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect()
            with self._readers_lock:
                if self._closed:
                    connection.close()
                    raise _gone()
                self._readers.append(connection)
            self._local.connection = connection
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the one writer; everything is written, or nothing."""
        with self._write_lock, self._failing():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _by(
        self, connection: sqlite3.Connection, column: str, keys: Sequence[object], columns: str
    ) -> Iterator[tuple[Any, ...]]:
        """Select rows by many keys, as many at a time as SQLite takes."""
        with self._failing():
            for start in range(0, len(keys), _MAX_VARIABLES):
                part = keys[start : start + _MAX_VARIABLES]
                marks = ",".join("?" * len(part))
                yield from connection.execute(
                    f"SELECT {columns} FROM records WHERE {column} IN ({marks})",  # noqa: S608 - our own names
                    list(part),
                ).fetchall()

    def _sequence(self, connection: sqlite3.Connection) -> int:
        with self._failing():
            return int(connection.execute("SELECT sequence FROM state").fetchone()[0])

    def _next_sequence(self, connection: sqlite3.Connection) -> int:
        connection.execute("UPDATE state SET sequence = sequence + 1")
        return self._sequence(connection)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn SQLite's errors into the server's."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            if self._closed:
                raise _gone() from error
            raise
        except sqlite3.OperationalError as error:
            if str(error) == _DISK_FULL:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED, "the disk is full; nothing was written, make room", reason="DISK_FULL"
                ) from error
            raise ServiceError(Code.INTERNAL, "the collection's database failed") from error
        except sqlite3.DatabaseError as error:
            raise ServiceError(Code.INTERNAL, "the collection's database is damaged") from error


def _columns(with_vectors: bool) -> str:
    return f"{_COLUMNS}, vector" if with_vectors else _COLUMNS


def _record(row: tuple[Any, ...]) -> StoredRecord:
    return StoredRecord(
        id=row[1],
        text=row[2],
        metadata=json.loads(row[3]),
        label=row[4],
        revision=row[5],
        create_time=datetime.fromtimestamp(row[6], timezone.utc),
        update_time=datetime.fromtimestamp(row[7], timezone.utc),
        vector=np.frombuffer(row[8], dtype="<f4") if len(row) > 8 else None,
    )


def _check_revisions(records: Sequence[NewRecord], expected: Sequence[int], present: dict[str, int]) -> None:
    if len(expected) != len(records):
        raise invalid("expected_revisions", f"has {len(expected)} items for {len(records)} records; give one for each")
    for record, revision in zip(records, expected, strict=True):
        if present.get(record.id, 0) != revision:
            raise ServiceError(
                Code.ABORTED,
                f"record {record.id!r} has revision {present.get(record.id, 0)}, not {revision}; nothing was written, "
                "read it again and retry",
                reason="REVISION_MISMATCH",
                metadata={"record": record.id},
            )


def _gone() -> ServiceError:
    return ServiceError(Code.UNAVAILABLE, "the collection is being closed; try again", reason="CLOSED")
