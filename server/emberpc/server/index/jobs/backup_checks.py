"""Validate a file that a caller sent as the backup of a collection; nothing in the file is trusted.

A restore makes the file the database of the new collection, and opens it for writing. So the file must have no tables,
indexes, triggers or views but those of a collection, and all its values must be valid. Only the word index is not
checked: a restore rebuilds it.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

import numpy as np

from emberpc.server.collections.metric import check_vectors
from emberpc.server.collections.types import CollectionSpec, NewRecord
from emberpc.server.collections.validation import check_records
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.jobs import backup
from emberpc.server.index.storage import counters, schema
from emberpc.server.index.storage.database import STEPS_BETWEEN_LOOKS
from emberpc.server.index.storage.rows import Row

log = logging.getLogger(__name__)

_BATCH = 100
#: Seconds from the year 1970 to the year 10,000: Python's datetime has no later times.
_END_OF_TIME = 253_402_300_800
#: SQL conditions that the values of a column must meet, by the declared type of the column; {0} is the column's name.
#: A column that allows NULL may have NULL too.
_CONDITIONS = {
    "INTEGER": f"typeof({{0}}) = 'integer' AND {{0}} BETWEEN 0 AND {counters.LARGEST}",
    "REAL": f"typeof({{0}}) = 'real' AND {{0}} >= 0 AND {{0}} < {_END_OF_TIME}",
    "TEXT": "typeof({0}) = 'text'",
    "BLOB": "typeof({0}) = 'blob'",
}


def damaged(what: str) -> ServiceError:
    """Return the INVALID_ARGUMENT error for a damaged backup; `what` is a clause: what is wrong with the file."""
    return ServiceError(
        Code.INVALID_ARGUMENT, f"the backup cannot be restored: {what}; restore another copy", reason="BACKUP_DAMAGED"
    )


def foreign(what: str) -> ServiceError:
    """Return the INVALID_ARGUMENT error for a file that is not a backup of a collection; `what` is a clause: why."""
    message = f"the file is no backup of a collection: {what}; restore one that `BackupCollection` gave"
    return ServiceError(Code.INVALID_ARGUMENT, message, reason="NOT_A_BACKUP")


def check_backup(
    path: Path, accept: Callable[[CollectionSpec], None], stop: Callable[[], bool]
) -> tuple[CollectionSpec, datetime]:
    """Check the database of a backup: tables, values, counters, checksums, vectors and metadata, not the word index.

    Args:
        path: the file of the backup without its last line; the file is only read.
        accept: called with the spec; raises ValueError or ServiceError if the collection cannot be served.
        stop: whether to stop; called every few milliseconds of a statement, and before each 100 records.

    Returns:
        The spec of the collection, and when it was created.

    Raises:
        ServiceError: INVALID_ARGUMENT if the file is not a backup or is damaged, or `accept` raised an error;
            FAILED_PRECONDITION if a newer version wrote the file; UNAVAILABLE if stopped.
    """
    with _reading(path, stop) as theirs:
        version = _version(theirs)
        with _with_tables_of(theirs, version) as ours:
            spec, created = _spec(theirs, accept)
            found = [row[0] for row in theirs.execute("PRAGMA integrity_check(10)")]
            if found != ["ok"]:
                log.warning("a backup is damaged: %s", "; ".join(map(str, found)))
                raise damaged("its database is damaged")
            _check_values(theirs, ours)
            _check_records(theirs, _columns(ours), spec, stop, older=version < schema.CHECKED_VERSION)
    return spec, created


@contextmanager
def _reading(path: Path, stop: Callable[[], bool]) -> Iterator[sqlite3.Connection]:
    """Open a database that may be malicious, and yield a connection that can only read.

    Args:
        path: the database.
        stop: whether to stop; SQLite calls it every few milliseconds during a statement.

    Raises:
        ServiceError: SQLite fails at the opening or in the block: UNAVAILABLE if `stop` returns True after the failure,
            else the INVALID_ARGUMENT error for a damaged backup.
    """
    try:
        # `immutable`: SQLite reads and writes no journal or write-ahead log beside the file.
        address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
            # SQLite recommends the first three settings for untrusted databases; `query_only` forbids writes.
            for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0", "query_only = ON"):
                connection.execute(f"PRAGMA {pragma}")
            connection.set_progress_handler(stop, STEPS_BETWEEN_LOOKS)
            yield connection
    # UnicodeDecodeError: Python decodes names and messages of SQLite, which may contain bytes of the file.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if stop():
            raise restore_cancelled() from error
        log.warning("a backup cannot be read: %s", error)
        raise damaged("its database is damaged") from error


def restore_cancelled() -> ServiceError:
    """Return the UNAVAILABLE error for a restore that was stopped, or for a call after the restore has ended."""
    return ServiceError(Code.UNAVAILABLE, "the restore was given up; begin again", reason="GIVEN_UP")


def _version(theirs: sqlite3.Connection) -> int:
    """Return the number of migration steps (`schema.STEPS`) that the database of a backup has had.

    Raises:
        ServiceError: FAILED_PRECONDITION if a newer version wrote the backup; INVALID_ARGUMENT if the file is no
            backup, the number is negative, or the encoding of texts is not UTF-8.
    """
    if theirs.execute("PRAGMA application_id").fetchone()[0] != backup.APPLICATION_ID:
        raise foreign("it is a database of something else")
    version = int(theirs.execute("PRAGMA user_version").fetchone()[0])
    if version > len(schema.STEPS):
        raise _newer("its database has the format", version, len(schema.STEPS))
    # Only UTF-8, since in another encoding SQLite would sort ids in another order.
    if version < 0 or theirs.execute("PRAGMA encoding").fetchone()[0] != "UTF-8":
        raise foreign("its version or its encoding is none of ours")
    return version


@contextmanager
def _with_tables_of(theirs: sqlite3.Connection, version: int) -> Iterator[sqlite3.Connection]:
    """Open a database in memory with the same tables as a backup, but empty, and yield a connection to it.

    No table of the backup is read. Its declarations of tables, indexes, triggers and views must be compared before a
    table is read, since a malicious declaration could make SQLite compute an expression.

    Raises:
        ServiceError: INVALID_ARGUMENT if the backup has other tables than a collection's database of that version.
    """
    declared = _objects(theirs)
    for steps in schema.tables_of(version):
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as ours:
            schema.make(ours, steps)
            ours.execute(backup.TABLE)
            if _objects(ours) == declared:
                yield ours
                return
    raise foreign("its tables are not those of a collection")


def _newer(what: str, found: int, maximum: int) -> ServiceError:
    message = (
        f"a newer version of emberpc wrote the backup: {what} {found}, and this emberpc reads formats up to {maximum}; "
        "restore it with the newer version"
    )
    return ServiceError(Code.FAILED_PRECONDITION, message, reason="NEWER_FORMAT")


def _objects(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Return type, name, table and SQL of each table, index, trigger and view of a database, sorted by type and name.

    The SQL is empty for an index that SQLite created by itself.
    """
    statement = "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name"
    return connection.execute(statement).fetchall()


def _spec(theirs: sqlite3.Connection, accept: Callable[[CollectionSpec], None]) -> tuple[CollectionSpec, datetime]:
    """Return the spec of the collection in a backup, and when the collection was created.

    Raises:
        ServiceError: FAILED_PRECONDITION if a newer version wrote the backup; INVALID_ARGUMENT if the table `backup`
            does not have one row, the spec or the time is invalid, or `accept` raised an error.
    """
    rows = theirs.execute("SELECT format, spec, created FROM backup LIMIT 2").fetchall()
    if rows and isinstance(rows[0][0], int) and rows[0][0] > backup.FORMAT:
        raise _newer("it has the format", rows[0][0], backup.FORMAT)
    try:
        ((_, text, created),) = rows
        spec = _typed_spec(text)
        spec.check()
        accept(spec)
        return spec, datetime.fromtimestamp(created, timezone.utc)
    except (
        ServiceError, ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError
    ) as error:  # fmt: skip  # OverflowError and OSError: a time that the system cannot represent
        raise damaged("what it says of the collection cannot be") from error


def _typed_spec(text: str) -> CollectionSpec:
    """Decode a spec from JSON, and check the types of its values, which `CollectionSpec.from_json` does not check.

    Whether the values are in their ranges is not checked.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: the text is not a spec.
    """
    spec = CollectionSpec.from_json(text)
    defaults = json.loads(CollectionSpec("any", 1).to_json())
    if any(not isinstance(value, type(defaults[name])) for name, value in json.loads(text).items()):
        raise TypeError("a value has another type")
    if not all(isinstance(field, str) for field in spec.indexed_fields):
        raise TypeError("a field is no text")
    return spec


def _check_values(theirs: sqlite3.Connection, ours: sqlite3.Connection) -> None:
    """Check the types and ranges of the values in a backup's tables, by `_CONDITIONS`, and the counters.

    SQLite stores a value of any type in most columns. The word index is left out, since a restore rebuilds it.

    Args:
        theirs: the database of the backup.
        ours: an empty database with the same tables; its declarations say which columns there are, of which types, and
            which may be NULL.

    Raises:
        ServiceError: INVALID_ARGUMENT if a value or a counter is invalid.
    """
    tables = ours.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' AND name NOT LIKE 'words%'"
    ).fetchall()
    for (table,) in tables:
        columns = ours.execute('SELECT name, type, "notnull" OR pk FROM pragma_table_info(?)', (table,)).fetchall()
        conditions = [
            f"({_CONDITIONS[kind].format(name)}{'' if required else f' OR {name} IS NULL'})"
            for name, kind, required in columns
        ]
        statement = f"SELECT 1 FROM {table} WHERE NOT ({' AND '.join(conditions)}) LIMIT 1"  # noqa: S608 - our own tables
        if theirs.execute(statement).fetchone():
            raise damaged(f"its table {table} holds values that cannot be")
    minimum, newest_label, newest_revision = theirs.execute(
        "SELECT coalesce(min(label), 1), coalesce(max(label), 0), coalesce(max(revision), 0) FROM records"
    ).fetchone()
    if minimum < 1:
        raise damaged(f"a record has the number {minimum}")
    if found := counters.problem(theirs, newest_label, newest_revision):
        raise damaged(found)


def _columns(ours: sqlite3.Connection) -> str:
    """Return SQL that selects the fields of `Row`, in their order, from the table `records` of a backup.

    `ours` is a database with the same tables. A column that its `records` lack, as in an older version, is NULL.
    """
    present = {name for (name,) in ours.execute("SELECT name FROM pragma_table_info('records')")}
    return ", ".join(name if name in present else "NULL" for name in Row._fields)


def _check_records(
    theirs: sqlite3.Connection, columns: str, spec: CollectionSpec, stop: Callable[[], bool], *, older: bool
) -> None:
    """Check that every record of a backup is valid and matches its checksums.

    Args:
        theirs: the database of the backup.
        columns: SQL that selects the fields of `Row`.
        spec: the spec of the collection.
        stop: whether to stop; called before each 100 records.
        older: whether an older version wrote the backup, so that its rows may lack checksums.

    Raises:
        ServiceError: INVALID_ARGUMENT if a record is damaged; UNAVAILABLE if stopped.
    """
    rows = theirs.execute(f"SELECT {columns} FROM records ORDER BY label")  # noqa: S608 - our own columns
    while batch := rows.fetchmany(_BATCH):
        if stop():
            raise restore_cancelled()
        vectors = []
        for row in map(Row._make, batch):
            _, record_id, text, metadata, label, vector = row[:6]
            if not (row.was_intact if older else row.is_intact):
                raise damaged(f"its record {record_id!r} is not as it was written")
            if len(vector) != 4 * spec.dimensions:
                what = f"has a vector of {len(vector)} bytes, not {4 * spec.dimensions}"
                raise damaged(f"its record {record_id!r} {what}")
            vectors.append(np.frombuffer(vector, dtype="<f4"))
            try:
                check_records([NewRecord(record_id, text, json.loads(metadata), label)], restored=True)
            except (ValueError, RecursionError) as error:
                raise damaged(f"its record {record_id!r} has metadata that is no JSON") from error
            except ServiceError as error:
                what = error.violations[0].description.partition(";")[0]
                raise damaged(f"a part of its record {record_id!r} {what}") from error
        try:
            check_vectors(np.stack(vectors), spec.dimensions, spec.distance, str)
        except ServiceError as error:
            record_id = batch[int(error.violations[0].field)][1]
            raise damaged(f"the vector of its record {record_id!r} cannot be compared with others") from error
