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

from emberpc.bundle.protobuf import DELIMITED, read_field
from emberpc.server.errors import ServiceError, invalid

#: Requests of fewer bytes are decoded without a look: they decode in some milliseconds.
_SMALL = 64 * 1024
#: Most fields of the request itself beside the elements that have a limit of their own.
_MAX_OTHERS = 1000
#: Most fields and list items of one message within a request. A map of many keys decodes in more than linear time.
_MAX_ITEMS = 2**16
#: Most list items, map entries and unknown fields of all messages within a request; they decode in 0.1 to 0.4 seconds.
MAX_ELEMENTS = 500_000
#: Bytes that are looked at between pauses, some milliseconds of work.
_STEP_BYTES = 32 * 1024
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
    """A message has more fields than `most`: of one number, or (0) of all numbers without a limit of their own."""

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
        ServiceError: INVALID_ARGUMENT if a field has more elements than its limit, if a message within the request has
            more than 65,536 fields and list items, or if all of them have more than `MAX_ELEMENTS`.
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
def _fields(message: Descriptor) -> dict[int, tuple[bool, Descriptor | None, int | None]]:
    """Return of each field of a message type, by number: whether it is repeated; its message type; see `_packed`."""
    return {field.number: (field.is_repeated, field.message_type, _packed(field)) for field in message.fields}


def _packed(field: FieldDescriptor) -> int | None:
    """Return the bytes of an item of a field that may be a packed list, 0 for varints; None: it may not be one."""
    scalar = field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
    return _FIXED_SIZES.get(field.type, 0) if field.is_repeated and scalar else None


def _scan(data: bytes, outer: _Part, limits: Mapping[int, int], most: int) -> tuple[int, list[_Part]]:
    """Count the fields of a message.

    Args:
        data: the request.
        outer: the message.
        limits: most items of a field, by its number.
        most: most items of all other fields.

    Returns:
        The number of its list items, map entries and unknown fields, and the messages within it.

    Raises:
        _TooManyError: there are more.
        ValueError: the bytes are no message, or have a group.
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
    """Return whether a message is empty, or one number or string, as most metadata values are."""
    if start == end:
        return True
    number, _, _, stop = read_field(data, start, end)
    repeated, inner, _ = _fields(message).get(number, _UNKNOWN)
    return stop == end and not repeated and inner is None


#: Of a field that the message type does not have.
_UNKNOWN: tuple[bool, Descriptor | None, int | None] = (True, None, None)
