"""Serialize records one after the other, and metadata without a message, which saves memory.

As messages, 400 records with 15 kB of nested metadata each took 340 MB together until the response was serialized.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from emberpc.server.collections.types import NO_METADATA, StoredRecord
from emberpc.server.services.index_messages import RequestedParts, set_timestamp
from emberpc.v1 import index_pb2 as pb

# A tag encodes number and wire type of a protobuf field, see https://protobuf.dev/programming-guides/encoding/.
#: Tag of a field with number 1 and a length: `Struct.fields`, the key in an entry of `Struct.fields`,
#: `ListValue.values`, `Hit.record`, `SearchResult.hits`, and the records, results or clusters of responses.
FIRST = b"\x0a"
#: Tag of a field with number 2 and a length: the value in an entry of `Struct.fields`, and `Cluster.examples`.
SECOND = b"\x12"
#: Tag of `Record.metadata`: number 3, with a length.
_METADATA = b"\x1a"
# The kinds of google.protobuf.Value: for null, false and true the whole message, for the others the tag of the value.
_NULL = b"\x08\x00"
_NUMBER = b"\x11"
_TEXT = b"\x1a"
_FALSE, _TRUE = b"\x20\x00", b"\x20\x01"
_OBJECT = b"\x2a"
_LIST = b"\x32"

_double = struct.Struct("<d").pack


def record_bytes(record: StoredRecord, parts: RequestedParts) -> bytes:
    """Serialize a record as the message `Record`, which has no vector. It has the text and metadata that `parts` names.

    `time_to_live` is the time from now until the record expires, at least 1 ms; unset if the record does not expire.
    """
    message = pb.Record()
    message.id = record.id
    message.label = record.label
    message.revision = record.revision
    set_timestamp(message.create_time, record.create_time)
    set_timestamp(message.update_time, record.update_time)
    if record.expire_time is not None:
        left = (record.expire_time - datetime.now(timezone.utc)).total_seconds()
        message.time_to_live.FromMilliseconds(max(round(left * 1000), 1))
    if parts.text:
        message.text = record.text
    serialized = message.SerializeToString()
    if not parts.metadata or record.metadata_text == NO_METADATA:
        return serialized
    metadata = struct_bytes(record.metadata)
    return b"".join((serialized, _METADATA, varint(len(metadata)), metadata))


def struct_bytes(metadata: Mapping[str, Any]) -> bytes:
    """Serialize a JSON object as the message `google.protobuf.Struct`.

    For 15 kB of metadata this takes half the time of filling and serializing a message, and a tenth of the memory.
    """
    pieces: list[bytes] = []
    for name, value in metadata.items():
        name_bytes, value_bytes = name.encode(), _value(value)
        name_length, value_length = varint(len(name_bytes)), varint(len(value_bytes))
        size = len(FIRST) + len(name_length) + len(name_bytes) + len(SECOND) + len(value_length) + len(value_bytes)
        pieces += (FIRST, varint(size), FIRST, name_length, name_bytes, SECOND, value_length, value_bytes)
    return b"".join(pieces)


def _value(value: Any) -> bytes:
    """Serialize a JSON value as the message `google.protobuf.Value`."""
    kind = type(value)
    if kind is str:
        return length_delimited(_TEXT, value.encode())
    if kind is int or kind is float:
        return _NUMBER + _double(value)
    if kind is dict:
        return length_delimited(_OBJECT, struct_bytes(value))
    if kind is list:
        return length_delimited(_LIST, _values(value))
    if value is None:
        return _NULL
    return _TRUE if value else _FALSE


def _values(values: Sequence[Any]) -> bytes:
    """Serialize a JSON array as the message `google.protobuf.ListValue`."""
    pieces: list[bytes] = []
    for value in values:
        value_bytes = _value(value)
        pieces += (FIRST, varint(len(value_bytes)), value_bytes)
    return b"".join(pieces)


def length_delimited(tag: bytes, data: bytes) -> bytes:
    """Return the bytes of a protobuf field with a length: the tag, the length of `data` as a varint, and `data`."""
    return tag + varint(len(data)) + data


def varint(number: int) -> bytes:
    """Encode a number >= 0 as a varint of protobuf.

    Each byte has seven bits of the number, the lowest seven first. The highest bit of a byte is 1 if more bytes follow.
    """
    if number <= 0x7F:
        return _SINGLE_BYTES[number]
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_SINGLE_BYTES = [bytes((number,)) for number in range(0x80)]
