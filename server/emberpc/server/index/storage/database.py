"""SQLite connections of the index: commits wait for the disk, and `translated` turns errors into `ServiceError`."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from emberpc.server import cancellation, descriptors
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage.files import disk_is_full

log = logging.getLogger(__name__)

#: SQLite's messages for a full disk and for an interrupted statement. Errors are recognized by messages, since
#: exceptions have SQLite's error code only from Python 3.11 on.
_DISK_FULL = "database or disk is full"
_INTERRUPTED = "interrupted"
#: SQLite's messages, among other causes, if it cannot create or extend a database's write-ahead log or the log's index:
#: the disk is full, no file descriptor is free, or the disk is broken.
_FILE_FAILURES = ("disk I/O error", "unable to open database file")
#: Folder of the database that was opened last, for checking whether the disk is full. All databases of a server are in
#: its data directory, so on one disk.
_last_folder = Path()
#: File descriptors that SQLite needs to open a database: for the database, its write-ahead log, the log's index, and
#: the folder.
DESCRIPTORS = 4
#: Instructions of SQLite's virtual machine between two checks for cancellation: usually some milliseconds.
STEPS_BETWEEN_LOOKS = 20_000
#: Seconds that a statement waits for another connection's lock, before it fails. Only one connection to a database
#: writes, so statements wait only while a connection is opened, or the write-ahead log is merged into the database.
_TIMEOUT = 30
#: Seconds that `empty_log` waits for other connections if the caller needs the space of the log.
_LOG_WAIT = 2


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """Open a database in WAL mode, without automatic transactions. Threads may use the connection one after the other.

    A statement fails (`_INTERRUPTED`) if the call that its thread runs is cancelled. A COMMIT has too few instructions
    to be interrupted.

    Args:
        path: the database file.
        create: whether to create a missing file; if not, a missing file is an error, so that lost data is noticed.

    Raises:
        sqlite3.Error: the database cannot be opened.
    """
    global _last_folder  # noqa: PLW0603 - an error of SQLite does not name its database
    _last_folder = path.parent
    mode = "rwc" if create else "rw"
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_TIMEOUT,
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode, a power cut may remove acknowledged writes at any level below FULL.
        connection.execute("PRAGMA synchronous = FULL")
        connection.set_progress_handler(cancellation.cancelled, STEPS_BETWEEN_LOOKS)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block in a transaction. At the end all writes are committed and on disk; an error rolls all of them back.

    Blocks must not be nested.

    Raises:
        sqlite3.Error: the transaction cannot begin or commit.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After some errors SQLite has rolled back by itself; a ROLLBACK would then fail.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _disk_is_full() -> bool:
    try:
        return disk_is_full(_last_folder)
    except OSError:  # the folder was removed
        return False


def empty_log(connection: sqlite3.Connection, *, wait: bool = False) -> None:
    """Merge the write-ahead log into the database and empty the log; not to be called in a transaction.

    If another connection still uses the log after the wait, or the merge fails, the log is not emptied.

    Args:
        connection: a connection that may write.
        wait: whether to wait up to two seconds for other connections that use the log.

    Raises:
        sqlite3.DatabaseError: the database is damaged.
    """
    connection.execute(f"PRAGMA busy_timeout = {1000 * _LOG_WAIT if wait else 0}")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError:
        # Nothing is lost: committed data stays in the write-ahead log.
        log.warning("the write-ahead log cannot be emptied now", exc_info=True)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {1000 * _TIMEOUT}")


@contextmanager
def translated(subject: str) -> Iterator[None]:
    """Context manager: turn a `sqlite3.DatabaseError` or UnicodeDecodeError of the block into a `ServiceError`.

    Args:
        subject: name of the database in messages, such as "collection 'c'".

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the disk is full or no file descriptor is free, DEADLINE_EXCEEDED if the
            call of this thread was cancelled, else INTERNAL; the server's log then has the details.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if str(error) == _INTERRUPTED and cancellation.cancelled():
            raise cancellation.error() from error
        if str(error) == _DISK_FULL or (str(error) in _FILE_FAILURES and _disk_is_full()):
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"the disk is full; the request wrote nothing to {subject}, free some space and try again",
                reason="DISK_FULL",
            ) from error
        # SQLite reports a lack of file descriptors as "unable to open database file" or "disk I/O error".
        if descriptors.none_free(DESCRIPTORS):
            log.warning("%s: no file descriptor is free; the limit is %d", subject, descriptors.limit())
            raise descriptors.shortage() from error
        log.exception("%s: the database failed", subject)
        raise ServiceError(Code.INTERNAL, f"the database of {subject} failed", reason="DATABASE_FAILED") from error
    # UnicodeDecodeError: Python decodes the names and messages that SQLite returns. If the schema on disk is damaged,
    # they may contain bytes of the schema that are not UTF-8.
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        log.exception("%s: the database is damaged", subject)
        raise ServiceError(
            Code.INTERNAL, f"the database of {subject} is damaged; restore a backup", reason="DATABASE_DAMAGED"
        ) from error
