"""Hash files in chunks, so that a large file is never in memory as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from emberpc.bundle.errors import BundleError

#: Number of bytes that are read and hashed at a time. hashlib releases the interpreter's lock while it hashes a chunk,
#: so other threads can run.
_CHUNK_BYTES = 1 << 18


def sha256_of_part(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """Return the SHA-256, as 32 bytes, of a part of a file.

    Args:
        path: the file.
        offset: start of the part, in bytes.
        length: length of the part in bytes; None: to the end of the file; empty if `offset` is beyond the end.

    Raises:
        BundleError: the file cannot be read, or fewer than `length` bytes follow `offset`.
    """
    digest = hashlib.sha256()
    rest = length
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            buffer = memoryview(bytearray(_CHUNK_BYTES if rest is None else min(_CHUNK_BYTES, rest)))
            while rest is None or rest > 0:
                count = file.readinto(buffer if rest is None else buffer[:rest])
                if not count:
                    break
                digest.update(buffer[:count])
                rest = None if rest is None else rest - count
    except OSError as error:
        raise BundleError(f"{path} cannot be read; give this user permission to read it") from error
    if rest:
        raise too_short(path)
    return digest.digest()


def too_short(path: Path) -> BundleError:
    """Return the error for a file that ends before the end of a part that an ONNX file states for it."""
    return BundleError(f"{path} is shorter than the ONNX file says; get the model again or export it again")
