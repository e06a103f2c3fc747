"""Does SQLite apply all of a write-ahead log that a crash left?

SQLite applies the log up to the first frame whose checksum is wrong. It says nothing of later frames, since they may be
stale, or cut off by the crash. Later frames of the same generation that end a transaction are lost writes. Only frame
headers are read here, and only of a log that is found when a database is opened, so no write is slower.
"""

from __future__ import annotations

import logging
import sqlite3
import struct
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

# https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_MAGIC = 0x377F0682
_MASK = 2**32 - 1


class Found(NamedTuple):
    """What a log holds.

    Attributes:
        readable: whether its header is as it was written.
        commits: numbers of the frames, from 1, that end a transaction of this generation of the log.
        frames: number of the last frame of this generation.
    """

    readable: bool
    commits: list[int]
    frames: int


def look(database: Path) -> Found | None:
    """Return what the log of a database holds; to be called before any connection is opened. None: there is no log."""
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
            return Found(False, [], 0) if size > _HEADER.size else None
        commits, last = [], 0
        for number in range(1, (size - _HEADER.size) // (_FRAME.size + page_size) + 1):
            file.seek(_HEADER.size + (number - 1) * (_FRAME.size + page_size))
            _, pages_after_commit, *own_salts = _FRAME.unpack(file.read(_FRAME.size))[:4]
            if own_salts == salts:
                last = number
                if pages_after_commit:
                    commits.append(number)
    return Found(True, commits, last)


def report(connection: sqlite3.Connection, found: Found | None, what: str) -> None:
    """Log which commits of a log were not applied.

    Args:
        connection: the first one that was opened after `look`.
        found: what `look` returned.
        what: whose database it is.
    """
    if found is None:
        return
    remedy = "compare the records with their source, or restore a backup"
    if not found.readable:
        log.error("%s: the header of its write-ahead log is damaged; the last writes are lost: %s", what, remedy)
        return
    try:
        _, applied, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.OperationalError:  # the disk is full, so the log stays for the next start
        return
    lost = [number for number in found.commits if number > applied]
    if not lost:
        return
    if lost == [found.frames]:
        log.warning(
            "%s: the last write in its write-ahead log is not whole: a crash cut it off before it was acknowledged, or "
            "the log is damaged on disk",
            what,
        )
        return
    log.error(
        "%s: its write-ahead log is damaged on disk behind frame %d; %d acknowledged writes are lost: %s",
        what,
        applied,
        len(lost),
        remedy,
    )


def _checksum(header: bytes) -> tuple[int, int]:
    """Return the checksum that the header of a log must have."""
    order = ">" if header[3] & 1 else "<"
    words = struct.unpack(f"{order}6I", header[:24])
    first = second = 0
    for i in range(0, 6, 2):
        first = (first + words[i] + second) & _MASK
        second = (second + words[i + 1] + first) & _MASK
    return first, second
