"""Read each file of a model only once, so that the bytes that are hashed are the bytes that are used."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from emberpc.bundle.errors import BundleError
from emberpc.bundle.hashing import too_short
from emberpc.bundle.paths import real_path

#: Number of bytes that are hashed between two calls of `stop`, so that a cancelled loading ends soon.
_PIECE_BYTES = 1 << 24


class Contents:
    """Keeps the contents of files in memory, each as it was when this object first read the file. Thread-safe.

    Args:
        stop: returns whether hashing must stop, since the loading of the model was cancelled. It is called before each
            16 MiB are hashed, and not while a file is read.
    """

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop
        self._reading, self._hashing = threading.Lock(), threading.Lock()
        self._data: dict[Path, bytes] = {}
        self._hashes: dict[Path, bytes] = {}

    def read(self, path: Path) -> bytes:
        """Return the content of a file as it was when this object first read it.

        Raises:
            BundleError: the file cannot be read.
        """
        try:
            key = real_path(path)
            with self._reading:
                if key not in self._data:
                    self._data[key] = key.read_bytes()
                return self._data[key]
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read; see that it is there and this user may read it") from error

    def holds(self, path: Path) -> bool:
        """Return whether this object has the content of a file, since it has read the file."""
        return real_path(path) in self._data

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 (hex) of the content that `read` returns for a file. The hash is kept for further calls.

        Raises:
            BundleError: the file cannot be read, or `stop` ended the hashing.
        """
        key, data = real_path(path), self.read(path)
        with self._hashing:
            if key not in self._hashes:
                self._hashes[key] = self._hash(path, memoryview(data))
            return self._hashes[key].hex()

    def sha256_of_part(self, path: Path, offset: int = 0, length: int | None = None) -> bytes:
        """Return the SHA-256, as 32 bytes, of a part of the content that `read` returns for a file.

        The hash is computed at each call.

        Args:
            path: the file.
            offset: start of the part, in bytes.
            length: length of the part in bytes; None: to the end of the file.

        Raises:
            BundleError: the file cannot be read, is shorter than `offset + length`, or `stop` ended the hashing.
        """
        data = memoryview(self.read(path))
        end = len(data) if length is None else offset + length
        if end > len(data):
            raise too_short(path)
        return self._hash(path, data[offset:end])

    def _hash(self, path: Path, data: memoryview) -> bytes:
        digest = hashlib.sha256()
        for start in range(0, len(data), _PIECE_BYTES):
            if self._stop():
                raise BundleError(f"{path} was not hashed to its end, since the loading of the model was cancelled")
            digest.update(data[start : start + _PIECE_BYTES])
        return digest.digest()
