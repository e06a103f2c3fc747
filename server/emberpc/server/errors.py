"""The error types of the server: of a call, and of a start.

Engine, index and services raise `ServiceError`; `statuses` says how it travels,
and only `handlers` ends a call with it. Its message is for the caller: it names the item, the limit
and the remedy, and never holds the text of another exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

#: Gives the path of item i of a request, such as `texts[3]`.
FieldPath = Callable[[int], str]


class Code(Enum):
    """Why a call failed; the values are gRPC's status codes."""

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
    """The server cannot start; the message says why and the remedy."""


@dataclass(frozen=True)
class Violation:
    """A wrong field of a request: its path, such as `texts[3]`, and what is wrong with it."""

    field: str
    description: str


class ServiceError(Exception):
    """A call that failed, with all that its caller is told.

    Args:
        code: why, by gRPC's codes.
        message: what went wrong, in one sentence for a developer.
        reason: the cause for programs, in UPPER_SNAKE_CASE.
        violations: the wrong fields of the request.
        metadata: values behind the message, for programs.
        retry_after: seconds to wait before trying again, if trying again can help.
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
    """Return the paths of the items of a repeated field, or of a part of each item, such as `records[3].text`."""
    suffix = f".{part}" if part else ""
    return lambda i: f"{field}[{i}]{suffix}"


def invalid(field: str, description: str) -> ServiceError:
    """Return an INVALID_ARGUMENT error about one field of the request."""
    return invalid_fields([Violation(field, description)])


def invalid_fields(violations: Sequence[Violation]) -> ServiceError:
    """Return an INVALID_ARGUMENT error about several fields; the message is about the first."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return ServiceError(
        Code.INVALID_ARGUMENT,
        f"{first.field}: {first.description}{more}",
        reason="INVALID_FIELD",
        violations=violations,
    )


def response_too_large(limit: int, remedy: str) -> ServiceError:
    """Return the RESOURCE_EXHAUSTED error for a response over a limit in bytes."""
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        f"the response would have more than {limit} bytes (the server's max_response_bytes); {remedy}",
        reason="RESPONSE_TOO_LARGE",
        metadata={"max_response_bytes": str(limit)},
    )


def not_found(kind: str, name: str, remedy: str) -> ServiceError:
    """Return a NOT_FOUND error about a thing of a kind, such as `model`."""
    return ServiceError(
        Code.NOT_FOUND,
        f"there is no {kind} {name!r}; {remedy}",
        reason=f"{kind.upper()}_NOT_FOUND",
        metadata={kind: name},
    )
