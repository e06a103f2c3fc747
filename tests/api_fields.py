"""The fields of the API: their names, and messages with all of them set."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from emberpc.v1 import classification_pb2, embedding_pb2, index_pb2, model_pb2, server_pb2, types_pb2
from emberpc.wire import vectors

#: RPCs that no client calls, and why.
UNSERVED = dict.fromkeys(
    (
        "CreateClassifier",
        "UpdateClassifier",
        "DeleteClassifier",
        "FitClassifier",
        "SubmitCorrections",
    ),
    "no server serves it yet",
)
#: Messages whose fields are tested elsewhere or belong to another library.
LEAVES = {"Vectors", "Any", "Struct", "Timestamp", "Duration", "FieldMask"}
#: A filter with every kind of condition and of value.
WHERE = """a = "x" and b in (1, true, null) and c starts with "p" and (d exists or not e < 2)"""


def filled(kind: type[Message], without: str) -> Message:
    """Return a message with every field set, repeated ones to one item, but for `without`."""
    message = kind()
    fill(message, without)
    if isinstance(message, embedding_pb2.EmbedStreamResponse) and message.failures:
        message.failures[0].id = "1" if message.failures[0].id else ""
        message.ids[:] = ["0"] if message.ids else []
    if isinstance(message, index_pb2.UpsertRecordsStreamResponse):
        message.batch_number *= 2  # the number of the first message with records
        for failure in message.failures:
            failure.id = "a" if failure.id else ""
    if isinstance(message, index_pb2.BackupCollectionResponse) and message.sha256:
        message.sha256 = hashlib.sha256(b"x").hexdigest()
    return message


def fill(message: Any, without: str) -> None:
    if isinstance(message, types_pb2.Vectors):
        message.CopyFrom(vectors.encode(np.ones((1, 2), np.float32)))
    elif isinstance(message, (Timestamp, Duration)):
        message.seconds = 1
    elif isinstance(message, Struct):
        message.update({"k": "v"})
    elif message.DESCRIPTOR.name not in LEAVES:
        for field in message.DESCRIPTOR.fields:
            if name_of(field) == without:
                continue
            entry = field.message_type and field.message_type.GetOptions().map_entry
            if entry:
                getattr(message, field.name)["k"] = 0.5
            elif field.message_type and field.is_repeated:
                fill(getattr(message, field.name).add(), without)
            elif field.message_type:
                getattr(message, field.name).SetInParent()
                fill(getattr(message, field.name), without)
            elif field.is_repeated:
                getattr(message, field.name).append(value_of(field))
            else:
                setattr(message, field.name, value_of(field))


def value_of(field: FieldDescriptor) -> Any:
    if field.enum_type:
        return field.enum_type.values[1].number
    values = {
        FieldDescriptor.CPPTYPE_STRING: b"x" if field.type == FieldDescriptor.TYPE_BYTES else "x",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
        FieldDescriptor.CPPTYPE_FLOAT: 0.5,
    }
    if name_of(field) == "ErrorStatus.code":
        return 3  # INVALID_ARGUMENT; the command line has no exit code of its own for 1, CANCELLED
    return values.get(field.cpp_type, 1)


def name_of(field: FieldDescriptor) -> str:
    """Return the name of a field as the lists of exceptions have it, such as `EmbedRequest.texts`."""
    assert field.containing_type is not None
    return f"{field.containing_type.name}.{field.name}"


def methods() -> Iterator[MethodDescriptor]:
    """Yield each RPC that the server serves."""
    for module in (classification_pb2, embedding_pb2, index_pb2, model_pb2, server_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from (method for method in service.methods if method.name not in UNSERVED)


def fields_of(kind: Descriptor, found: set[str], left_out: Container[str] = ()) -> set[str]:
    """Add the names of the fields of a message, and of the messages in it, to `found`, except those of `left_out`."""
    if kind.name in LEAVES or kind.GetOptions().map_entry:
        return found
    for field in kind.fields:
        if name_of(field) not in found and name_of(field) not in left_out:
            found.add(name_of(field))
            if field.message_type:
                fields_of(field.message_type, found, left_out)
    return found


def set_fields(message: Message) -> Iterator[str]:
    """Yield the name of each field that is set in a message, and in the messages in it."""
    for field, value in message.ListFields():
        yield name_of(field)
        if field.message_type and not field.message_type.GetOptions().map_entry:
            for item in value if field.is_repeated else [value]:
                yield from set_fields(item)
