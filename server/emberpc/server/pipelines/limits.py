"""Limits of calls, such as the number of items, the bytes of a text and the bytes of a response, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields, response_too_large

#: Maximum number of queries of one Search.
MAX_QUERIES = 1000
#: Maximum number of hits of one Search. The sum of `top_k` of its queries is checked before the search.
MAX_HITS = 100_000
#: Maximum number of ids of one BatchGetRecords or DeleteRecords.
MAX_IDS = 10_000
#: Maximum number of items of the field `parts` of a request. Only three values are valid, so a longer list is an error
#: or an attack.
MAX_PARTS = 100
#: Maximum number of conditions of all filters of a request together. The limits of a single filter are in
#: `collections.filters`.
MAX_REQUEST_CONDITIONS = 2_000
#: Maximum number of values in the memberships of all filters of a request together. A membership is a condition that a
#: field equals one of several values.
MAX_REQUEST_VALUES = 50_000
#: What a caller can do about an empty text, as the end of a message: about a text of a list, and the text of a record.
_EMPTY_TEXT = "leave it out or give it some text"
EMPTY_RECORD = "give the record a text or a vector"


@dataclass(frozen=True)
class Limits:
    """The limits that the server's settings set.

    Attributes:
        max_texts: maximum number of texts or records of a call, or of one message of a stream.
        max_text_bytes: maximum number of bytes (UTF-8) of a text.
        max_message_bytes: maximum number of bytes of a request, or of one message of a stream of requests.
        max_response_bytes: maximum number of bytes of a response.
        max_queue_tokens: maximum number of tokens that may wait for a worker.
        max_collections: maximum number of collections of the server.
    """

    max_texts: int
    max_text_bytes: int
    max_message_bytes: int
    max_response_bytes: int
    max_queue_tokens: int
    max_collections: int = 10_000

    @property
    def counts(self) -> dict[str, int]:
        """Return the maximum number of items of the repeated fields that are directly in requests, by field name.

        Requests of 64 KiB or more are checked against these limits before they are decoded. Not included are
        repeated fields of messages inside requests, such as filters, and those of planned RPCs: for them
        `count_elements` has limits.
        """
        return {
            **dict.fromkeys(("texts", "records", "items", "sources", "targets", "expected_revisions"), self.max_texts),
            "ids": MAX_IDS,
            "queries": MAX_QUERIES,
            "parts": MAX_PARTS,
        }

    def check_response(self, size: int, remedy: str) -> None:
        """Raise RESOURCE_EXHAUSTED if `size`, the bytes of a response, is over the limit; `remedy` ends the message."""
        if size > self.max_response_bytes:
            raise response_too_large(self.max_response_bytes, remedy)

    def check_count(self, count: int, field: str, item: str) -> None:
        """Raise INVALID_ARGUMENT unless a field has 1 to `max_texts` items.

        Args:
            count: number of items.
            field: path of the field in the request.
            item: name of an item for the message, in the singular, such as `text`.
        """
        if not count:
            raise invalid(field, f"is empty; give at least one {item}")
        if count > self.max_texts:
            raise invalid(field, f"has {count} {item}s, a call takes at most {self.max_texts}; split it")

    def check_ids(self, count: int) -> None:
        """Raise INVALID_ARGUMENT, naming the field `ids`, unless `count`, its number of items, is 1 to 10,000."""
        if not 1 <= count <= MAX_IDS:
            raise invalid("ids", f"has {count} ids; it must have 1 to {MAX_IDS}")

    def check_texts(
        self, texts: Sequence[str], path: FieldPath, *, allow_empty: bool = False, remedy: str = _EMPTY_TEXT
    ) -> None:
        """Raise INVALID_ARGUMENT, naming each text that is empty or has too many bytes, if there is one.

        Args:
            texts: the texts.
            path: returns the path of text i in the request.
            allow_empty: whether a text may be empty. Otherwise it needs a character other than white space.
            remedy: what the caller can do about an empty text, as the end of the message.
        """
        violations = [
            Violation(path(i), problem)
            for i, text in enumerate(texts)
            if (problem := self.text_problem(text, allow_empty=allow_empty, remedy=remedy))
        ]
        if violations:
            raise invalid_fields(violations)

    def text_problem(self, text: str, *, allow_empty: bool = False, remedy: str = _EMPTY_TEXT) -> str:
        """Return the problem of a text that is empty or has too many bytes; an empty string for other texts.

        The problem follows the name of the field in an error message, such as `is empty; leave it out`.

        Args:
            text: the text.
            allow_empty: whether a text may be empty. Otherwise it needs a character other than white space.
            remedy: what the caller can do about an empty text, as the end of the problem.
        """
        if not allow_empty and (not text or text.isspace()):
            return f"is empty; {remedy}"
        # A character has at most four bytes in UTF-8, so a text of few characters fits and need not be encoded.
        if len(text) * 4 > self.max_text_bytes and (size := len(text.encode())) > self.max_text_bytes:
            return f"has {size} bytes, a text may have at most {self.max_text_bytes}; split it"
        return ""
