"""Vectors in a .npy file, whole or not at all."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from emberpc.cli.errors import CliError
from emberpc.client.types import Matrix, Vector

#: Bytes of the header, fixed so that it can be written when the number of rows is known.
_HEADER_BYTES = 128


class RowFile:
    """A .npy file of float32 rows that are written in any order; as a context manager, gone if anything fails.

    Attributes:
        rows: how many there are, up to the last one written.
        dimensions: of each row; 0 before the first.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self.dimensions = 0
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._missing: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> RowFile:
        try:
            self._file = self._stack.enter_context(self._part.open("wb"))
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._stack:
                if kind is None and self.dimensions:
                    self._complete()
            if kind is None and self.dimensions:
                self._part.replace(self._path)
        except OSError as failed:
            raise self._failure(failed) from failed
        finally:
            self._part.unlink(missing_ok=True)

    def write(self, row: int, vector: Vector) -> None:
        """Write one row.

        Raises:
            CliError: the file cannot be written.
        """
        self.dimensions = self.dimensions or len(vector)
        self._count(row)
        try:
            self._put(row, vector)
        except OSError as error:
            raise self._failure(error) from error

    def leave_out(self, row: int) -> None:
        """Let a row be NaN."""
        self._missing.append(row)
        self._count(row)

    def _count(self, row: int) -> None:
        self.rows = max(self.rows, row + 1)

    def _put(self, row: int, vector: Vector) -> None:
        self._file.seek(_HEADER_BYTES + 4 * self.dimensions * row)
        self._file.write(vector.astype("<f4").tobytes())

    def _complete(self) -> None:
        for row in self._missing:
            self._put(row, np.full(self.dimensions, np.nan, dtype=np.float32))
        magic = np.lib.format.magic(1, 0)
        described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.dimensions}), }}"
        room = _HEADER_BYTES - len(magic) - 2
        self._file.seek(0)
        self._file.write(magic + struct.pack("<H", room) + described.encode().ljust(room - 1) + b"\n")

    def _failure(self, error: OSError) -> CliError:
        return CliError(f"{self._path} cannot be written: {error.strerror}")


def save(matrix: Matrix, path: Path) -> None:
    """Write vectors, float32 (rows, dimensions).

    Raises:
        CliError: the file cannot be written.
    """
    with RowFile(path) as file:
        for row, vector in enumerate(matrix):
            file.write(row, vector)
