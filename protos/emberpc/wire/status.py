"""Error details on the wire, in the form every gRPC library uses.

A failed call carries a serialised google.rpc.Status in its trailing metadata.
The messages are those of `errors.proto`, which has the same wire form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from emberpc.v1 import errors_pb2 as pb

#: Key of the trailing metadata that holds the details.
DETAILS_KEY = "grpc-status-details-bin"
#: Key of the trailing metadata that tells gRPC itself how many milliseconds to wait before a retry.
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: Key of the metadata that carries a request's id, in both directions.
REQUEST_ID_KEY = "x-request-id"

_TYPE_URL = "type.googleapis.com/google.rpc."

Detail = TypeVar("Detail", bound=Message)


def make(code: int, message: str, details: Iterable[Message]) -> pb.ErrorStatus:
    """Put an error together; in the trailing metadata it travels serialised.

    Args:
        code: the gRPC status code as a number.
        message: what went wrong, for a developer.
        details: messages of `errors.proto`.
    """
    status = pb.ErrorStatus(code=code, message=message)
    for detail in details:
        packed = status.details.add()
        packed.type_url = _TYPE_URL + detail.DESCRIPTOR.name
        packed.value = detail.SerializeToString()
    return status


def unpack(data: bytes) -> pb.ErrorStatus:
    """Read a serialised error; an empty status if the bytes are none, since an error must never hide an error."""
    try:
        return pb.ErrorStatus.FromString(data)
    except DecodeError:
        return pb.ErrorStatus()


def detail(status: pb.ErrorStatus, kind: type[Detail]) -> Detail | None:
    """Return the first detail of a kind, or None if the error has none."""
    for packed in status.details:
        if packed.type_url == _TYPE_URL + kind.DESCRIPTOR.name:
            try:
                return kind.FromString(packed.value)
            except DecodeError:
                return None
    return None
