"""Exceptions of the client, as a tree.

    EmberpcError                    a call failed
    ├── InvalidArgument             the request is wrong; `violations` names the fields, if the server stated them
    ├── NotFound                    there is no such model, collection, record …
    ├── AlreadyExists               the name is taken
    ├── FailedPrecondition          the state of the server does not allow the call, such as the wrong kind of model
    ├── Aborted                     a record has another revision; read it again
    ├── ResourceExhausted           a limit of the server is reached, such as of its queue; see `retry_after`
    ├── DeadlineExceeded            no response in time; a write may have happened
    ├── Unavailable                 no server answers, or it cannot do the call now, as while it stops
    ├── Unauthenticated             the token is missing or wrong
    ├── PermissionDenied            the server or a proxy does not allow the call
    ├── Unimplemented               the server does not support the call; it is another version or index backend
    ├── Cancelled                   the call was cancelled, such as by `close()`
    ├── DataLoss                    a record or the word index of a collection is damaged on the server's disk
    └── Internal                    an error in the server or in gRPC, or a response that contradicts itself
    InputError(ValueError)          an argument is wrong, and was not sent
    InputTypeError(TypeError)       an argument has the wrong type, and was not sent
    FilterWarning(UserWarning)      a warning: a filter matches no record and is probably a mistake

The `__cause__` of an EmberpcError, if it is not None, is the error behind it, mostly of gRPC.
"""

from __future__ import annotations

# The classes are named after gRPC's status codes, which callers know.
# ruff: noqa: N818
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from emberpc.client._core.server_words import python_words, renumber
from emberpc.v1 import errors_pb2
from emberpc.wire import status as wire_status


@dataclass(frozen=True)
class Violation:
    """A wrong field of a request.

    Attributes:
        field: path of the field, such as `texts[3]`. The index is that of the item in the caller's list. For an item of
            a stream that failed alone: path in this item. Empty: the whole item is wrong, or the description states how
            many wrong fields are not listed.
        description: what is wrong with the field, mostly with the remedy.
    """

    field: str
    description: str


class EmberpcError(Exception):
    """A call, or one item of a stream, failed. A status code without a class of its own raises this class itself.

    Attributes:
        message: what went wrong, for a developer.
        code: the gRPC status code.
        reason: the cause for programs, such as `MODEL_NOT_FOUND`; empty if none was stated.
        violations: wrong fields of the request; empty if the server stated none.
        metadata: values that the message mentions, by name, such as the name of the missing model.
        request_id: id of the call, under which the server logs an Internal; empty if no server stated an id.
        retry_after: seconds to wait before the next try; None if the server stated none.
        done: for a write of several requests: number of items, from the start of the caller's list, that earlier
            requests wrote or deleted; otherwise 0.
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
    """The request is wrong; `violations` names the wrong fields, if the server stated them."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(EmberpcError):
    """The server has no model, classifier, collection, record or service with the name or id of the request."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(EmberpcError):
    """The name of the new model or collection is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(EmberpcError):
    """The state of the server or the client does not allow the call.

    For example, the named model does not embed texts, or another event loop uses the AsyncClient.
    """

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(EmberpcError):
    """A record is missing or has another revision than `expected_revisions` of `upsert` states: read it again."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(EmberpcError):
    """A limit is reached, for example of the queue, the disk, the calls at a time, or the bytes of a message.

    Also raised if the server estimates that it cannot finish the call within its timeout.

    If the limit is reached only for a while, `retry_after` states when to retry. Otherwise it is None.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DeadlineExceeded(EmberpcError):
    """No response arrived within the timeout, or a backup or restore waited too long for the caller's side.

    A write may have happened.
    """

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(EmberpcError):
    """No server answers at the target, the connection broke, or the server cannot do the call now.

    The server cannot, for example, while it stops, if it does not reach Milvus, or if the collection was deleted during
    the call. If the connection broke, a write may have happened.
    """

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(EmberpcError):
    """The bearer token of the call is missing or wrong. A proxy says this, since the server itself checks no token."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(EmberpcError):
    """The server does not allow callers to change its models, or a proxy does not allow the call with this token."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(EmberpcError):
    """The server does not support the call or a feature that it uses: another version, or another index backend."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Cancelled(EmberpcError):
    """The call was cancelled, for example because `close()` of the client was called."""

    code = grpc.StatusCode.CANCELLED


class DataLoss(EmberpcError):
    """A record, or the word index of a collection, is damaged on the server's disk; the message states the remedy.

    Delete a damaged record or write it again. The server rebuilds a damaged word index by itself: search again later.
    """

    code = grpc.StatusCode.DATA_LOSS


class Internal(EmberpcError):
    """An error in the server, whose log has the `request_id`; an error of gRPC; or a response that contradicts itself.

    For example, a response has another number of items than the request, or a stream ended before it was answered.
    """

    code = grpc.StatusCode.INTERNAL


class FilterWarning(UserWarning):
    """A filter matches no record and is probably a mistake.

    For example, the filter compares a field with a number, and the records have only strings in this field.
    """


class InputError(ValueError):
    """An argument, or an item of it, is wrong. The message names it, mostly with the remedy.

    The item was not sent. Nothing else was sent either, except earlier records of `upsert` and other items of a stream.
    """


class InputTypeError(TypeError):
    """An argument, or an item of it, has the wrong type. The message names it, mostly with the remedy.

    The item was not sent. Nothing else was sent either, except earlier records of `upsert` and other items of a stream.
    """


def add_done(error: EmberpcError | InputError | InputTypeError, done: int, words: str) -> None:
    """Change an error in place: append "; " and `words` to its message, and set its `done`.

    Args:
        error: the error. An InputError or InputTypeError has no `done`, so only its message changes.
        done: number of items, from the start of the caller's list, that earlier requests wrote or deleted.
        words: the addition to the message.
    """
    message = f"{error}; {words}"
    error.args = (message,)
    if isinstance(error, EmberpcError):
        error.message = message
        error.done = done


_BY_CODE: dict[grpc.StatusCode, type[EmberpcError]] = {kind.code: kind for kind in EmberpcError.__subclasses__()}
#: Part of gRPC's message if the server refused a call because too many calls are open on one connection.
_REFUSED_STREAM = "RST_STREAM with error code 7"
#: Matches gRPC's message if the host name of the target cannot be resolved to an address.
_UNKNOWN_HOST = re.compile(r"address lookup failed|DNS resolution failed")
#: gRPC's status codes by their numbers on the wire.
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class RpcFailure(Protocol):
    """A failed call of `grpc` or `grpc.aio`."""

    def code(self) -> grpc.StatusCode | None:
        """Return the status code of the failed call; None if there is none."""

    def details(self) -> str | None:
        """Return gRPC's message about the failure; None if there is none."""

    def trailing_metadata(self) -> Any:
        """Return the trailing metadata of the call: an iterable of pairs of a key and a str or bytes, or None."""


#: `reason` of the error for a request that is larger than the server's limit. gRPC refuses the request and states no
#: reason, so the client sets this reason.
REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
#: Part of gRPC's message for a request that is larger than the server's limit: bytes of the request, and the limit.
#: The message cannot be about a response, since this client accepts responses of any size. Exception: over the caller's
#: own channel, gRPC refuses responses of more than 4 MiB with such a message, unless the channel has another limit.
_TOO_LARGE = re.compile(r"larger than max \((\d+) vs\. (\d+)\)")


@dataclass(frozen=True)
class Circumstances:
    """Facts about a failed call, for error messages.

    Attributes:
        target: gRPC's name of the server, such as `localhost:50051`.
        method: path of the RPC.
        timeout: seconds that the call was allowed to take, or a stream to have no result.
        items: name of the repeated field of the request that has one part of the caller's list; empty: there is no
            list.
        first: the caller's index of the first item of this part.
        vector: the caller's name of the vector of an item; see `Call.vector`.
        late: whether the last try of the call ran for more than 5 seconds, so that it is not repeated; False for
            streams.
    """

    target: str
    method: str
    timeout: float
    items: str = ""
    first: int = 0
    vector: str = ""
    late: bool = False


def from_rpc(failure: RpcFailure, call: Circumstances) -> EmberpcError:
    """Convert a gRPC error to an EmberpcError, and return it.

    The server names an item by its index in one request, such as `texts[3]`. The returned error names the item by its
    index in the caller's list. An error that gRPC itself or a proxy made gets the message of `_client_message`.

    Args:
        failure: the error of gRPC.
        call: facts about the failed call.
    """
    code = failure.code() or grpc.StatusCode.UNKNOWN
    # In older versions of grpc, the metadata of asyncio calls iterates over pairs, but dict() would treat the metadata
    # as a mapping. A tuple of the pairs avoids that.
    trailing: dict[str, str | bytes] = dict(tuple(failure.trailing_metadata() or ()))
    packed = trailing.get(wire_status.DETAILS_KEY, b"")
    status = wire_status.unpack(packed if isinstance(packed, bytes) else packed.encode())
    message = failure.details() or ""
    # Every error of an emberpc server has details, except those of its health service. Any other error without details
    # comes from gRPC itself or from a proxy.
    if not status.details:
        message = _client_message(code, message, call)
    request_id = trailing.get(wire_status.REQUEST_ID_KEY, "")
    error = _error(
        code,
        message,
        status,
        request_id if isinstance(request_id, str) else "",
        lambda text: renumber(text, call.items, call.first, call.vector),
    )
    refused = not status.details and code is grpc.StatusCode.RESOURCE_EXHAUSTED
    if refused and (sizes := _TOO_LARGE.search(failure.details() or "")):
        error.reason, error.metadata = REQUEST_TOO_LARGE, {"limit": sizes[2]}
    pushback = trailing.get(wire_status.PUSHBACK_KEY, "")
    if error.retry_after is None and isinstance(pushback, str) and pushback.isdecimal():
        error.retry_after = int(pushback) / 1000
    return error


def from_status(status: errors_pb2.ErrorStatus) -> EmberpcError:
    """Convert the error of one item of a stream, as a response states it, to an EmberpcError, and return it.

    Paths of fields stay unchanged: they start at the item.
    """
    request = wire_status.detail(status, errors_pb2.RequestInfo)
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, status, request.request_id if request else "", lambda text: text)


def no_response(call: Circumstances) -> DeadlineExceeded:
    """Return the error for a stream that had no result within its timeout; `call` has facts for the message."""
    return DeadlineExceeded(_client_message(grpc.StatusCode.DEADLINE_EXCEEDED, "", call))


def _error(
    code: grpc.StatusCode,
    message: str,
    status: errors_pb2.ErrorStatus,
    request_id: str,
    rename: Callable[[str], str],
) -> EmberpcError:
    """Build the exception for a status code, a message and the details of `status`; details may be missing.

    `rename` replaces, in the message and the violations, the index of an item in the request by its index in the
    caller's list. A code without a class of its own gives EmberpcError.
    """
    info = wire_status.detail(status, errors_pb2.ErrorInfo) or errors_pb2.ErrorInfo()
    bad_request = wire_status.detail(status, errors_pb2.BadRequest) or errors_pb2.BadRequest()
    retry = wire_status.detail(status, errors_pb2.RetryInfo)
    return _BY_CODE.get(code, EmberpcError)(
        python_words(rename(message)),
        code=code,
        reason=info.reason,
        violations=[
            Violation(rename(violation.field), python_words(rename(violation.description)))
            for violation in bad_request.field_violations
        ],
        metadata=info.metadata,
        request_id=request_id,
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


def _client_message(code: grpc.StatusCode, details: str, call: Circumstances) -> str:
    """Return a message for a status that gRPC or a proxy set; `details` is the message that came with the status.

    UNAVAILABLE, DEADLINE_EXCEEDED, UNIMPLEMENTED, and RESOURCE_EXHAUSTED for a request that is too large, get a message
    of the client. For any other status, `details` is returned, or if it is empty, a message with the names of method
    and code.
    """
    if code is grpc.StatusCode.UNAVAILABLE and call.late:
        return (
            f"the connection to {call.target} broke while {call.method} was running; it was not repeated, since its "
            "work may be long: see what was done, and repeat it"
        )
    if code is grpc.StatusCode.UNAVAILABLE and _REFUSED_STREAM in details:
        return (
            f"the server at {call.target} refused {call.method}, since too many calls are under way on one connection; "
            "start fewer at a time, or use several clients"
        )
    if code is grpc.StatusCode.UNAVAILABLE and _UNKNOWN_HOST.search(details):
        return (
            f"the host name in {call.target} has no address; check its spelling, and that this host can reach its DNS "
            "server"
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"no emberpc server answers at {call.target}; start a server there (`emberpc serve`) or give the address "
            "of another server, and check that both sides use TLS or neither does"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no response from {call.target} within {call.timeout:g} s; give a longer timeout, or send less at once"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server at {call.target} does not know {call.method}; it is no emberpc server, or another version"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and (sizes := _TOO_LARGE.search(details)):
        return (
            f"the request has {sizes[1]} bytes, and the server at {call.target} takes at most {sizes[2]} bytes in a "
            "request; send less in a request, or start the server with a higher --max-message-bytes"
        )
    return details or f"{call.method} ended with {code.name}"
