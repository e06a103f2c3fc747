"""Write vectors to a .npy file, atomically."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from emberpc.cli.output_files import atomic_file
from emberpc.client.types import Matrix, Vector

#: Bytes of the header of the .npy file. The size is fixed in advance, since the rows are written before the header,
#: which states their number.
_HEADER_BYTES = 128


class RowFile:
    """A .npy file of float32 rows, which may be written in any order.

    It is a context manager. The file is created or replaced at the end of the block, if the block raised no exception
    and wrote at least one row. Each row up to the greatest must be written or left out; otherwise it has zeros.

    Args:
        path: the file.

    Attributes:
        rows: number of rows of the file so far: the greatest row that was written or left out, plus 1. At the end, rows
            that were left out have NaN.
        dimensions: dimensions of each row; 0 before the first row is written.

    Raises:
        CliError: at the first `write`, if the file cannot be created; at the end of the block, if it cannot be written.
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
        """Write a vector, float32 (dimensions,), as row `row`, from 0. All vectors must have the same dimensions.

        Raises:
            CliError: the file cannot be created.
            OSError: the row cannot be written; the end of the block converts an OSError to CliError.
        """
        if not self.dimensions:
            self.dimensions = len(vector)
            self._file = self._stack.enter_context(atomic_file(self._path))
            self._stack.push(self._complete)
        self._count(row)
        self._put(row, vector)

    def leave_out(self, row: int) -> None:
        """Note that row `row`, from 0, has no vector. If the file is written, the row has NaN."""
        self._missing.append(row)
        self._count(row)

    def _count(self, row: int) -> None:
        self.rows = max(self.rows, row + 1)

    def _put(self, row: int, vector: Vector) -> None:
        self._file.seek(_HEADER_BYTES + 4 * self.dimensions * row)
        self._file.write(vector.astype("<f4").tobytes())

    def _complete(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write NaN into the rows that were left out, and write the header, at the end of the block.

        Does nothing if the block raised an exception: `kind` is its type, or None.
        """
        if kind is not None:
            return
        for row in self._missing:
            self._put(row, np.full(self.dimensions, np.nan, dtype=np.float32))
        magic = np.lib.format.magic(1, 0)
        described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.dimensions}), }}"
        space = _HEADER_BYTES - len(magic) - 2
        self._file.seek(0)
        self._file.write(magic + struct.pack("<H", space) + described.encode().ljust(space - 1) + b"\n")


def save(matrix: Matrix, path: Path) -> None:
    """Write vectors, float32 (rows, dimensions), to a .npy file, or replace the file. Without rows, do nothing.

    Raises:
        CliError: the file cannot be written.
    """
    with RowFile(path) as file:
        for row, vector in enumerate(matrix):
            file.write(row, vector)
