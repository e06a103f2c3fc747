"""What the services ask of every request, and how its fields become the engine's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any, TypeAlias

import grpc.aio

from emberpc.bundle import Prompts
from emberpc.server.engine import Caller, Lane, Truncation
from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields, response_too_large
from emberpc.server.paging import MAX_PAGE_SIZE
from emberpc.v1 import types_pb2
from emberpc.wire import status

DEFAULT_PAGE_SIZE = 100
#: Queries of one Search, and hits of all of them together.
MAX_QUERIES = 1000
MAX_HITS = 100_000
#: Ids of one BatchGetRecords or DeleteRecords.
MAX_IDS = 10_000
#: Parts of a record that a request names; there are three.
MAX_PARTS = 100

#: gRPC's view of a call; the services need none of its type parameters.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_TRUNCATIONS: dict[types_pb2.Truncation.ValueType, Truncation] = {
    types_pb2.TRUNCATION_REFUSE: Truncation.REFUSE,
    types_pb2.TRUNCATION_END: Truncation.END,
    types_pb2.TRUNCATION_START: Truncation.START,
}
_LANES: dict[types_pb2.Priority.ValueType, Lane | None] = {
    types_pb2.PRIORITY_UNSPECIFIED: None,
    types_pb2.PRIORITY_INTERACTIVE: Lane.INTERACTIVE,
    types_pb2.PRIORITY_BULK: Lane.BULK,
}


@dataclass(frozen=True)
class Limits:
    """How large a call may be.

    Attributes:
        max_texts: texts or records of a call.
        max_text_bytes: bytes (UTF-8) of a text.
        max_message_bytes: bytes of a request.
        max_response_bytes: bytes of a response.
        max_queue_tokens: tokens that may wait for inference.
        max_collections: collections of the server.
    """

    max_texts: int
    max_text_bytes: int
    max_message_bytes: int
    max_response_bytes: int
    max_queue_tokens: int
    max_collections: int = 10_000

    @property
    def counts(self) -> dict[str, int]:
        """Most elements of a repeated field of a request, by its name."""
        return {
            **dict.fromkeys(("texts", "records", "items", "sources", "targets", "expected_revisions"), self.max_texts),
            "ids": MAX_IDS,
            "queries": MAX_QUERIES,
            "parts": MAX_PARTS,
        }

    def check_response(self, size: int, remedy: str) -> None:
        """Raise RESOURCE_EXHAUSTED if a response of `size` bytes would be over the limit."""
        if size > self.max_response_bytes:
            raise response_too_large(self.max_response_bytes, remedy)

    def check_count(self, count: int, field: str, what: str) -> None:
        """Raise INVALID_ARGUMENT unless there is at least one item and at most the limit."""
        if not count:
            raise invalid(field, f"is empty; give at least one {what}")
        if count > self.max_texts:
            raise invalid(field, f"has {count} {what}s, a call takes at most {self.max_texts}; split it")

    def check_texts(self, texts: Sequence[str], path: FieldPath, *, allow_empty: bool = False) -> None:
        """Raise INVALID_ARGUMENT, naming each text that is empty or too long.

        Args:
            texts: the texts.
            path: what the request calls text i.
            allow_empty: whether a text may be empty.
        """
        violations = []
        for i, text in enumerate(texts):
            if not allow_empty and (not text or text.isspace()):
                violations.append(Violation(path(i), "is empty; leave it out or give it some text"))
            # A character has at most four bytes: most texts need not be encoded to be known to be short enough.
            elif len(text) * 4 > self.max_text_bytes and (size := len(text.encode())) > self.max_text_bytes:
                description = f"has {size} bytes, a text may have at most {self.max_text_bytes}; split it"
                violations.append(Violation(path(i), description))
        if violations:
            raise invalid_fields(violations)


def request_id(context: Context) -> str:
    """Return the id under which a call is logged, as the interceptor gave it."""
    given = dict(tuple(context.trailing_metadata() or ()))
    return str(given.get(status.REQUEST_ID_KEY, ""))


def caller(
    context: Context,
    priority: types_pb2.Priority.ValueType = types_pb2.PRIORITY_UNSPECIFIED,
    default: Lane = Lane.INTERACTIVE,
    field: str = "priority",
) -> Caller:
    """Say whose call it is, how urgent, and until when it is wanted.

    Raises:
        ServiceError: INVALID_ARGUMENT for a priority that this server does not know.
    """
    check_priority(priority, field)
    lane, left = _LANES[priority], context.time_remaining()
    return Caller(context.peer(), default if lane is None else lane, perf_counter() + left if left is not None else inf)


def check_priority(priority: types_pb2.Priority.ValueType, field: str = "priority") -> None:
    """Raise INVALID_ARGUMENT for a priority that this server does not know."""
    if priority not in _LANES:
        raise invalid(field, f"is {priority}, which is no Priority; use INTERACTIVE or BULK")


def truncation(
    value: types_pb2.Truncation.ValueType, field: str = "truncation", default: Truncation = Truncation.REFUSE
) -> Truncation:
    """Return the engine's term for a truncation; `default` if it is not set.

    Raises:
        ServiceError: INVALID_ARGUMENT for a value that this server does not know.
    """
    if value == types_pb2.TRUNCATION_UNSPECIFIED:
        return default
    if value not in _TRUNCATIONS:
        raise invalid(field, f"is {value}, which is no Truncation; use REFUSE, END or START")
    return _TRUNCATIONS[value]


def prompt(
    prompts: Prompts,
    kind: types_pb2.InputKind.ValueType,
    field: str = "input_kind",
) -> str:
    """Return what goes before a text of a kind; the default is PASSAGE.

    Raises:
        ServiceError: INVALID_ARGUMENT for a kind that this server does not know.
    """
    if kind == types_pb2.INPUT_KIND_QUERY:
        return prompts.query
    if kind in (types_pb2.INPUT_KIND_PASSAGE, types_pb2.INPUT_KIND_UNSPECIFIED):
        return prompts.passage
    raise invalid(field, f"is {kind}, which is no InputKind; use QUERY or PASSAGE")


def page_size(value: int) -> int:
    """Return the number of items of a page.

    Raises:
        ServiceError: INVALID_ARGUMENT if it is negative or above 1000.
    """
    if not 0 <= value <= MAX_PAGE_SIZE:
        raise invalid("page_size", f"is {value}; it must be 0 (for {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}")
    return value or DEFAULT_PAGE_SIZE
