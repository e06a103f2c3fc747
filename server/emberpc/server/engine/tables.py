"""The tables of an ONNX file that are only looked up in: every session of the file can use the same copy.

ONNX Runtime brings what is multiplied into an order of its own, for each session
anew, but takes a row of a table from where it lies. In a small model the table
of words is half of the weights.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

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


def read_tables(path: Path) -> Tables:
    """Return copies of the large tables in an ONNX file that nothing but `Gather` uses, by name.

    Weights in files beside it are left out. What is wrong with the file is for
    the session to say: of one that cannot be read there are no tables.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _tables_of(Message(data, 0, len(data)))
    except (OSError, ValueError):
        return {}


def _tables_of(model: Message) -> Tables:
    tables: Tables = {}
    for graph in model.messages(_MODEL_GRAPH):
        large = [tensor for tensor in graph.messages(_GRAPH_INITIALIZER) if tensor.end - tensor.start >= _MIN_BYTES]
        looked_up, used_otherwise = set[bytes](), set[bytes]()
        for node in graph.messages(_GRAPH_NODE):
            inputs = [each.bytes() for each in node.messages(_NODE_INPUT)]
            first = 1 if [each.bytes() for each in node.messages(_NODE_OPERATOR)] == [b"Gather"] else 0
            looked_up.update(inputs[:first])
            used_otherwise.update(inputs[first:])
        for tensor in large:
            name, table = _table(tensor)
            if table is not None and name in looked_up - used_otherwise:
                tables[name.decode()] = table
    return tables


def _table(tensor: Message) -> tuple[bytes, npt.NDArray[np.generic] | None]:
    """Return a tensor's name and a copy of what it holds; None if that is of no known type or elsewhere."""
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
    if kind not in _TYPES or content is None:
        return name, None
    # The file may be written anew in place: what is used must not lie in it.
    return name, np.frombuffer(content.bytes(), dtype=_TYPES[kind]).reshape(shape)
