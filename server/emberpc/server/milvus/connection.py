"""The connection to Milvus: every RPC has a time limit, and failures become `ServiceError`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from pymilvus import MilvusClient, MilvusException

from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: Limit of the seconds of an attempt to connect to Milvus, at the start of the server and after a lost connection.
_CONNECT_SECONDS = 5.0
#: Limit of the seconds of one RPC to Milvus; a method of `MilvusClient` may need several. The limit is set on the gRPC
#: channel: as the argument `timeout` of a method, pymilvus would take it as the time for which to retry an RPC that
#: cannot reach Milvus.
_CALL_SECONDS = 120
_OPTIONS = {
    "grpc.service_config": json.dumps({"methodConfig": [{"name": [{}], "timeout": f"{_CALL_SECONDS}s"}]}),
    # Without this, gRPC delays a new connection to an address after another connection to that address has failed.
    "grpc.use_local_subchannel_pool": 1,
    # No HTTP/2 pings while there are no calls: Milvus may close a connection on which it gets too many pings.
    "grpc.keepalive_permit_without_calls": 0,
}
#: Number of retries of an RPC whose error pymilvus retries. If Milvus cannot be reached, pymilvus connects again before
#: a retry. By default pymilvus retries 75 times.
_RETRIES = 1
#: Seconds after which a caller may retry a call that failed because Milvus was not reached, not ready, slow or busy.
_BACK_SECONDS = 2.0


@dataclass(frozen=True)
class _Failure:
    """How a failure of Milvus is reported to the caller of emberpc.

    Attributes:
        code: status code of the `ServiceError`.
        reason: reason of the `ServiceError`, for programs.
        said: the message, which follows the name of the operation.
        retry_after: seconds after which the caller may retry; None: no time is stated.
    """

    code: Code
    reason: str
    said: str
    retry_after: float | None = None


_UNREACHABLE = _Failure(
    Code.UNAVAILABLE, "MILVUS_UNAVAILABLE", "Milvus cannot be reached or is not ready; try again", _BACK_SECONDS
)
_SLOW = _Failure(
    Code.UNAVAILABLE, "MILVUS_TIMEOUT", f"Milvus did not answer within {_CALL_SECONDS} s; try again", _BACK_SECONDS
)
_BUSY = _Failure(Code.RESOURCE_EXHAUSTED, "MILVUS_BUSY", "Milvus has too much to do; try again later", _BACK_SECONDS)
_FULL = _Failure(
    Code.RESOURCE_EXHAUSTED,
    "MILVUS_FULL",
    "Milvus has no memory, disk or quota left; free some, or raise its limits",
)
_TOO_LARGE = _Failure(
    Code.RESOURCE_EXHAUSTED, "MILVUS_MESSAGE_TOO_LARGE", "the message is too large for Milvus; ask for or send less"
)
_REFUSED = _Failure(
    Code.FAILED_PRECONDITION,
    "MILVUS_ACCESS",
    "Milvus does not let this server in, or not do this; see to --milvus-token and its rights",
)
_GONE = _Failure(
    Code.NOT_FOUND, "COLLECTION_NOT_FOUND", "the collection is gone, deleted by another server; create it again"
)
NOT_LOADED = "MILVUS_NOT_LOADED"
_UNLOADED = _Failure(Code.UNAVAILABLE, NOT_LOADED, "Milvus has not loaded the collection yet; try again", _BACK_SECONDS)
_UNKNOWN = _Failure(Code.INTERNAL, "MILVUS_FAILED", "Milvus failed")

#: Failures by error code: gRPC's status codes, and Milvus's own codes (numbers). `_failure` says what becomes of errors
#: with other codes.
_FAILURES: dict[object, _Failure] = {
    grpc.StatusCode.UNAVAILABLE: _UNREACHABLE,
    grpc.StatusCode.CANCELLED: _UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: _SLOW,
    grpc.StatusCode.RESOURCE_EXHAUSTED: _TOO_LARGE,
    grpc.StatusCode.UNAUTHENTICATED: _REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: _REFUSED,
    2: _UNREACHABLE,  # also pymilvus's code for a connection that cannot be opened
    3: _FULL,
    4: _BUSY,
    7: _FULL,
    8: _BUSY,
    9: _FULL,
    100: _GONE,
    101: _UNLOADED,
    102: _FULL,
    103: _UNLOADED,
    1400: _REFUSED,
    1401: _REFUSED,
}


class Connection:
    """A connection to Milvus. A call connects again if the connection was lost. Safe to use from several threads.

    Args:
        uri: address of Milvus, such as `http://milvus:19530`, or `https://…` for TLS. The path, if there is one, is the
            name of a database.
        token: `user:password` or an API key; empty: Milvus requires neither.

    Raises:
        ServiceError: UNAVAILABLE if Milvus cannot be reached, FAILED_PRECONDITION if it refuses access, or another
            error as `translated` states.
    """

    def __init__(self, uri: str, token: str = "") -> None:
        # Without this, pymilvus logs each failure with its stack. `translated` logs each failure once.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        with translated("connecting"):
            self._client: Any = MilvusClient(
                uri=uri, token=token, timeout=_CONNECT_SECONDS, dedicated=True, grpc_options=_OPTIONS
            )
        self._closed = False

    def call(self, doing: str, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient` and return its result.

        `load_collection` and `create_index` wait until Milvus has finished, without a limit.

        Args:
            doing: name of the operation in error messages and in the log.
            method: name of the method.
            arguments: arguments of the method.

        Raises:
            ServiceError: UNAVAILABLE if the connection is closed, Milvus cannot be reached, or an RPC is not answered
                within 120 s; for other failures the error that `translated` states.
        """
        if self._closed:
            raise ServiceError(Code.UNAVAILABLE, "the index is closed; try again", reason="CLOSED")
        with translated(doing):
            return getattr(self._client, method)(**arguments, retry_times=_RETRIES)

    def close(self) -> None:
        """Close the connection; later calls fail with UNAVAILABLE. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._client.close()


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Context manager: translate an error of pymilvus or gRPC in the block to a `ServiceError`, and log the original.

    Args:
        doing: name of the operation in the message of the error and in the log.

    Raises:
        ServiceError: by the result of `_failure`: the error that `_FAILURES` has for a code, UNAVAILABLE for an error
            that is `retriable` and has another code, else INTERNAL.
    """
    try:
        yield
    except (MilvusException, grpc.RpcError) as error:
        failure = _failure(error)
        if failure is _UNKNOWN:
            log.exception("%s: Milvus failed", doing)
        else:
            log.warning("%s: Milvus failed: %s", doing, error)
        raise ServiceError(
            failure.code, f"{doing}: {failure.said}", reason=failure.reason, retry_after=failure.retry_after
        ) from error


def _failure(error: MilvusException | grpc.RpcError) -> _Failure:
    """Return the failure for an error or, since some errors of pymilvus have no code of their own, for its causes.

    The errors are read in this order: the error, its cause, the cause's cause, and so on. The first one decides that
    has a code in `_FAILURES`, or that is `retriable`: pymilvus states that a retry may help. A retriable error without
    such a code is `_UNREACHABLE`. If no error decides, the failure is `_UNKNOWN`.
    """
    cause: BaseException | None = error
    seen = set[int]()  # the causes of an error that pymilvus raises again can lead back to it
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        code = cause.code() if isinstance(cause, grpc.RpcError) and callable(cause.code) else getattr(cause, "code", 0)
        if code in _FAILURES:
            return _FAILURES[code]
        if getattr(cause, "retriable", False):
            return _UNREACHABLE
        cause = cause.__cause__ or cause.__context__
    return _UNKNOWN
