"""Convert blocks of vectors between numpy arrays and the message `emberpc.v1.Vectors`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.v1 import types_pb2 as pb

Matrix = npt.NDArray[np.float32]

_FLOATS: dict[pb.DataType.ValueType, npt.DTypeLike] = {
    pb.DATA_TYPE_UNSPECIFIED: "<f4",
    pb.DATA_TYPE_FLOAT32: "<f4",
    pb.DATA_TYPE_FLOAT16: "<f2",
}


class VectorFormatError(ValueError):
    """The fields of a `Vectors` message contradict each other or are negative, or a data type is unknown.

    Args:
        field: name of the wrong field: `data`, `scales`, `dtype`, or `rows`, also for negative dimensions. The error
            has it as an attribute.
        message: the problem.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def encode(matrix: Matrix, dtype: pb.DataType.ValueType = pb.DATA_TYPE_FLOAT32) -> pb.Vectors:
    """Encode vectors as one block.

    Args:
        matrix: float32, shape (rows, dimensions).
        dtype: element type in the message; unspecified means FLOAT32. FLOAT16 has
            infinity for numbers of magnitude 65,520 or more. INT8 has one scale per
            row: the row's largest magnitude divided by 127 (1 for a row of zeros); all
            numbers must be finite, which is not checked. BINARY keeps only the signs;
            zero counts as negative.

    Returns:
        The message, which `decode` decodes to an array of the same shape.

    Raises:
        VectorFormatError: `dtype` is not one of `DataType`.
    """
    rows, dimensions = matrix.shape
    block = pb.Vectors(rows=rows, dimensions=dimensions, dtype=dtype or pb.DATA_TYPE_FLOAT32)
    if dtype in _FLOATS:
        block.data = matrix.astype(_FLOATS[dtype], copy=False).tobytes()
    elif dtype == pb.DATA_TYPE_INT8:
        scales = np.abs(matrix).max(axis=1, initial=0.0) / 127
        scales[scales == 0] = 1
        block.data = np.rint(matrix / scales[:, None]).astype(np.int8).tobytes()
        block.scales.extend(scales.tolist())
    elif dtype == pb.DATA_TYPE_BINARY:
        block.data = np.packbits(matrix > 0, axis=1).tobytes()
    else:
        raise VectorFormatError("dtype", f"unknown data type {dtype}")
    return block


def decode(block: pb.Vectors) -> Matrix:
    """Decode a block of vectors.

    Returns:
        float32, shape (rows, dimensions). With FLOAT32 or no data type the array is not
        writable, since it is a view of a copy of the message's bytes. BINARY gives -1 and 1.

    Raises:
        VectorFormatError: the numbers of bytes or scales do not agree with rows and
            dimensions, rows or dimensions are negative, or the data type is unknown.
    """
    rows, dimensions = block.rows, block.dimensions
    if rows < 0 or dimensions < 0:
        raise VectorFormatError("rows", f"{rows} rows of {dimensions} dimensions: neither may be negative")
    if block.dtype in _FLOATS:
        values = _array(block, _FLOATS[block.dtype], dimensions)
        return values.astype(np.float32, copy=False)
    if block.dtype == pb.DATA_TYPE_INT8:
        if len(block.scales) != rows:
            raise VectorFormatError("scales", f"{len(block.scales)} scales for {rows} rows; give one for each")
        scales = np.array(block.scales, dtype=np.float32)[:, None]
        return _array(block, np.int8, dimensions).astype(np.float32) * scales
    if block.dtype == pb.DATA_TYPE_BINARY:
        bits = np.unpackbits(_array(block, np.uint8, -(-dimensions // 8)), axis=1, count=dimensions)
        return bits.astype(np.float32) * 2 - 1
    raise VectorFormatError("dtype", f"unknown data type {block.dtype}")


def _array(block: pb.Vectors, dtype: npt.DTypeLike, width: int) -> npt.NDArray[Any]:
    expected = block.rows * width * np.dtype(dtype).itemsize
    if len(block.data) != expected:
        raise VectorFormatError(
            "data",
            f"{len(block.data)} bytes for {block.rows} rows of {block.dimensions} dimensions as "
            f"{pb.DataType.Name(block.dtype)}; it must be {expected}",
        )
    return np.frombuffer(block.data, dtype=dtype).reshape(block.rows, width)
