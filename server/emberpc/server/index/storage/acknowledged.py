"""Sequence of the last acknowledged write, kept in a file beside the database.

A crash or damage to the write-ahead log can remove the end of a database. SQLite cannot tell an acknowledged write from
a write that was cut off before it was acknowledged. The file is written after each commit without waiting for the disk.
After the server was killed the file is exact. After a power cut it may name an earlier write, never a later one.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_NAME = "acknowledged"


def write(folder: Path, identity: str, sequence: int) -> None:
    """Write the sequence of a write that is about to be acknowledged.

    A file that cannot be written raises no error: only the check for lost writes is missing then.

    Args:
        folder: the folder of the collection.
        identity: the identity of its database.
        sequence: the sequence of the write.
    """
    try:
        file = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # The length never changes, so one write replaces the whole file.
            os.pwrite(file, _line(identity, sequence), 0)
        finally:
            os.close(file)
    except OSError:
        pass


def read(folder: Path, identity: str) -> int:
    """Return the sequence last written for a database; 0 if none was written or the file cannot be read."""
    try:
        data = (folder / _NAME).read_bytes()
        sequence = int(data.split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return sequence if data == _line(identity, sequence) else 0


def _line(identity: str, sequence: int) -> bytes:
    facts = f"{identity} {sequence:020}".encode()
    return b"%b %08x\n" % (facts, zlib.crc32(facts))
