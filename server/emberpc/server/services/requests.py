"""Read the caller and the request id of a call, and the fields that several request messages have."""

from __future__ import annotations

from collections.abc import AsyncIterator
from math import inf
from time import perf_counter
from typing import Any, TypeAlias, cast

import grpc.aio

from emberpc.server.engine import Caller, Lane, Truncation
from emberpc.server.errors import invalid
from emberpc.server.in_flight import HeldMessage, HoldingStream
from emberpc.server.paging import MAX_PAGE_SIZE
from emberpc.server.pipelines.embedding import InputKind
from emberpc.v1 import types_pb2
from emberpc.wire import status

#: Maximum number of items of a page if the request does not state a number.
DEFAULT_PAGE_SIZE = 100

#: Type of gRPC's context of a call. `Any`: the services do not need its type parameters, the request and the response.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_TRUNCATIONS: dict[types_pb2.Truncation.ValueType, Truncation] = {
    types_pb2.TRUNCATION_REFUSE: Truncation.REFUSE,
    types_pb2.TRUNCATION_END: Truncation.END,
    types_pb2.TRUNCATION_START: Truncation.START,
}
_INPUT_KINDS: dict[types_pb2.InputKind.ValueType, InputKind] = {
    types_pb2.INPUT_KIND_UNSPECIFIED: InputKind.PASSAGE,
    types_pb2.INPUT_KIND_PASSAGE: InputKind.PASSAGE,
    types_pb2.INPUT_KIND_QUERY: InputKind.QUERY,
}
_LANES: dict[types_pb2.Priority.ValueType, Lane | None] = {
    types_pb2.PRIORITY_UNSPECIFIED: None,
    types_pb2.PRIORITY_INTERACTIVE: Lane.INTERACTIVE,
    types_pb2.PRIORITY_BULK: Lane.BULK,
}


def request_id(context: Context) -> str:
    """Return the request id of a call, which `handlers` has put into the trailing metadata; empty if it is missing."""
    trailing = dict(tuple(context.trailing_metadata() or ()))
    return str(trailing.get(status.REQUEST_ID_KEY, ""))


def hold(messages: AsyncIterator[Any]) -> HeldMessage:
    """Keep the latest message of a request stream counted in `max_in_flight_bytes` until the message is released.

    Without this call, the message is counted until the next one is read. Call this at most once for a message.

    Args:
        messages: the stream as `handlers` gives it to a service.

    Returns:
        The number of bytes of the message, and the function that releases it.
    """
    return cast(HoldingStream, messages).hold()


def caller(
    context: Context,
    priority: types_pb2.Priority.ValueType = types_pb2.PRIORITY_UNSPECIFIED,
    default: Lane = Lane.INTERACTIVE,
    field: str = "priority",
) -> Caller:
    """Return the caller of a call: the peer's address with its port, the lane, and the deadline.

    The deadline is in seconds of `time.perf_counter`; infinity if the call has none.

    Args:
        context: the context of the call.
        priority: the priority that the request states.
        default: the lane if the request states no priority.
        field: path of the priority in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT for a priority that this server does not know.
    """
    if priority not in _LANES:
        raise invalid(field, f"is {priority}, which is not a Priority; use INTERACTIVE or BULK")
    lane, left = _LANES[priority], context.time_remaining()
    return Caller(context.peer(), default if lane is None else lane, perf_counter() + left if left is not None else inf)


def truncation(value: types_pb2.Truncation.ValueType, field: str = "truncation") -> Truncation:
    """Convert the truncation of a request to the engine's enum; REFUSE if the request states none.

    Args:
        value: the truncation in the request.
        field: path of the truncation in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT for a value that this server does not know.
    """
    return optional_truncation(value, field) or Truncation.REFUSE


def optional_truncation(value: types_pb2.Truncation.ValueType, field: str = "truncation") -> Truncation | None:
    """Convert the truncation of a request as `truncation` does, with its errors; None if the request states none."""
    if value == types_pb2.TRUNCATION_UNSPECIFIED:
        return None
    if value not in _TRUNCATIONS:
        raise invalid(field, f"is {value}, which is not a Truncation; use REFUSE, END or START")
    return _TRUNCATIONS[value]


def input_kind(value: types_pb2.InputKind.ValueType, field: str = "input_kind") -> InputKind:
    """Convert the input kind of a request; PASSAGE if the request states none.

    Args:
        value: the input kind in the request.
        field: path of the input kind in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT for a kind that this server does not know.
    """
    if value not in _INPUT_KINDS:
        raise invalid(field, f"is {value}, which is not an InputKind; use QUERY or PASSAGE")
    return _INPUT_KINDS[value]


def page_size(value: int) -> int:
    """Return the maximum number of items of a page for the `page_size` of a request; 100 for 0.

    Raises:
        ServiceError: INVALID_ARGUMENT if `value` is negative or above 1000.
    """
    if not 0 <= value <= MAX_PAGE_SIZE:
        raise invalid("page_size", f"is {value}; it must be 0 (for {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}")
    return value or DEFAULT_PAGE_SIZE
