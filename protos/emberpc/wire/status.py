"""Encode and decode the status and the details of an error in the wire form of google.rpc.

A call that the server fails has a serialized google.rpc.Status in its trailing
metadata. An error that gRPC itself makes, for example because a request is too large,
has none. This module uses the messages of `errors.proto`, which have the same wire form
as the messages of google.rpc.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from emberpc.v1 import errors_pb2 as pb

#: Key of the trailing metadata whose value is the serialized status of a failed call.
DETAILS_KEY = "grpc-status-details-bin"
#: Key of the trailing metadata whose value is the number of milliseconds, as text, after which a client may retry.
#: gRPC's own retries read it.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: Key of the request id, both in the metadata that a caller sends and in the trailing metadata of the response.
REQUEST_ID_KEY = "x-request-id"

_TYPE_URL = "type.googleapis.com/google.rpc."

Detail = TypeVar("Detail", bound=Message)


def make(code: int, message: str, details: Iterable[Message]) -> pb.ErrorStatus:
    """Return the protobuf message `ErrorStatus` of an error.

    Args:
        code: the gRPC status code as a number.
        message: the problem, for a developer. It is not shortened here.
        details: messages of `errors.proto`, such as `BadRequest`. Each is packed with the type URL of google.rpc's
            message of the same name.
    """
    status = pb.ErrorStatus(code=code, message=message)
    for detail in details:
        packed = status.details.add()
        packed.type_url = _TYPE_URL + detail.DESCRIPTOR.name
        packed.value = detail.SerializeToString()
    return status


def unpack(data: bytes) -> pb.ErrorStatus:
    """Decode a serialized status. If the bytes cannot be decoded, return a status with code 0 and no details.

    No error is raised, since the caller is already handling the error of a call.
    """
    try:
        return pb.ErrorStatus.FromString(data)
    except DecodeError:
        return pb.ErrorStatus()


def detail(status: pb.ErrorStatus, kind: type[Detail]) -> Detail | None:
    """Return the first detail of an error that has the type `kind`; None if none has, or that one cannot be decoded."""
    for packed in status.details:
        if packed.type_url == _TYPE_URL + kind.DESCRIPTOR.name:
            try:
                return kind.FromString(packed.value)
            except DecodeError:
                return None
    return None
