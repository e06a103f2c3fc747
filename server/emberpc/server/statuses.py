"""Convert errors of the server to the status that callers receive, for a call or for one item of a stream."""

from __future__ import annotations

from google.protobuf.message import Message

from emberpc.server.errors import Code, ServiceError
from emberpc.v1 import errors_pb2
from emberpc.wire import status

# gRPC may drop a response whose trailing metadata has more than 8 KiB. An error's message is sent twice: as gRPC's
# status message, in which a byte may take three, and in the details, which base64 makes longer by a third. So with the
# limits below, a message of 600 bytes and about 2,900 bytes of other details take less than 7 KiB.
#: Limit of the bytes (UTF-8) of an error's message.
_MAX_MESSAGE = 600
#: Limit of the bytes of all field violations of an error together, serialized. The last item, which states how many
#: violations are left out, is not counted.
_MAX_VIOLATIONS = 2000
#: Limit of the bytes (UTF-8) of the path of one field violation, and the same limit of its description.
_MAX_VIOLATION = 400
#: Limit of the bytes (UTF-8) of one value of an error's metadata.
_MAX_VALUE = 200
#: Limit of the bytes (UTF-8) of all keys and values of an error's metadata together.
_MAX_METADATA = 600


def status_of(error: ServiceError, request_id: str) -> errors_pb2.ErrorStatus:
    """Convert an error to the status message of protobuf: code, message and details.

    The details are ErrorInfo and RequestInfo, BadRequest if the error has violations, and RetryInfo if it has a retry
    delay. Long texts are shortened, and violations and metadata above the limits are left out, so that gRPC can send
    the status. The message of an INTERNAL error also says that the log has more about the error under the request id.
    """
    message = error.message
    if error.code is Code.INTERNAL:
        message = f"{message}; the server's log has more under request id {request_id}"
    return status.make(error.code.value, _shortened(message, _MAX_MESSAGE), _details(error, request_id))


def _details(error: ServiceError, request_id: str) -> list[Message]:
    details: list[Message] = [
        errors_pb2.ErrorInfo(reason=error.reason, domain="emberpc", metadata=_metadata(error)),
        errors_pb2.RequestInfo(request_id=request_id),
    ]
    if error.violations:
        details.append(_bad_request(error))
    if error.retry_after is not None:
        retry = errors_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    return details


def _bad_request(error: ServiceError) -> errors_pb2.BadRequest:
    """Return the first field violations of an error that fit into 2,000 bytes together, and at least one.

    Path and description of each are shortened to 400 bytes. If violations are left out, a last item without a field
    states their number, in addition to the 2,000 bytes.
    """
    bad = errors_pb2.BadRequest()
    for i, violation in enumerate(error.violations):
        bad.field_violations.add(
            field=_shortened(violation.field, _MAX_VIOLATION),
            description=_shortened(violation.description, _MAX_VIOLATION),
        )
        if i and bad.ByteSize() > _MAX_VIOLATIONS:
            del bad.field_violations[i]
            bad.field_violations.add(description=f"{len(error.violations) - i} more violations are not listed")
            break
    return bad


def _metadata(error: ServiceError) -> dict[str, str]:
    """Return the first items of an error's metadata whose keys and values fit into 600 bytes together.

    Each value is shortened to 200 bytes before.
    """
    fitting, size = {}, 0
    for key, value in error.metadata.items():
        short = _shortened(value, _MAX_VALUE)
        size += len(key) + len(short.encode())
        if size > _MAX_METADATA:
            break
        fitting[key] = short
    return fitting


def _shortened(text: str, maximum: int) -> str:
    """Return a text of at most `maximum` bytes (UTF-8): the same text, or for a longer one its start, `…` and its end.

    The end is kept, since the remedy is at the end of a message.
    """
    # A character has at least one byte, so a text of more than `maximum` characters is too long. A longer text is not
    # encoded as a whole, since it may have megabytes.
    if len(text) <= maximum and len(text.encode(errors="replace")) <= maximum:
        return text
    half = (maximum - len("…".encode())) // 2
    head = text[:half].encode(errors="replace")[:half].decode(errors="ignore")
    tail = text[-half:].encode(errors="replace")[-half:].decode(errors="ignore")
    return f"{head}…{tail}"
