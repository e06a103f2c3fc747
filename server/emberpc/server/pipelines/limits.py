"""Limits of a call: how many items, how long texts, how large a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields, response_too_large

#: Queries of one Search, and hits of all its queries together.
MAX_QUERIES = 1000
MAX_HITS = 100_000
#: Ids of one BatchGetRecords or DeleteRecords.
MAX_IDS = 10_000
#: Items of the field `parts` of a request. Only three values exist.
MAX_PARTS = 100
#: Conditions and values of memberships of all filters of a request. `collections.filters` has the limits of a filter.
MAX_REQUEST_CONDITIONS = 2_000
MAX_REQUEST_VALUES = 50_000


@dataclass(frozen=True)
class Limits:
    """Limits of a call that the server's settings set.

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
        """Return the limit of the elements of each repeated field of a request, by the field's name."""
        return {
            **dict.fromkeys(("texts", "records", "items", "sources", "targets", "expected_revisions"), self.max_texts),
            "ids": MAX_IDS,
            "queries": MAX_QUERIES,
            "parts": MAX_PARTS,
        }

    def check_response(self, size: int, remedy: str) -> None:
        """Raise RESOURCE_EXHAUSTED if a response of `size` bytes is over the limit; the error names the remedy."""
        if size > self.max_response_bytes:
            raise response_too_large(self.max_response_bytes, remedy)

    def check_count(self, count: int, field: str, item: str) -> None:
        """Raise INVALID_ARGUMENT unless a field has at least one item and at most `max_texts`.

        Args:
            count: number of items.
            field: path of the field in the request.
            item: name of an item for the message, such as `text`.
        """
        if not count:
            raise invalid(field, f"is empty; give at least one {item}")
        if count > self.max_texts:
            raise invalid(field, f"has {count} {item}s, a call takes at most {self.max_texts}; split it")

    def check_ids(self, count: int) -> None:
        """Raise INVALID_ARGUMENT unless the field `ids` has 1 to `MAX_IDS` items."""
        if not 1 <= count <= MAX_IDS:
            raise invalid("ids", f"has {count} ids; it must have 1 to {MAX_IDS}")

    def check_texts(self, texts: Sequence[str], path: FieldPath, *, allow_empty: bool = False) -> None:
        """Raise INVALID_ARGUMENT, naming each text that is empty or too long.

        Args:
            texts: the texts.
            path: returns the path of text i in the request.
            allow_empty: whether a text may be empty.
        """
        violations = [
            Violation(path(i), problem)
            for i, text in enumerate(texts)
            if (problem := self.text_problem(text, allow_empty=allow_empty))
        ]
        if violations:
            raise invalid_fields(violations)

    def text_problem(self, text: str, *, allow_empty: bool = False) -> str:
        """Return why a text is refused, for an error: it is empty or too long. Empty: it is not refused."""
        if not allow_empty and (not text or text.isspace()):
            return "is empty; leave it out or give it some text"
        # A character has at most four bytes (UTF-8), so most texts are short enough without being encoded.
        if len(text) * 4 > self.max_text_bytes and (size := len(text.encode())) > self.max_text_bytes:
            return f"has {size} bytes, a text may have at most {self.max_text_bytes}; split it"
        return ""
