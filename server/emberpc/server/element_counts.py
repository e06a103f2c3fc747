"""Count the elements of a request in its bytes, before protobuf decodes them, and refuse a request with too many.

Elements are list items, map entries and unknown fields. A request is here also each message of a request stream.

protobuf holds the interpreter's lock while it decodes, so no other call runs. To decode a request of the greatest size,
16 MiB of empty records, took 2.5 seconds and 900 MB, and a request with a single map of 750,000 keys took 5 seconds.
Requests of fewer than 64 KiB are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from time import perf_counter
from typing import TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from emberpc.bundle.protobuf import DELIMITED, EIGHT_BYTES, FOUR_BYTES, VARINT, read_field
from emberpc.server.errors import ServiceError, invalid

#: Bytes of a request below which its elements are not counted: protobuf decodes it in a few milliseconds.
_SMALL = 64 * 1024
#: Maximum number of fields and list items of the request itself, without fields that have their own limit (`limits`).
_MAX_OTHERS = 1000
#: Maximum number of fields, list items and map entries of one message inside a request, if the message is scanned. The
#: limit is lower than `MAX_ELEMENTS`, since the time to decode a map grows faster than the number of its entries.
_MAX_ITEMS = 2**16
#: Maximum number of list items, map entries and unknown fields of all messages inside a request together. protobuf
#: decodes this number in 0.1 to 0.4 s.
MAX_ELEMENTS = 500_000
#: Minimum seconds of scanning between two yields of `count_elements`; other calls can run at a yield. The scan of one
#: message is not interrupted.
_STEP_SECONDS = 0.002
#: Tags (number and wire type) of the fields `key` and `value` of a map entry, with a string as key, a message as value.
_ENTRY_KEY, _ENTRY_VALUE = 1 << 3 | DELIMITED, 2 << 3 | DELIMITED
#: The values of the bytes of a varint other than the last byte. To count the items of a packed list of varints, these
#: bytes are removed: one byte for each item is left.
_CONTINUED = bytes(range(0x80, 0x100))
#: Bytes of a value, for the field types with values of a fixed size.
_FIXED_SIZES = {
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32, FieldDescriptor.TYPE_FLOAT), 4),
    **dict.fromkeys((FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64, FieldDescriptor.TYPE_DOUBLE), 8),
}
#: Wire type of each field type that is neither a message nor a varint.
_WIRE_TYPES = {
    **{kind: EIGHT_BYTES if size == 8 else FOUR_BYTES for kind, size in _FIXED_SIZES.items()},
    **dict.fromkeys((FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES), DELIMITED),
}


class _MessageType:
    """A message type of protobuf, with the properties that `_scan` needs.

    Attributes:
        name: name of the type.
        fields: for each field number: whether the field is repeated; its message type, or None; and the bytes of an
            item if the field may be a packed list (0 for varints), else None.
        scalars: tags (number and wire type) of the fields that are neither repeated nor messages; only fields whose tag
            has one byte.
        entry_scalars: if the type is the entry of a map from strings to messages, `scalars` of the type of these
            messages; else empty.
    """

    __slots__ = ("entry_scalars", "fields", "name", "scalars")

    def __init__(self, message: Descriptor) -> None:
        self.name = message.name
        self.fields: dict[int, tuple[bool, Descriptor | None, int | None]] = {
            field.number: (field.is_repeated, field.message_type, _packed(field)) for field in message.fields
        }
        self.scalars = frozenset(
            field.number << 3 | _WIRE_TYPES.get(field.type, VARINT)
            for field in message.fields
            if not field.is_repeated and field.message_type is None and field.number < 16
        )
        value = message.fields_by_name.get("value") if message.GetOptions().map_entry else None
        is_of_strings = value is not None and message.fields_by_name["key"].type == FieldDescriptor.TYPE_STRING
        inner = value.message_type if value is not None and is_of_strings else None
        self.entry_scalars: frozenset[int] = frozenset() if inner is None else _type_of(inner).scalars


#: A message inside a request: its type, and the start and end of its bytes in the request.
_Part: TypeAlias = "tuple[_MessageType, int, int]"


class _TooManyError(Exception):
    """Raised for a message with too many elements.

    Attributes:
        number: number of the field with too many elements; 0: the fields without a limit of their own have too many
            together.
        maximum: the limit that is exceeded.
    """

    def __init__(self, number: int, maximum: int) -> None:
        super().__init__(number, maximum)
        self.number, self.maximum = number, maximum


def count_elements(data: bytes, message: Descriptor, limits: Mapping[str, int]) -> Iterator[None]:
    """Check the number of elements of a request; yield between two steps, so that other calls can run.

    The first step scans the fields of the request itself. Each further step scans messages inside the request for about
    2 milliseconds. The scan of one message is not interrupted, so a step may take longer. A request of fewer than
    64 KiB is not checked, and nothing is yielded.

    An element of a message inside a request has at least two bytes, since none of these messages of emberpc has a list
    of varints. So a message has at most half as many elements as bytes. The check ends when the total is within the
    limit even if each message that was not scanned has the maximum number of elements that its size allows.

    Args:
        data: the request as bytes.
        message: type of the request.
        limits: maximum number of elements of repeated fields of the request itself, by field name.

    Raises:
        ServiceError: INVALID_ARGUMENT if a field of the request has more elements than its limit; if the request itself
            has more than 1,000 other fields and list items; if a scanned message inside the request has more than
            65,536 fields, list items and map entries; or if all messages inside the request together have more than
            `MAX_ELEMENTS` elements.
        ValueError: the scanned bytes are no valid message, or contain a group, which no message of emberpc has.
    """
    if len(data) < _SMALL:
        return
    kind = _type_of(message)
    try:
        maximum = {field.number: limits[field.name] for field in message.fields if field.name in limits}
        _, waiting = _scan(data, kind, 0, len(data), maximum, _MAX_OTHERS)
    except _TooManyError as error:
        raise _too_many_fields(message, error) from None
    yield
    elements, step_end = 0, perf_counter() + _STEP_SECONDS
    #: Maximum number of elements that all messages in `waiting` together can have: one for every two bytes.
    unseen = sum((end - start) // 2 for _, start, end in waiting)
    while waiting and elements + unseen > MAX_ELEMENTS:
        kind, start, end = waiting.pop()
        try:
            count, parts = _scan(data, kind, start, end, {}, _MAX_ITEMS)
        except _TooManyError:
            remedy = f"has a {kind.name} with more than {_MAX_ITEMS} items; shorten or split it"
            raise invalid(message.name, remedy) from None
        elements += count
        if elements > MAX_ELEMENTS:
            raise invalid(message.name, f"has more than {MAX_ELEMENTS} list items and map entries; split the call")
        unseen -= (end - start) // 2
        if parts:
            unseen += sum((end - start) // 2 for _, start, end in parts)
            waiting += parts
        if perf_counter() > step_end:
            yield
            step_end = perf_counter() + _STEP_SECONDS


def _too_many_fields(message: Descriptor, error: _TooManyError) -> ServiceError:
    """Return the INVALID_ARGUMENT error for `error`, which the scan of the request itself raised.

    The error names the field, or the request's type if the fields without a limit of their own have too many elements.
    """
    field = message.fields_by_number.get(error.number)
    if field is not None and field.is_repeated:
        return invalid(field.name, f"has more than {error.maximum} items, the limit of one call; split it")
    return invalid(message.name, f"has more than {error.maximum} fields beside its items; send fewer")


@lru_cache(maxsize=256)
def _type_of(message: Descriptor) -> _MessageType:
    return _MessageType(message)


def _packed(field: FieldDescriptor) -> int | None:
    """Return the bytes of an item if a field may be a packed list (0 for varints); None for all other fields."""
    scalar = field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)
    return _FIXED_SIZES.get(field.type, 0) if field.is_repeated and scalar else None


def _scan(
    data: bytes, kind: _MessageType, place: int, end: int, limits: Mapping[int, int], maximum: int
) -> tuple[int, list[_Part]]:
    """Count the elements of one message, and find the messages directly inside it.

    Tags and lengths of one byte are decoded here and not by `read_field`, which takes twice as long.

    Args:
        data: the whole request.
        kind: type of the message.
        place: index of the message's first byte in the request.
        end: index after the message's last byte in the request.
        limits: maximum number of items of a field, by field number.
        maximum: maximum number of items of all other fields together. A field that is not repeated counts as one item.

    Returns:
        The number of list items, map entries and unknown fields, and the messages directly inside this one that need a
        scan. Messages that certainly have no elements need none: empty ones, those for which `_is_scalar` is True, and
        map entries for which `_is_plain_entry` is True.

    Raises:
        _TooManyError: a limit is exceeded.
        ValueError: the bytes are no valid message, or contain a group.
    """
    fields, counts = kind.fields, dict.fromkeys((0, *limits), 0)
    parts: list[_Part] = []
    elements = 0
    while place < end:
        key = data[place]
        if key < 0x80 and key & 7 == DELIMITED and place + 1 < end and data[place + 1] < 0x80:
            number, start = key >> 3, place + 2
            place = start + data[place + 1]
            if place > end:
                raise ValueError("a field ends after its message")
            delimited = True
        else:
            number, wire_type, start, place = read_field(data, place, end)
            delimited = wire_type == DELIMITED
        repeated, message, item_size = fields.get(number, _UNKNOWN)
        count = 1
        if delimited:
            if item_size is not None:
                packed = data[start:place]
                items = len(packed) // item_size if item_size else len(packed.translate(None, _CONTINUED))
                count = max(1, items)  # an empty list takes time, too: 16 MiB of them took 5 s to scan
            elif message is not None and start < place:
                inner = _type_of(message)
                if not (
                    _is_plain_entry(data, start, place, inner.entry_scalars)
                    if inner.entry_scalars
                    else _is_scalar(data, start, place, inner.scalars)
                ):
                    parts.append((inner, start, place))
        limited = number if number in limits else 0
        counts[limited] += count
        if counts[limited] > limits.get(limited, maximum):
            raise _TooManyError(limited, limits.get(limited, maximum))
        elements += count if repeated else 0
    return elements, parts


def _is_plain_entry(data: bytes, start: int, end: int, scalars: frozenset[int]) -> bool:
    """Return whether a map entry has a short key and a short value, which is empty or has a single number or string.

    Short: fewer than 128 bytes. The value may be missing. Most entries of metadata are of this kind, and need no scan.
    False for an entry whose key is missing or follows the value.

    Args:
        data: the whole request.
        start: index of the entry's first byte in the request.
        end: index after the entry's last byte in the request.
        scalars: `_MessageType.scalars` of the type of the value.

    Raises:
        ValueError: the bytes are no valid message.
    """
    if start + 1 >= end or data[start] != _ENTRY_KEY or data[start + 1] >= 0x80:
        return False
    value = start + 2 + data[start + 1]
    if value + 1 >= end or data[value] != _ENTRY_VALUE or data[value + 1] >= 0x80:
        return value == end
    return value + 2 + data[value + 1] == end and (value + 2 == end or _is_scalar(data, value + 2, end, scalars))


def _is_scalar(data: bytes, start: int, end: int, scalars: frozenset[int]) -> bool:
    """Return whether the message `data[start:end]`, which is not empty, has only one field, with a tag of `scalars`.

    ValueError if that field is not valid.
    """
    if data[start] not in scalars:
        return False
    if data[start] & 7 == EIGHT_BYTES:
        return start + 9 == end
    return read_field(data, start, end)[3] == end


#: Entry that `_scan` uses for a field number that is not in `_MessageType.fields`. It says that the field is repeated,
#: so that each occurrence counts as an element.
_UNKNOWN: tuple[bool, Descriptor | None, int | None] = (True, None, None)
