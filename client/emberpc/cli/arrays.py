"""Vectors in a .npy file, whole or not at all."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from emberpc.cli.whole_files import whole_file
from emberpc.client.types import Matrix, Vector

#: Bytes of the header, fixed so that it can be written when the number of rows is known.
_HEADER_BYTES = 128


class RowFile:
    """A .npy file of float32 rows that are written in any order; as a context manager, it is whole or not there.

    Attributes:
        rows: how many there are, up to the last one written.
        dimensions: of each row; 0 before the first. Without a first one there is no file.

    Raises:
        CliError: at the end of the context, if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self.dimensions = 0
        self._path = path
        self._missing: list[int] = []
        self._stack = ExitStack()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def write(self, row: int, vector: Vector) -> None:
        """Write one row."""
        if not self.dimensions:
            self.dimensions = len(vector)
            self._file = self._stack.enter_context(whole_file(self._path))
            self._stack.push(self._complete)
        self._count(row)
        self._put(row, vector)

    def leave_out(self, row: int) -> None:
        """Let a row be NaN."""
        self._missing.append(row)
        self._count(row)

    def _count(self, row: int) -> None:
        self.rows = max(self.rows, row + 1)

    def _put(self, row: int, vector: Vector) -> None:
        self._file.seek(_HEADER_BYTES + 4 * self.dimensions * row)
        self._file.write(vector.astype("<f4").tobytes())

    def _complete(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what is still missing, unless something failed."""
        if kind is not None:
            return
        for row in self._missing:
            self._put(row, np.full(self.dimensions, np.nan, dtype=np.float32))
        magic = np.lib.format.magic(1, 0)
        described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.dimensions}), }}"
        room = _HEADER_BYTES - len(magic) - 2
        self._file.seek(0)
        self._file.write(magic + struct.pack("<H", room) + described.encode().ljust(room - 1) + b"\n")


def save(matrix: Matrix, path: Path) -> None:
    """Write vectors, float32 (rows, dimensions).

    Raises:
        CliError: the file cannot be written.
    """
    with RowFile(path) as file:
        for row, vector in enumerate(matrix):
            file.write(row, vector)
