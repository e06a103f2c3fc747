"""Back up a collection as one file, while reads and writes of the collection continue.

The file is an SQLite database: a copy of the collection's database without metadata indexes, with the spec of the
collection in the table `backup`. After the database comes one line with the SHA-256 of all bytes before the line.
SQLite ignores the line. By the SHA-256 a restore detects a file that was cut off or changed.

The copy is made by SQLite's VACUUM INTO. This statement reads in one transaction, so the copy has the state of one
moment. It blocks no writes, since the database has a write-ahead log. SQLite's online backup would start again at every
write, and would copy the pages of deleted rows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import IO

from emberpc.server.collections.types import CollectionSpec, Piece
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import counters
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.database import STEPS_BETWEEN_LOOKS, connect, translated
from emberpc.server.index.storage.files import new_folder, translated_os_errors
from emberpc.server.index.storage.filter_sql import INDEX_PREFIX
from emberpc.server.index.storage.rows import ROW_COLUMNS, Row, damaged
from emberpc.server.index.storage.store import DATABASE_NAME

FORMAT = 1
#: SQLite's `application_id` of a backup, by which a restore recognizes a backup: "Embr" in ASCII.
APPLICATION_ID = 0x456D6272
#: Statement that creates the table `backup`. Its only row has the format of the backup, the spec of the collection as
#: JSON, and when the collection was created, in seconds since 1970.
TABLE = "CREATE TABLE backup (format INTEGER NOT NULL, spec TEXT NOT NULL, created REAL NOT NULL)"
#: Last line of a backup; %s is the SHA-256 (hex) of all bytes before the line. `LAST_LINE_SIZE` is its number of bytes.
_LAST_LINE = b"emberpc-backup-sha256:%s\n"
LAST_LINE_SIZE = len(_LAST_LINE % (b"0" * 64))
#: Bytes that a backup or restore must leave free on the disk, for writes of records.
HEADROOM = 64 * 2**20
_INDEXES = f"{INDEX_PREFIX}*"
_PIECE_BYTES = 2**20


def copy_of(folder: Path, spec: CollectionSpec, created: datetime, stop: Callable[[], bool]) -> IO[bytes] | None:
    """Copy a collection's database to a temporary file on the same disk, verify the copy, and make it a backup.

    The last line of the backup is not in the copy: `pieces` adds it.

    Args:
        folder: the collection's folder.
        spec: the spec of the collection.
        created: when the collection was created.
        stop: whether to stop; called every few milliseconds of the copying, and for each record that is verified.

    Returns:
        The copy, open for reading at its start; None if stopped. The name of the file is deleted already, so its space
        becomes free when the caller closes the file or the server ends.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if there is not enough disk space or no file descriptor is free, INTERNAL if
            the database or the data directory fails or a counter is damaged, DATA_LOSS if a record is damaged.
    """
    what = f"the backup of collection {spec.name!r}"
    with translated_os_errors("no backup was made"), translated(what), ExitStack() as stack:
        scratch = new_folder(folder.parent)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        path = scratch / "backup.db"
        with closing(connect(folder / DATABASE_NAME)) as connection:
            pages, size = (int(connection.execute(f"PRAGMA page_{part}").fetchone()[0]) for part in ("count", "size"))
            check_space(scratch, pages * size, what)
            connection.set_progress_handler(stop, STEPS_BETWEEN_LOOKS)
            try:
                connection.execute("VACUUM INTO ?", (str(path.absolute()),))
            except sqlite3.OperationalError:
                if stop():
                    return None
                raise
        with closing(sqlite3.connect(path, isolation_level=None)) as copy:
            if not _verify(copy, f"collection {spec.name!r}", stop):
                return None
            _complete(copy, spec, created)
        return path.open("rb")


def _verify(copy: sqlite3.Connection, subject: str, stop: Callable[[], bool]) -> bool:
    """Verify the checksums of all records, and the counters, so that damage is found before the backup is needed.

    Args:
        copy: the copied database; its `text_factory` is changed, so that damaged texts can be read.
        subject: name of the copied database in messages.
        stop: whether to stop; called for each record.

    Returns:
        False if stopped, else True.

    Raises:
        ServiceError: DATA_LOSS if a record is damaged, INTERNAL if a counter is damaged.
        sqlite3.Error: the database fails.
    """
    copy.text_factory = lenient_text
    newest_label = newest_revision = 0
    for row in map(Row._make, copy.execute(f"SELECT {ROW_COLUMNS} FROM records")):  # noqa: S608 - our own columns
        if stop():
            return False
        if not row.is_intact:
            raise damaged(row.id)
        newest_label, newest_revision = max(newest_label, row.label), max(newest_revision, row.revision)
    if found := counters.problem(copy, newest_label, newest_revision):
        raise counters.damaged(subject, found)
    return True


def _complete(copy: sqlite3.Connection, spec: CollectionSpec, created: datetime) -> None:
    """Turn the copy of a database into a backup: drop its metadata indexes, add the table `backup`, and mark the file.

    The mark is `APPLICATION_ID`.
    """
    copy.execute("PRAGMA journal_mode = OFF")
    # A restore refuses files with metadata indexes, since such an index contains an expression that SQLite would
    # compute, and the file may be malicious. The restored collection creates its indexes when it is opened.
    indexes = copy.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND name GLOB ?", (_INDEXES,))
    for (name,) in indexes.fetchall():
        copy.execute(f"DROP INDEX {name}")
    copy.execute(TABLE)
    copy.execute("INSERT INTO backup VALUES (?, ?, ?)", (FORMAT, spec.to_json(), created.timestamp()))
    copy.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def pieces(copy: IO[bytes] | None) -> Generator[Piece, None, None]:
    """Yield the bytes of a copied database in pieces of at most 1 MiB, then the last line as a piece of its own.

    Yields nothing if `copy` is None. Closes `copy` after its last byte, or if the caller ends the generator earlier.
    The last piece has the SHA-256 (hex) of all bytes of the backup, the last line included.
    """
    if copy is None:
        return
    digest = hashlib.sha256()
    with copy:
        total = os.fstat(copy.fileno()).st_size + LAST_LINE_SIZE
        while data := copy.read(_PIECE_BYTES):
            digest.update(data)
            yield Piece(data, total)
    line = last_line(digest.hexdigest())
    digest.update(line)
    yield Piece(line, total, digest.hexdigest())


def last_line(sha256: str) -> bytes:
    """Return the last line of a backup; `sha256` is the SHA-256, in hexadecimal, of all bytes before the line."""
    return _LAST_LINE % sha256.encode()


def check_space(folder: Path, size: int, what: str) -> None:
    """Check that the disk of a folder has at least `size` + `HEADROOM` free bytes.

    Args:
        folder: the folder to write to.
        size: number of bytes to write.
        what: name of the data in the error message, such as "the backup".

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the disk has fewer free bytes.
        OSError: the free space cannot be read.
    """
    free = shutil.disk_usage(folder).free
    if free < size + HEADROOM:
        raise ServiceError(
            Code.RESOURCE_EXHAUSTED,
            f"{what} needs {size + HEADROOM} free bytes in the data directory, of which {HEADROOM} stay free for "
            f"writes, and {free} are free; free some space and try again",
            reason="DISK_FULL",
            metadata={"needed_bytes": str(size + HEADROOM), "free_bytes": str(free)},
        )
