"""Parse messages in protobuf's wire format from a file, without a schema and without copying them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5


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
        """Yield the values of one field number that are messages, strings or packed lists."""
        return (value for number, value in self.fields() if number == wanted and isinstance(value, Message))

    def varints(self) -> Iterator[int]:
        """Yield the numbers of a packed list."""
        place = self.start
        while place < self.end:
            value, place = self._varint(place)
            yield value

    def bytes(self) -> bytes:
        """Return a copy of the bytes."""
        return self.data[self.start : self.end]

    def _varint(self, place: int) -> tuple[int, int]:
        """Return a number and the offset of the byte after it."""
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
