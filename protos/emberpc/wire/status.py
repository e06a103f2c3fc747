"""Encode and decode the details of an error in the form that all gRPC libraries use.

A call that the server fails has a serialized google.rpc.Status in its trailing
metadata. An error that gRPC itself makes, such as for a passed deadline, has none.
The messages here are those of `errors.proto`, which have the same wire form as the
messages of google.rpc.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from emberpc.v1 import errors_pb2 as pb

#: Key of the trailing metadata whose value is the serialized status of a failed call.
DETAILS_KEY = "grpc-status-details-bin"
#: Key of the trailing metadata whose value is the number of milliseconds that gRPC's own retries wait before a retry.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: Key of the metadata whose value is the request id: of the metadata that a caller sends, and of the trailing metadata.
REQUEST_ID_KEY = "x-request-id"

_TYPE_URL = "type.googleapis.com/google.rpc."

Detail = TypeVar("Detail", bound=Message)


def make(code: int, message: str, details: Iterable[Message]) -> pb.ErrorStatus:
    """Return the status message of an error.

    Args:
        code: the gRPC status code as a number.
        message: the problem, for a developer. It is not shortened here.
        details: messages of `errors.proto`, such as `BadRequest`. Each is packed under the type URL of google.rpc.
    """
    status = pb.ErrorStatus(code=code, message=message)
    for detail in details:
        packed = status.details.add()
        packed.type_url = _TYPE_URL + detail.DESCRIPTOR.name
        packed.value = detail.SerializeToString()
    return status


def unpack(data: bytes) -> pb.ErrorStatus:
    """Decode a serialized status. If the bytes are not a status, return an empty status.

    This raises no error, since the caller is handling the error of a call already.
    """
    try:
        return pb.ErrorStatus.FromString(data)
    except DecodeError:
        return pb.ErrorStatus()


def detail(status: pb.ErrorStatus, kind: type[Detail]) -> Detail | None:
    """Return the first detail of the type `kind` of an error; None if there is none, or the first cannot be decoded."""
    for packed in status.details:
        if packed.type_url == _TYPE_URL + kind.DESCRIPTOR.name:
            try:
                return kind.FromString(packed.value)
            except DecodeError:
                return None
    return None
