"""Files that must outlast a power cut."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk.

    Raises:
        OSError: they cannot be put there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
