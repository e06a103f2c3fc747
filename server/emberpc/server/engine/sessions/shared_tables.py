"""Read the large lookup tables of an ONNX file, so that several sessions of the file can share them.

ONNX Runtime copies other matrices into its own layout, once for each session. It reads the rows of a lookup table in
place, so one copy is enough. In a small model, the table of word embeddings is about half of the weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.contents import Contents
from emberpc.bundle.errors import BundleError
from emberpc.bundle.onnx_file import storage_of
from emberpc.bundle.protobuf import Message

Tables = dict[str, npt.NDArray[np.generic]]

#: Minimum number of bytes of a table that is shared. To share smaller tables would save too little memory.
_MIN_BYTES = 1 << 20
#: NumPy type of each supported tensor type, by its number in onnx.proto (TensorProto.DataType).
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16}
#: Numbers of the fields of messages in onnx.proto.
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OPERATOR = 1, 4
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_BYTES = 1, 2, 8, 9


def read_tables(path: Path, contents: Contents) -> Tables:
    """Return copies of the large lookup tables of an ONNX file, by name, in their own shapes and types.

    A lookup table is a tensor of a type in `_TYPES` and of at least 1 MiB that only `Gather` nodes of the main graph
    use, as their first input. If a file cannot be read or parsed, the result is empty: loading a session reports the
    error later.

    Args:
        path: the ONNX file.
        contents: reads the ONNX file and its external weight files.
    """
    try:
        data = contents.read(path)
        return _tables_of(Message(data, 0, len(data)), path.parent, contents)
    except (BundleError, ValueError, OverflowError):
        return {}


def _tables_of(model: Message, folder: Path, contents: Contents) -> Tables:
    tables: Tables = {}
    for graph in model.messages(_MODEL_GRAPH):
        looked_up, used_otherwise = set[bytes](), set[bytes]()
        for node in graph.messages(_GRAPH_NODE):
            inputs = [each.bytes() for each in node.messages(_NODE_INPUT)]
            first = 1 if [each.bytes() for each in node.messages(_NODE_OPERATOR)] == [b"Gather"] else 0
            looked_up.update(inputs[:first])
            used_otherwise.update(inputs[first:])
        for tensor in graph.messages(_GRAPH_INITIALIZER):
            name, table = _table(tensor, folder, contents)
            if table is not None and name in looked_up - used_otherwise:
                tables[name.decode()] = table.copy()
    return tables


def _table(tensor: Message, folder: Path, contents: Contents) -> tuple[bytes, npt.NDArray[np.generic] | None]:
    """Return the name of a tensor and a read-only view of its values.

    The view is None if the tensor has less than 1 MiB or an unsupported type, if its values have another length than
    its shape says, or if the values are neither in the field `raw_data` nor in an external file.

    Args:
        tensor: the tensor, a message of the ONNX file.
        folder: folder of the ONNX file.
        contents: reads external weight files.

    Raises:
        BundleError: an external file cannot be read.
        ValueError: the shape or the place of the values is invalid, or the values end after the external file.
    """
    shape: list[int] = []
    name, kind, content = b"", 0, None
    for number, value in tensor.fields():
        if number == _TENSOR_SHAPE:
            shape += [value] if isinstance(value, int) else value.varints()
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME and isinstance(value, Message):
            name = value.bytes()
        elif number == _TENSOR_BYTES and isinstance(value, Message):
            content = value
    if kind not in _TYPES or (length := math.prod(shape) * np.dtype(_TYPES[kind]).itemsize) < _MIN_BYTES:
        return name, None
    entries, external = storage_of(tensor)
    if external:
        data, start = contents.read(folder / entries.get("location", "")), int(entries.get("offset") or 0)
        stated = int(entries.get("length") or length)
    elif content is not None:
        data, start = bytes(content.data), content.start
        stated = content.end - content.start
    else:
        return name, None
    if stated != length:
        return name, None
    return name, np.frombuffer(data, _TYPES[kind], math.prod(shape), start).reshape(shape)
