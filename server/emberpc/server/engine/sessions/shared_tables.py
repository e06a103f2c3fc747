"""The tables of an ONNX file that are only looked up in: every session of the file can use the same copy.

ONNX Runtime brings what is multiplied into an order of its own, for each session
anew, but takes a row of a table from where it lies. In a small model the table
of words is half of the weights.
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

#: Smaller ones are not worth it.
_MIN_BYTES = 1 << 20
#: Types of tables, by ONNX's number for them (onnx.proto, TensorProto.DataType).
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16}
#: Numbers of fields (onnx.proto).
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OPERATOR = 1, 4
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_BYTES = 1, 2, 8, 9


def read_tables(path: Path, contents: Contents) -> Tables:
    """Return copies of the large tables of an ONNX file that nothing but `Gather` uses, by name.

    What is wrong with the file is for the session to say: of one that cannot be read there are no tables.

    Args:
        path: the file.
        contents: reads it, and the files beside it that hold weights.
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
    """Return a tensor's name and what it holds, read-only; None if that is small or of no known type."""
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
