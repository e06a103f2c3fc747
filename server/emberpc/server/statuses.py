"""How an error of the server becomes what its caller is told, for a whole call or for one item of a stream."""

from __future__ import annotations

from google.protobuf.message import Message

from emberpc.server.errors import Code, ServiceError
from emberpc.v1 import errors_pb2
from emberpc.wire import status


def status_of(error: ServiceError, request_id: str) -> errors_pb2.ErrorStatus:
    """Return an error in the form that travels, with its details and the request id that finds it in the log."""
    message = error.message
    if error.code is Code.INTERNAL:
        message = f"{message}; its log tells more under request id {request_id}"
    return status.make(error.code.value, message, _details(error, request_id))


def _details(error: ServiceError, request_id: str) -> list[Message]:
    details: list[Message] = [
        errors_pb2.ErrorInfo(reason=error.reason, domain="emberpc", metadata=error.metadata),
        errors_pb2.RequestInfo(request_id=request_id),
    ]
    if error.violations:
        details.append(
            errors_pb2.BadRequest(
                field_violations=[
                    errors_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
                    for violation in error.violations
                ]
            )
        )
    if error.retry_after is not None:
        retry = errors_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    return details
