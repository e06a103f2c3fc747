"""Make ids for a table without the column `id`: each from the text of its row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

#: Hex digits of SHA-256 in an id: 128 bits, so that two texts have practically never the same id by chance.
_DIGITS = 32


def id_of_text(text: str) -> str:
    """Return the id of a record without id: `text-` and the first 32 hex digits of the SHA-256 of the text (UTF-8)."""
    return f"text-{hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]}"


class ContentIds:
    """Gives each row of a table the id of its text, and skips rows that repeat an earlier row.

    A row repeats an earlier row if the text, the label and the metadata are the same. A text always has the same id, so
    the records of a table that is written again replace the earlier records. The id does not depend on the label: if a
    label is corrected and the table is written again, the record with the wrong label is replaced.

    Attributes:
        repeated: number of rows that were skipped.
    """

    def __init__(self) -> None:
        self.repeated = 0
        #: For each id: the line of the first row with its text, and the `hash` of that row.
        self._rows: dict[str, tuple[int, int]] = {}

    def add(self, number: int, record: Mapping[str, Any], refuse: Callable[[str], NoReturn]) -> dict[str, Any] | None:
        """Return a copy of a record with its id; None if an earlier row has the same text, label and metadata.

        Args:
            number: line of the row, a different number for each row.
            record: the record without id; it must have `text`.
            refuse: called with the problem if the text is empty or only white space, or an earlier row has the same
                text and another label, other metadata, or metadata in another order; must raise an exception.
        """
        text = record["text"]
        if not text.strip():
            refuse("the text is empty, and without a column id the id is made of it; give it a text")
        # The order of the fields of metadata makes no other record.
        record_id, content = id_of_text(text), hash(json.dumps(record, sort_keys=True))
        line, earlier = self._rows.setdefault(record_id, (number, content))
        if line == number:
            return {"id": record_id, **record}
        if earlier != content:
            refuse(
                f"line {line} has the same text with another label or other metadata, and without a column id a text "
                "is one record; keep one of the lines, or add a column id"
            )
        self.repeated += 1
        return None
