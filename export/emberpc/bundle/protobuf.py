"""Read messages in protobuf's wire format from a file, without their schema and without copies."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Message:
    """A part of a file in protobuf's wire format."""

    data: bytes | mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | Message]]:
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
                yield number, Message(self.data, place, place + length)
                place += length
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                place += 8 if kind == _EIGHT_BYTES else 4
            else:
                raise ValueError(f"a field has the kind {kind}")

    def messages(self, wanted: int) -> Iterator[Message]:
        """Give the fields of one number that are messages, strings or packed lists."""
        return (value for number, value in self.fields() if number == wanted and isinstance(value, Message))

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
