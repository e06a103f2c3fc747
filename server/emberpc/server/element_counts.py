"""The number of elements of a request, counted on its bytes before protobuf decodes it.

protobuf holds the interpreter while it decodes: 16 MiB of empty records took 2.5 seconds and 900 MB, and one map of
750,000 keys took 5 seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from emberpc.server.errors import ServiceError, invalid

#: Requests of fewer bytes are decoded without a look: they decode in some milliseconds.
_SMALL = 64 * 1024
#: Most occurrences of a field of the request itself that has no limit of its own, and most different fields.
_MAX_OTHERS = 1000
#: Most items of a list or map of a message within a request. A map of many keys decodes in more than linear time.
_MAX_ITEMS = 2**16
#: Most list items, map entries and unknown fields of all messages within a request; they decode in 0.1 to 0.4 seconds.
MAX_ELEMENTS = 500_000
#: Bytes that are looked at between pauses, some milliseconds of work.
_STEP_BYTES = 32 * 1024
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5
#: Bytes of a varint before its last one.
_CONTINUED = bytes(range(0x80, 0x100))
_FIXED_SIZES = {
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32, FieldDescriptor.TYPE_FLOAT), 4),
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_DOUBLE), 8),
}


class _Part(NamedTuple):
    """A message within the request: its type, and where its bytes start and end."""

    message: Descriptor
    start: int
    end: int


class _TooManyError(Exception):
    """A message has too many fields of one number, or fields of too many numbers (number 0)."""

    def __init__(self, number: int, most: int) -> None:
        super().__init__(number, most)
        self.number, self.most = number, most


def count_elements(data: bytes, message: Descriptor, limits: Mapping[str, int]) -> Iterator[None]:
    """Check the number of elements of a request, and pause after each step of some milliseconds.

    A message within the request is looked at only while the sizes of such messages do not prove that the limit is
    kept: an element has at least two bytes.

    Args:
        data: the request as bytes.
        message: its type.
        limits: most elements of a repeated field of the request itself, by the name of the field.

    Raises:
        ServiceError: INVALID_ARGUMENT if a field has more elements than its limit, if a list or map of a message
            within the request has more than 65,536 items, or if all of them have more than `MAX_ELEMENTS`.
        ValueError: the bytes are no message, or have a group, which no message of emberpc has.
    """
    if len(data) < _SMALL:
        return
    try:
        most = {field.number: limits[field.name] for field in message.fields if field.name in limits}
        _, parts = _scan(data, _Part(message, 0, len(data)), most, _MAX_OTHERS)
    except _TooManyError as error:
        raise _too_many_fields(message, error) from None
    yield
    waiting = deque(parts)
    elements, looked_at = 0, 0
    #: Elements that the messages that were not looked at have at most.
    unseen = sum((part.end - part.start) // 2 for part in parts)
    while waiting and elements + unseen > MAX_ELEMENTS:
        outer = waiting.popleft()
        try:
            count, parts = _scan(data, outer, {}, _MAX_ITEMS)
        except _TooManyError:
            remedy = f"has a {outer.message.name} with more than {_MAX_ITEMS} items; shorten or split it"
            raise invalid(message.name, remedy) from None
        elements += count
        if elements > MAX_ELEMENTS:
            raise invalid(message.name, f"has more than {MAX_ELEMENTS} list items and map entries; split the call")
        unseen += sum((part.end - part.start) // 2 for part in parts) - (outer.end - outer.start) // 2
        waiting.extend(parts)
        looked_at += outer.end - outer.start - sum(part.end - part.start for part in parts)
        if looked_at > _STEP_BYTES:
            looked_at = 0
            yield


def _too_many_fields(message: Descriptor, error: _TooManyError) -> ServiceError:
    """Return the error of a request with too many elements of one of its own fields."""
    field = message.fields_by_number.get(error.number)
    if field is not None and field.is_repeated:
        return invalid(field.name, f"has more than {error.most} items, the most of one call; split it")
    return invalid(message.name, f"has more than {error.most} fields beside its items; send fewer")


@lru_cache(maxsize=256)
def _fields(message: Descriptor) -> dict[int, tuple[int, Descriptor | None, int | None]]:
    """Return of each field of a message type, by number: 1 if repeated else 0; its message type; see `_packed`."""
    return {field.number: (int(field.is_repeated), field.message_type, _packed(field)) for field in message.fields}


def _packed(field: FieldDescriptor) -> int | None:
    """Return the bytes of an item of a field that may be a packed list, 0 for varints; None: it may not be one."""
    scalar = field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
    return _FIXED_SIZES.get(field.type, 0) if field.is_repeated and scalar else None


def _scan(data: bytes, outer: _Part, limits: Mapping[int, int], most: int) -> tuple[int, list[_Part]]:
    """Count the fields of a message.

    Args:
        data: the request.
        outer: the message.
        limits: most occurrences of a field, by its number.
        most: most occurrences of any other field.

    Returns:
        The number of its list items, map entries and unknown fields, and the messages within it.

    Raises:
        _TooManyError: there are more.
        ValueError: the bytes are no message, or have a group.
    """
    fields = _fields(outer.message)
    counts: dict[int, int] = {}
    parts: list[_Part] = []
    place, end = outer.start, outer.end
    while place < end:
        key, place = _varint(data, place, end)
        number, kind = key >> 3, key & 7
        start, place = _value(data, place, end, kind)
        count = 1
        if kind == _DELIMITED:
            _, message, item_size = fields.get(number, _UNKNOWN)
            if item_size is not None:
                packed = data[start:place]
                count = len(packed) // item_size if item_size else len(packed.translate(None, _CONTINUED))
            elif message is not None and not _is_scalar(data, start, place, message):
                parts.append(_Part(message, start, place))
        count += counts.get(number, 0)
        if count > limits.get(number, most):
            raise _TooManyError(number, limits.get(number, most))
        counts[number] = count
        if len(counts) > _MAX_OTHERS:
            raise _TooManyError(0, _MAX_OTHERS)
    return sum(count for number, count in counts.items() if fields.get(number, _UNKNOWN)[0]), parts


def _value(data: bytes, place: int, end: int, kind: int) -> tuple[int, int]:
    """Return where the value of a field of a wire type starts and ends; ValueError: it ends after its message."""
    if kind == _DELIMITED:
        size, start = _varint(data, place, end)
        stop = start + size
    elif kind == _VARINT:
        start, (_, stop) = place, _varint(data, place, end)
    elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
        start, stop = place, place + (8 if kind == _EIGHT_BYTES else 4)
    else:
        raise ValueError(f"a field has the wire type {kind}")
    if stop > end:
        raise ValueError("a field ends after its message")
    return start, stop


def _is_scalar(data: bytes, start: int, end: int, message: Descriptor) -> bool:
    """Return whether a message is empty, or one number or string, as most metadata values are."""
    size = end - start
    if not size:
        return True
    repeated, inner, _ = _fields(message).get(data[start] >> 3, _UNKNOWN)
    kind = data[start] & 7
    if repeated or inner is not None or data[start] >= 0x80:
        return False
    if kind == _DELIMITED:
        return size > 1 and data[start + 1] == size - 2 < 0x80
    return size == (9 if kind == _EIGHT_BYTES else 5 if kind == _FOUR_BYTES else 2)


#: Of a field that the message type does not have.
_UNKNOWN: tuple[int, Descriptor | None, int | None] = (1, None, None)


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    if place < end and data[place] < 0x80:
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
