"""Detection of commits in a write-ahead log that SQLite does not apply after a crash.

SQLite applies the transactions in the log that end before the first frame with a wrong checksum. SQLite reports nothing
about later frames, since they may be of an older generation, or cut off by the crash. Later frames of the present
generation that end a transaction are lost writes; only the last one may be a write that was not acknowledged. The
content of frames is not read here, and writes are not slower, since logs are read only when a database is opened.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

# Layouts of the log's header and of a frame's header: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
#: First 32-bit number of a log, with the last bit 0. That bit is 1 if the log's checksums read numbers as big-endian.
_MAGIC = 0x377F0682
_MASK = 2**32 - 1


class LogContents(NamedTuple):
    """Contents of a write-ahead log. SQLite begins a new generation when it overwrites the log from its start.

    Attributes:
        readable: whether the log's header is undamaged. If not, `commits` is empty and `frames` is 0.
        commits: numbers, from 1, of the frames of the present generation that end a transaction, ascending.
        frames: number of the last frame of the present generation; 0 if there is none.
    """

    readable: bool
    commits: list[int]
    frames: int


def inspect(database: Path) -> LogContents | None:
    """Read the headers in the write-ahead log of a database, before any connection to the database is opened.

    A connection may overwrite or remove the log.

    Returns:
        The contents of the log. None if there is no log, it cannot be opened, its header is incomplete, or its header
        is damaged and nothing follows the header.

    Raises:
        OSError: the log cannot be read.
    """
    path = database.with_name(f"{database.name}-wal")
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        return None
    with file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, _, page_size, _, *salts = _HEADER.unpack(header)[:6]
        size = path.stat().st_size
        if magic & ~1 != _MAGIC or _checksum(header) != _HEADER.unpack(header)[6:]:
            return LogContents(False, [], 0) if size > _HEADER.size else None
        commits, last = [], 0
        for number in range(1, (size - _HEADER.size) // (_FRAME.size + page_size) + 1):
            file.seek(_HEADER.size + (number - 1) * (_FRAME.size + page_size))
            _, pages_after_commit, *own_salts = _FRAME.unpack(file.read(_FRAME.size))[:4]
            if own_salts == salts:
                last = number
                if pages_after_commit:
                    commits.append(number)
    return LogContents(True, commits, last)


def report_lost_commits(connection: sqlite3.Connection, found: LogContents | None, subject: str) -> None:
    """Log how many commits of a write-ahead log SQLite did not apply; merge the applied ones into the database.

    If the header of the log is damaged, SQLite applied no commits of it, and the number of lost commits is unknown. If
    the only lost commit is the last frame of the log, only a warning is logged: a crash may have cut that write off
    before it was acknowledged. If the log cannot be merged, as on a full disk, nothing is logged, and the next opening
    checks the log.

    Args:
        connection: the first connection that was opened after `inspect`.
        found: the result of `inspect`; None: do nothing.
        subject: name of the database in messages.

    Raises:
        sqlite3.DatabaseError: the database is damaged.
    """
    if found is None:
        return
    remedy = "compare the records with their source, or restore a backup"
    if not found.readable:
        log.error("%s: the header of its write-ahead log is damaged; the last writes are lost: %s", subject, remedy)
        return
    try:
        _, applied, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.OperationalError:  # the disk is full; the log stays, and the next start checks it
        return
    lost = [number for number in found.commits if number > applied]
    if not lost:
        return
    if lost == [found.frames]:
        log.warning(
            "%s: the last write in its write-ahead log is not whole: a crash cut it off before it was acknowledged, or "
            "the log is damaged on disk",
            subject,
        )
        return
    log.error(
        "%s: its write-ahead log is damaged on disk behind frame %d; %d acknowledged writes are lost: %s",
        subject,
        applied,
        len(lost),
        remedy,
    )


def _checksum(header: bytes) -> tuple[int, int]:
    """Compute the checksum of a log's header, two 32-bit numbers, from its first 24 bytes."""
    order = ">" if header[3] & 1 else "<"
    words = struct.unpack(f"{order}6I", header[:24])
    first = second = 0
    for i in range(0, 6, 2):
        first = (first + words[i] + second) & _MASK
        second = (second + words[i + 1] + first) & _MASK
    return first, second
