"""Count the elements of a request in its bytes, before protobuf decodes it, and refuse too many.

protobuf holds the interpreter's lock while it decodes. Decoding 16 MiB of empty records took 2.5 seconds and 900 MB,
and a single map of 750,000 keys took 5 seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from emberpc.bundle.protobuf import DELIMITED, read_field
from emberpc.server.errors import ServiceError, invalid

#: Requests of fewer bytes are not counted: protobuf decodes them in a few milliseconds.
_SMALL = 64 * 1024
#: Most fields of the request itself, without the elements of repeated fields that have their own limit.
_MAX_OTHERS = 1000
#: Most fields and list items of one message inside a request. Decoding a map takes more than linear time.
_MAX_ITEMS = 2**16
#: Most list items, map entries and unknown fields of all messages inside a request. This many decode in 0.1 to 0.4 s.
MAX_ELEMENTS = 500_000
#: Bytes that are scanned between two pauses: a few milliseconds of work.
_STEP_BYTES = 32 * 1024
#: Values of the bytes of a varint except its last byte.
_CONTINUED = bytes(range(0x80, 0x100))
_FIXED_SIZES = {
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32, FieldDescriptor.TYPE_FLOAT), 4),
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_DOUBLE), 8),
}


class _Part(NamedTuple):
    """A message inside a request: its type, and the start and end of its bytes in the request."""

    message: Descriptor
    start: int
    end: int


class _TooManyError(Exception):
    """A message has more than `most` elements of the field `number`, or, if `number` is 0, of all other fields."""

    def __init__(self, number: int, most: int) -> None:
        super().__init__(number, most)
        self.number, self.most = number, most


def count_elements(data: bytes, message: Descriptor, limits: Mapping[str, int]) -> Iterator[None]:
    """Check the number of elements of a request; yield after each step of a few milliseconds.

    An element has at least two bytes, so the size of a message limits its elements. Messages inside the request are
    scanned only until the sizes of the others prove that the total is within the limit.

    Args:
        data: the request as bytes.
        message: type of the request.
        limits: most elements of repeated fields of the request itself, by field name.

    Raises:
        ServiceError: INVALID_ARGUMENT if a field has more elements than its limit, if a message inside the request has
            more than 65,536 fields and list items, or if all of them together have more than `MAX_ELEMENTS`.
        ValueError: the bytes are no valid message, or contain a group, which no message of emberpc has.
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
    #: Upper limit of the elements of the messages that were not scanned yet.
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
    """Return the INVALID_ARGUMENT error for a request that has too many elements in one of its own fields."""
    field = message.fields_by_number.get(error.number)
    if field is not None and field.is_repeated:
        return invalid(field.name, f"has more than {error.most} items, the most of one call; split it")
    return invalid(message.name, f"has more than {error.most} fields beside its items; send fewer")


@lru_cache(maxsize=256)
def _fields(message: Descriptor) -> dict[int, tuple[bool, Descriptor | None, int | None]]:
    """Return the fields of a message type by number: whether repeated, its message type or None, its item size.

    The item size is that of `_packed`.
    """
    return {field.number: (field.is_repeated, field.message_type, _packed(field)) for field in message.fields}


def _packed(field: FieldDescriptor) -> int | None:
    """Return the bytes of an item of a field that may be a packed list (0 for varints), or None for other fields."""
    scalar = field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
    return _FIXED_SIZES.get(field.type, 0) if field.is_repeated and scalar else None


def _scan(data: bytes, outer: _Part, limits: Mapping[int, int], most: int) -> tuple[int, list[_Part]]:
    """Count the elements of one message, and find the messages inside it.

    Args:
        data: the whole request.
        outer: the message to scan.
        limits: most items of a field, by field number.
        most: most items of all other fields together.

    Returns:
        The number of list items, map entries and unknown fields; and the messages directly inside the message, without
        those that are empty or hold a single number or string.

    Raises:
        _TooManyError: a limit is exceeded.
        ValueError: the bytes are no valid message, or contain a group.
    """
    fields = _fields(outer.message)
    counts: dict[int, int] = {}
    parts: list[_Part] = []
    elements = 0
    place, end = outer.start, outer.end
    while place < end:
        number, kind, start, place = read_field(data, place, end)
        repeated, message, item_size = fields.get(number, _UNKNOWN)
        count = 1
        if kind == DELIMITED and item_size is not None:
            packed = data[start:place]
            count = len(packed) // item_size if item_size else len(packed.translate(None, _CONTINUED))
        elif kind == DELIMITED and message is not None and not _is_scalar(data, start, place, message):
            parts.append(_Part(message, start, place))
        limited = number if number in limits else 0
        counts[limited] = counts.get(limited, 0) + count
        if counts[limited] > limits.get(limited, most):
            raise _TooManyError(limited, limits.get(limited, most))
        elements += count if repeated else 0
    return elements, parts


def _is_scalar(data: bytes, start: int, end: int, message: Descriptor) -> bool:
    """Return whether a message is empty or holds a single number or string. Most metadata values do."""
    if start == end:
        return True
    number, _, _, stop = read_field(data, start, end)
    repeated, inner, _ = _fields(message).get(number, _UNKNOWN)
    return stop == end and not repeated and inner is None


#: Entry of `_fields` for a field number that the message type does not have.
_UNKNOWN: tuple[bool, Descriptor | None, int | None] = (True, None, None)
