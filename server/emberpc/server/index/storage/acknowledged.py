"""The number of the last write that was acknowledged, beside the database.

A crash, or damage to the write-ahead log, can take away the end of a database, and SQLite cannot tell an acknowledged
write from one that was cut off before. The file is written after each commit without waiting for the disk. So after the
server was killed it is exact, and after a power cut it may name an earlier write, never a later one.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

_NAME = "acknowledged"


def note(folder: Path, identity: str, sequence: int) -> None:
    """Note that a write is about to be acknowledged; a file that cannot be written costs only the check.

    Args:
        folder: the folder of the collection.
        identity: the identity of its database.
        sequence: the number of the write.
    """
    try:
        file = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # The length never changes, so that it is overwritten in one step.
            os.pwrite(file, _line(identity, sequence), 0)
        finally:
            os.close(file)
    except OSError:
        pass


def noted(folder: Path, identity: str) -> int:
    """Return the number of the last write that was noted for a database; 0 if nothing was, or it cannot be read."""
    try:
        data = (folder / _NAME).read_bytes()
        sequence = int(data.split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return sequence if data == _line(identity, sequence) else 0


def _line(identity: str, sequence: int) -> bytes:
    facts = f"{identity} {sequence:020}".encode()
    return b"%b %08x\n" % (facts, zlib.crc32(facts))
