"""Error types of the server: for a failed call, and for a failed start.

Engine, index and services raise `ServiceError`. The module `statuses` converts the error to
a gRPC status, and the module `handlers` ends a call with that status. (Only a backup whose
caller stalls is ended elsewhere, in `services.backups`.) The message is for the caller:
it names the item, and the limit and the remedy if there are any. The text of a library's
exception belongs in the log, not in the message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

#: Type of a function that returns the path of item i of a repeated field in the request, such as `texts[3]`.
FieldPath = Callable[[int], str]


class Code(Enum):
    """Kind of the error of a failed call: those of gRPC's status codes that the server uses, with gRPC's numbers."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15


class StartupError(Exception):
    """The server cannot start. The message names the cause, and the remedy if there is one."""


@dataclass(frozen=True)
class Violation:
    """An invalid field of a request.

    Attributes:
        field: path of the field in the request, such as `texts[3]`; the name of the request's type if the request as a
            whole has too many elements.
        description: the problem, and the limit and the remedy if there are any. It begins with a verb, since the
            message of the error is the field followed by the description, such as `texts[3] is empty`.
    """

    field: str
    description: str


class ServiceError(Exception):
    """Error that ends a call, or fails one item of a stream, with all that the caller receives about it.

    Args:
        code: the gRPC status code.
        message: the problem, and the remedy if there is one, for a developer.
        reason: the cause for programs, in UPPER_SNAKE_CASE; empty: the name of the code.
        violations: the invalid fields of the request.
        metadata: values of the message by name, for programs.
        retry_after: seconds that the caller should wait before a retry; None: the caller is not asked to retry.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason or code.name
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


def items_of(field: str, part: str = "") -> FieldPath:
    """Return a function that returns the path of item i of a repeated field, for errors; i starts at 0.

    Args:
        field: name of the repeated field, such as `texts`: the path of item 3 is `texts[3]`.
        part: name of a field of each item, such as `text`: the path for item 3 of `records` is `records[3].text`.
            Empty: the path is that of the item.
    """
    suffix = f".{part}" if part else ""
    return lambda i: f"{field}[{i}]{suffix}"


def invalid(field: str, description: str) -> ServiceError:
    """Return an INVALID_ARGUMENT error about one field; the arguments are those of `Violation`."""
    return invalid_fields([Violation(field, description)])


def invalid_fields(violations: Sequence[Violation]) -> ServiceError:
    """Return an INVALID_ARGUMENT error, with the reason INVALID_FIELD, about one or more fields.

    The message describes the first violation and, if there are more, states the number of the others.
    """
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return ServiceError(
        Code.INVALID_ARGUMENT,
        f"{first.field} {first.description}{more}",
        reason="INVALID_FIELD",
        violations=violations,
    )


def response_too_large(limit: int, remedy: str) -> ServiceError:
    """Return the RESOURCE_EXHAUSTED error for a response with more than `limit` bytes; `remedy` ends the message."""
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        f"the response would have more than {limit} bytes (the server's max_response_bytes); {remedy}",
        reason="RESPONSE_TOO_LARGE",
        metadata={"max_response_bytes": str(limit)},
    )


def not_found(kind: str, name: str, remedy: str) -> ServiceError:
    """Return the NOT_FOUND error for a missing item, such as a model.

    Args:
        kind: type of the item, such as `model`; the error's reason is `MODEL_NOT_FOUND` then.
        name: name of the item.
        remedy: what the caller can do, as the end of the message.
    """
    return ServiceError(
        Code.NOT_FOUND,
        f"there is no {kind} {name!r}; {remedy}",
        reason=f"{kind.upper()}_NOT_FOUND",
        metadata={kind: name},
    )
