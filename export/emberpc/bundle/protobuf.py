"""Parse messages in protobuf's wire format without a schema. Only `Message.bytes` copies the bytes of a message."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

#: Numbers of protobuf's wire types. Groups, of the types 3 and 4, are not supported.
VARINT, EIGHT_BYTES, DELIMITED, FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Message:
    """A message, string, packed list or number of a fixed size in protobuf's wire format.

    Its bytes are those of `data` from `start` to before `end`.
    """

    data: bytes | mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """Yield the number and value of each field, in the order of the bytes; a number may occur several times.

        The value is an int for a varint (see `read_varint`), and a `Message` for a message, string, packed list or
        number of a fixed size (4 or 8 bytes).

        Raises:
            ValueError: the bytes are not in the wire format, or a field is a group.
        """
        place = self.start
        while place < self.end:
            number, kind, start, place = read_field(self.data, place, self.end)
            if kind == VARINT:
                yield number, read_varint(self.data, start, place)[0]
            else:
                yield number, Message(self.data, start, place)

    def messages(self, wanted: int) -> Iterator[Message]:
        """Yield the value of each field with the number `wanted`, but not of varints.

        Raises:
            ValueError: the bytes are not in the wire format, or a field is a group.
        """
        return (value for number, value in self.fields() if number == wanted and isinstance(value, Message))

    def varints(self) -> Iterator[int]:
        """Yield the numbers of a packed list of varints.

        Raises:
            ValueError: the bytes are not a list of varints.
        """
        place = self.start
        while place < self.end:
            value, place = read_varint(self.data, place, self.end)
            yield value

    def bytes(self) -> bytes:
        """Return a copy of the message's bytes."""
        return self.data[self.start : self.end]


def read_field(data: bytes | mmap.mmap, place: int, end: int) -> tuple[int, int, int, int]:
    """Read the key of a field, and find where the field's value lies.

    Args:
        data: the bytes.
        place: offset of the field in `data`.
        end: offset of the byte after the message that has the field.

    Returns:
        The number of the field, its wire type, and the offsets of its value and of the byte after the value.

    Raises:
        ValueError: the wire type is none of the four of this module, the field ends after `end`, or its key, length
            or varint has more than ten bytes.
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
    """Return the value of a varint, as an unsigned number, and the offset of the byte after the varint.

    A negative int64 is returned as the number plus 2**64.

    Args:
        data: the bytes.
        place: offset of the varint in `data`.
        end: offset of the byte after the message that has the varint.

    Raises:
        ValueError: the varint ends after `end`, or has more than ten bytes.
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
