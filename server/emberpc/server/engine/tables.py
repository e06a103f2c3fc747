"""The tables of an ONNX file that are only looked up in: every session of the file can use the same copy.

ONNX Runtime brings what is multiplied into an order of its own, for each session
anew, but takes a row of a table from where it lies. In a small model the table
of words is half of the weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tables = dict[str, npt.NDArray[np.generic]]

#: Smaller ones are not worth it.
_MIN_BYTES = 1 << 20
#: Types of tables, by ONNX's number for them (onnx.proto, TensorProto.DataType).
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16}
#: Numbers of fields (onnx.proto).
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OPERATOR = 1, 4
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_BYTES = 1, 2, 8, 9

_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class _Message:
    """A part of a file in protobuf's wire format."""

    data: mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | _Message]]:
        """Give each field's number and its value: a message, string or packed list as where it lies.

        Raises:
            ValueError: it is not in that format.
        """
        place = self.start
        while place < self.end:
            key, place = self._varint(place)
            number, kind = key >> 3, key & 7
            if kind == _VARINT:
                value, place = self._varint(place)
                yield number, value
            elif kind == _DELIMITED:
                length, place = self._varint(place)
                if place + length > self.end:
                    raise ValueError("a field ends after its message")
                yield number, _Message(self.data, place, place + length)
                place += length
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                place += 8 if kind == _EIGHT_BYTES else 4
            else:
                raise ValueError(f"a field has the kind {kind}")

    def messages(self, wanted: int) -> Iterator[_Message]:
        """Give the fields of one number that are messages, strings or packed lists."""
        return (value for number, value in self.fields() if number == wanted and isinstance(value, _Message))

    def varints(self) -> Iterator[int]:
        """Give the numbers of a packed list."""
        place = self.start
        while place < self.end:
            value, place = self._varint(place)
            yield value

    def bytes(self) -> bytes:
        """Return what it consists of."""
        return self.data[self.start : self.end]

    def _varint(self, place: int) -> tuple[int, int]:
        """Return a number and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= self.end:
                raise ValueError("a number ends after its message")
            byte = self.data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, place
        raise ValueError("a number has more than ten bytes")


def read_tables(path: Path) -> Tables:
    """Return copies of the large tables in an ONNX file that nothing but `Gather` uses, by name.

    Weights in files beside it are left out. What is wrong with the file is for
    the session to say: of one that cannot be read there are no tables.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _tables_of(_Message(data, 0, len(data)))
    except (OSError, ValueError):
        return {}


def _tables_of(model: _Message) -> Tables:
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


def _table(tensor: _Message) -> tuple[bytes, npt.NDArray[np.generic] | None]:
    """Return a tensor's name and a copy of what it holds; None if that is of no known type or elsewhere."""
    shape: list[int] = []
    name, kind, content = b"", 0, None
    for number, value in tensor.fields():
        if number == _TENSOR_SHAPE:
            shape += [value] if isinstance(value, int) else value.varints()
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME and isinstance(value, _Message):
            name = value.bytes()
        elif number == _TENSOR_BYTES and isinstance(value, _Message):
            content = value
    if kind not in _TYPES or content is None:
        return name, None
    # The file may be written anew in place: what is used must not lie in it.
    return name, np.frombuffer(content.bytes(), dtype=_TYPES[kind]).reshape(shape)
