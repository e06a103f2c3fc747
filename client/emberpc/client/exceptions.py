"""What can go wrong, as a tree.

    EmberpcError                    a call failed
    ├── InvalidArgument             the request is wrong; `violations` names the fields
    ├── NotFound                    there is no such model, collection, record …
    ├── AlreadyExists               there is one of that name already
    ├── FailedPrecondition          not in the state that things are in, such as the wrong kind of model
    ├── Aborted                     a record changed meanwhile; read it again
    ├── ResourceExhausted           the server is full, or the message too large; `retry_after` may say when to return
    ├── DeadlineExceeded            no answer in time; a write may have happened all the same
    ├── Unavailable                 no server answers, or it is starting or stopping
    ├── Unauthenticated             the token is missing or wrong
    ├── PermissionDenied            the server does not allow this, or not with this token
    ├── Unimplemented               the server does not know the call, or a field of it
    ├── Cancelled                   the call was cancelled, such as by `close()`
    ├── DataLoss                    a record is damaged on the server's disk; delete it or write it again
    └── Internal                    the server made an error; `request_id` finds it in the server's log
    InputError(ValueError)          an argument is wrong; nothing was sent
    InputTypeError(TypeError)       an argument has the wrong type; nothing was sent

The gRPC error behind an EmberpcError is its `__cause__`.
"""

from __future__ import annotations

# The classes are named after gRPC's status codes, which callers know.
# ruff: noqa: N818
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from emberpc.v1 import errors_pb2
from emberpc.wire import status as wire_status


@dataclass(frozen=True)
class Violation:
    """A wrong field of a request: its path, such as `texts[3]` by the caller's own index, and what is wrong with it."""

    field: str
    description: str


class EmberpcError(Exception):
    """A call failed.

    Attributes:
        message: what went wrong, for a developer.
        code: the gRPC status code.
        reason: the cause for programs, such as `MODEL_NOT_FOUND`; empty if the server named none.
        violations: the wrong fields of the request.
        metadata: values behind the message, such as the name of the missing model.
        request_id: finds the call in the server's log; empty if no server answered.
        retry_after: seconds to wait before trying again; None if the server named none.
        done: of a write of several requests: how many items of the caller's list, from the first on, are written or
            deleted by the requests before the one that failed.
    """

    code = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.retry_after = retry_after
        self.done = 0


class InvalidArgument(EmberpcError):
    """The request is wrong; `violations` names the fields."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(EmberpcError):
    """There is no such model, collection, record or the like."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(EmberpcError):
    """There is one of that name already."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(EmberpcError):
    """Things are not in the state that the call needs, such as a model of another kind."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(EmberpcError):
    """A record changed meanwhile; read it again and repeat."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(EmberpcError):
    """The server is full, or a message too large; `retry_after` may say when to return."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(EmberpcError):
    """No answer came in time; a write may have happened all the same."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(EmberpcError):
    """No server answers at the target, or it is starting or stopping."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(EmberpcError):
    """The token is missing or wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(EmberpcError):
    """The server does not allow this, or not with this token."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(EmberpcError):
    """The server does not know the call, or a field of it."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Cancelled(EmberpcError):
    """The call was cancelled, such as by `close()`."""

    code = grpc.StatusCode.CANCELLED


class DataLoss(EmberpcError):
    """A record is damaged on the server's disk; delete it or write it again."""

    code = grpc.StatusCode.DATA_LOSS


class Internal(EmberpcError):
    """The server made an error; `request_id` finds it in the server's log."""

    code = grpc.StatusCode.INTERNAL


class FilterWarning(UserWarning):
    """A filter matches nothing and probably does not mean what was intended.

    Such a filter compares a number with a field that has strings only.
    """


class InputError(ValueError):
    """An argument is wrong; nothing was sent. The message names the item and the remedy."""


class InputTypeError(TypeError):
    """An argument has the wrong type; nothing was sent. The message names the item and the remedy."""


def add_done(error: EmberpcError | InputError | InputTypeError, done: int, words: str) -> None:
    """Add to an error how many items of the caller's list are done; `words` go into its message."""
    message = f"{error}; {words}"
    error.args = (message,)
    if isinstance(error, EmberpcError):
        error.message = message
        error.done = done


_BY_CODE: dict[grpc.StatusCode, type[EmberpcError]] = {kind.code: kind for kind in EmberpcError.__subclasses__()}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class RpcFailure(Protocol):
    """What a failed call of `grpc` and one of `grpc.aio` have in common."""

    def code(self) -> grpc.StatusCode | None:
        """Return the status code."""

    def details(self) -> str | None:
        """Return the message of the status."""

    def trailing_metadata(self) -> Any:
        """Return the trailing metadata: pairs of a key and a str or bytes, or None."""


#: Enum values in the server's messages. Quoted text is matched first and left alone: it may be the caller's.
_WIRE_WORD = re.compile(
    r"""(?<!\w)'[^']*'|"[^"]*"|\b(REFUSE|END|START|DENSE|LEXICAL|HYBRID|SCORES|RANKS|QUERY|PASSAGE|INTERACTIVE|BULK|"""
    r"""COSINE|DOT_PRODUCT|EUCLIDEAN|FLOAT32|FLOAT16|INT8|BINARY)\b"""
)


@dataclass(frozen=True)
class Circumstances:
    """What a message says of a failed call.

    `items` names the repeated field of the request that holds one part of the
    caller's list; `first` is the caller's index of its first item. `late`: the
    call had run for long when it failed.
    """

    target: str
    method: str
    timeout: float
    items: str = ""
    first: int = 0
    late: bool = False


def from_rpc(failure: RpcFailure, call: Circumstances) -> EmberpcError:
    """Turn a gRPC error into one of ours.

    Items that the server names by their place in one request of several, such
    as `texts[3]`, are renamed to their place in the caller's list.
    """
    code = failure.code() or grpc.StatusCode.UNKNOWN
    # A tuple first: older grpc's metadata of asyncio calls iterates over pairs, and looks like a mapping to dict().
    trailing: dict[str, str | bytes] = dict(tuple(failure.trailing_metadata() or ()))
    packed = trailing.get(wire_status.DETAILS_KEY, b"")
    status = wire_status.unpack(packed if isinstance(packed, bytes) else packed.encode())
    message = failure.details() or ""
    # Without details of ours it was gRPC itself, or a proxy, that ended the call.
    if not status.details:
        message = _own_words(code, message, call)
    request_id = trailing.get(wire_status.REQUEST_ID_KEY, "")
    error = _error(
        code, message, status, request_id if isinstance(request_id, str) else "", lambda text: _renumber(text, call)
    )
    pushback = trailing.get(wire_status.PUSHBACK_KEY, "")
    if error.retry_after is None and isinstance(pushback, str) and pushback.isdecimal():
        error.retry_after = int(pushback) / 1000
    return error


def from_status(status: errors_pb2.ErrorStatus) -> EmberpcError:
    """Turn the error of one item of a stream into one of ours."""
    request = wire_status.detail(status, errors_pb2.RequestInfo)
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, status, request.request_id if request else "", lambda text: text)


def no_answer(call: Circumstances) -> DeadlineExceeded:
    """Return the error for a server that was silent for too long."""
    return DeadlineExceeded(_own_words(grpc.StatusCode.DEADLINE_EXCEEDED, "", call))


def _error(
    code: grpc.StatusCode,
    message: str,
    status: errors_pb2.ErrorStatus,
    request_id: str,
    rename: Callable[[str], str],
) -> EmberpcError:
    """Put an error together; `rename` says what the caller calls the items that a text names."""
    info = wire_status.detail(status, errors_pb2.ErrorInfo) or errors_pb2.ErrorInfo()
    bad_request = wire_status.detail(status, errors_pb2.BadRequest) or errors_pb2.BadRequest()
    retry = wire_status.detail(status, errors_pb2.RetryInfo)
    return _BY_CODE.get(code, EmberpcError)(
        _python_words(rename(message)),
        code=code,
        reason=info.reason,
        violations=[
            Violation(rename(violation.field), _python_words(rename(violation.description)))
            for violation in bad_request.field_violations
        ],
        metadata=info.metadata,
        request_id=request_id,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


def _own_words(code: grpc.StatusCode, details: str, call: Circumstances) -> str:
    """Say what gRPC's own status means to the caller."""
    if code is grpc.StatusCode.UNAVAILABLE and call.late:
        return (
            f"the connection to {call.target} broke while {call.method} was running; it was not repeated, since its "
            "work may be long: see what was done, and repeat it"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"no emberpc server answers at {call.target}; check the address, that one runs there "
            "(`emberpc serve`), and that both sides use TLS or neither does"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer from {call.target} within {call.timeout:g} s; give a longer timeout, or send less at once"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server at {call.target} does not know {call.method}; it is no emberpc server, or another version"
    return details or f"{call.method} ended with {code.name}"


def _python_words(text: str) -> str:
    """Write the enum values that a server's message names as this client takes them, such as 'end' for END."""
    return _WIRE_WORD.sub(lambda found: repr(found[1].lower()) if found[1] else found[0], text)


def _renumber(text: str, call: Circumstances) -> str:
    """Add the caller's index of the request's first item to each mention of an item."""
    if not (call.first and call.items):
        return text
    pattern = rf"\b{re.escape(call.items)}\[(\d+)\]"
    return re.sub(pattern, lambda found: f"{call.items}[{int(found[1]) + call.first}]", text)
