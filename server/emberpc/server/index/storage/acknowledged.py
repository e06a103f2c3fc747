"""Sequence of a collection's last acknowledged write, kept in the file `acknowledged` beside the database.

A crash or damage to the write-ahead log can remove the last writes of a database. SQLite cannot distinguish an
acknowledged write from a write that was cut off before it was acknowledged. The file is written after each commit
without waiting for the disk. If the server is killed, the file is exact. After a power cut, the file may name an
earlier write, but never a later write.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_NAME = "acknowledged"


def write(folder: Path, identity: str, sequence: int) -> None:
    """Write the sequence of a write that is about to be acknowledged to the file `acknowledged`.

    A file that cannot be written raises no error: only the check for lost writes is missing then.

    Args:
        folder: the folder of the collection.
        identity: the identity of the collection's database.
        sequence: the sequence of the write.
    """
    try:
        file = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # The line always has the same length, so one write replaces the whole file.
            os.pwrite(file, _line(identity, sequence), 0)
        finally:
            os.close(file)
    except OSError:
        pass


def read(folder: Path, identity: str) -> int:
    """Return the sequence of the last acknowledged write of a database.

    0 if the file `acknowledged` is missing, unreadable, damaged, or written for a database of another identity.

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
