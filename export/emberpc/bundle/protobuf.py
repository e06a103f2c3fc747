"""Parse messages in protobuf's wire format from a file, without a schema and without copying them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

#: Wire types. The others, 3 and 4, begin and end a group, and are not read.
VARINT, EIGHT_BYTES, DELIMITED, FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Message:
    """A message, string or packed list in protobuf's wire format: a range of bytes of `data`."""

    data: bytes | mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """Yield the number and value of each field; messages, strings and packed lists are `Message` objects.

        Fixed-size numbers are skipped.

        Raises:
            ValueError: the bytes are not in the wire format.
        """
        place = self.start
        while place < self.end:
            number, kind, start, place = read_field(self.data, place, self.end)
            if kind == VARINT:
                yield number, read_varint(self.data, start, place)[0]
            elif kind == DELIMITED:
                yield number, Message(self.data, start, place)

    def messages(self, wanted: int) -> Iterator[Message]:
        """Yield the values of one field number that are messages, strings or packed lists."""
        return (value for number, value in self.fields() if number == wanted and isinstance(value, Message))

    def varints(self) -> Iterator[int]:
        """Yield the numbers of a packed list."""
        place = self.start
        while place < self.end:
            value, place = read_varint(self.data, place, self.end)
            yield value

    def bytes(self) -> bytes:
        """Return a copy of the bytes."""
        return self.data[self.start : self.end]


def read_field(data: bytes | mmap.mmap, place: int, end: int) -> tuple[int, int, int, int]:
    """Read the key of a field.

    Args:
        data: the bytes.
        place: offset of the field.
        end: offset of the byte after its message.

    Returns:
        The number of the field, its wire type, and the offsets of its value and of the byte after the value.

    Raises:
        ValueError: the bytes are not in the wire format, or the field is a group.
    """
    key, start = read_varint(data, place, end)
    kind = key & 7
    if kind == DELIMITED:
        size, start = read_varint(data, start, end)
        stop = start + size
    elif kind == VARINT:
        _, stop = read_varint(data, start, end)
    elif kind in (EIGHT_BYTES, FOUR_BYTES):
        stop = start + (8 if kind == EIGHT_BYTES else 4)
    else:
        raise ValueError(f"a field has the wire type {kind}")
    if stop > end:
        raise ValueError("a field ends after its message")
    return key >> 3, kind, start, stop


def read_varint(data: bytes | mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """Return a number and the offset of the byte after it.

    Args:
        data: the bytes.
        place: offset of the number.
        end: offset of the byte after the message that holds it.

    Raises:
        ValueError: the number ends after its message, or has more than ten bytes.
    """
    if place < end and data[place] < 0x80:  # most have one byte
        return data[place], place + 1
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise ValueError("a number ends after its message")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number has more than ten bytes")
