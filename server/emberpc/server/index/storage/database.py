"""SQLite as the index uses it: synchronised at every commit, its errors in the server's terms."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from emberpc.server import cancellation, descriptors
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: SQLite's message; its code is in the exception only from Python 3.11 on.
_DISK_FULL = "database or disk is full"
_INTERRUPTED = "interrupted"
#: Steps of SQLite between two looks whether a statement is still wanted: some milliseconds.
STEPS_BETWEEN_LOOKS = 20_000
#: Seconds to wait for another connection's lock; there is none but while a connection opens or a log is merged.
_TIMEOUT = 30


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """Open a database; its connections may go from thread to thread.

    A statement ends early if the call that its thread runs is cancelled. A COMMIT has too few steps to be ended.

    Args:
        path: its file.
        create: make it if it is not there; else that is an error, lest lost data look like none.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
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
        # In WAL mode anything less than FULL may lose what was acknowledged.
        connection.execute("PRAGMA synchronous = FULL")
        connection.set_progress_handler(cancellation.cancelled, STEPS_BETWEEN_LOOKS)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write everything of the block, or nothing; on disk when it ends."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite rolls back by itself after some errors.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def empty_log(connection: sqlite3.Connection) -> None:
    """Move the write-ahead log into the database and give its space back, unless another connection reads it."""
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError:
        # What was committed stays in the log.
        log.warning("the write-ahead log cannot be emptied now", exc_info=True)
    finally:
        connection.execute(f"PRAGMA busy_timeout = {1000 * _TIMEOUT}")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn SQLite's errors into the server's.

    Args:
        what: whose database it is, for the message.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the disk is full or no file descriptor is free, DEADLINE_EXCEEDED if the
            call was cancelled, else INTERNAL; the log says more.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if str(error) == _INTERRUPTED and cancellation.cancelled():
            raise cancellation.error() from error
        if str(error) == _DISK_FULL:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"the disk is full; the request wrote nothing to {what}, make room and try again",
                reason="DISK_FULL",
            ) from error
        # SQLite says "unable to open database file" or "disk I/O error" then.
        if descriptors.none_free():
            log.warning("%s: no file descriptor is free; the limit is %d", what, descriptors.limit())
            raise descriptors.shortage() from error
        log.exception("%s: the database failed", what)
        raise ServiceError(Code.INTERNAL, f"the database of {what} failed", reason="DATABASE_FAILED") from error
    # Python decodes names and messages of SQLite, which hold damaged bytes of the schema.
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        log.exception("%s: the database is damaged", what)
        raise ServiceError(
            Code.INTERNAL, f"the database of {what} is damaged; restore a backup", reason="DATABASE_DAMAGED"
        ) from error
