"""Sequence of a collection's last acknowledged write, kept in the file `acknowledged` beside the database.

A crash or damage to the write-ahead log can remove the last writes of a database. SQLite cannot distinguish an
acknowledged write from a write that was cut off before it was acknowledged. So the store compares the file with the
database when it opens the database, and logs how many acknowledged writes are lost.

The file is written after the commit of a write, before the write is acknowledged, without waiting for the disk. So the
file never names a write that was not committed. If the server is killed, the file names the last acknowledged write or
a later one. After a power cut, or if the file could not be written, the file may name an earlier write.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_NAME = "acknowledged"


def write(folder: Path, identity: str, sequence: int) -> None:
    """Put the sequence of a committed write into the file `acknowledged`, before the write is acknowledged.

    If the file cannot be written, there is no error: then only a loss of this write may go unnoticed.

    Args:
        folder: the folder of the collection.
        identity: the identity of the collection's database.
        sequence: the sequence of the write.
    """
    try:
        file = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # All lines have the same length, so one call replaces the whole content of the file.
            os.pwrite(file, _line(identity, sequence), 0)
        finally:
            os.close(file)
    except OSError:
        pass


def read(folder: Path, identity: str) -> int:
    """Return the sequence of the last acknowledged write of a database, as the file `acknowledged` has it.

    0 if the file is missing, unreadable, damaged, or written for a database of another identity.

    Args:
        folder: the folder of the collection.
        identity: the identity of the collection's database.
    """
    try:
        data = (folder / _NAME).read_bytes()
        sequence = int(data.split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return sequence if data == _line(identity, sequence) else 0


def _line(identity: str, sequence: int) -> bytes:
    facts = f"{identity} {sequence:020}".encode()
    return b"%b %08x\n" % (facts, zlib.crc32(facts))
