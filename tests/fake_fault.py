"""Errors that the fake server answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message

from emberpc.v1 import errors_pb2
from emberpc.wire import status


@dataclass(frozen=True)
class Fault:
    """A failure of a call. Without a reason, the call fails as with an error of gRPC itself, without details."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    violations: Sequence[tuple[str, str]] = ()
    retry_after: float | None = None
    pushback_ms: int | None = None

    @staticmethod
    def status_of(message: str) -> errors_pb2.ErrorStatus:
        """Return the status of one invalid text in a stream."""
        info = errors_pb2.ErrorInfo(reason="INVALID_FIELD", domain="emberpc")
        return status.make(grpc.StatusCode.INVALID_ARGUMENT.value[0], message, [info])

    def end(self, context: grpc.ServicerContext) -> None:
        """End a call with this failure, in the form of the real server."""
        metadata: list[tuple[str, str | bytes]] = []
        if self.pushback_ms is not None:
            metadata.append((status.PUSHBACK_KEY, str(self.pushback_ms)))
        if self.reason:
            details: list[Message] = [
                errors_pb2.ErrorInfo(reason=self.reason, domain="emberpc", metadata={"key": "value"}),
                errors_pb2.RequestInfo(request_id="request-7"),
                errors_pb2.BadRequest(
                    field_violations=[
                        errors_pb2.BadRequest.FieldViolation(field=path, description=description)
                        for path, description in self.violations
                    ]
                ),
            ]
            if self.retry_after is not None:
                retry = errors_pb2.RetryInfo()
                retry.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
                details.append(retry)
            metadata += [
                (status.DETAILS_KEY, status.make(self.code.value[0], self.message, details).SerializeToString()),
                (status.REQUEST_ID_KEY, "request-7"),
            ]
        context.set_trailing_metadata(tuple(metadata))
        context.abort(self.code, self.message)
