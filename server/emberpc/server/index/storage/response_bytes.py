"""Limit on the bytes of the records in one response, checked before records are read, or after if they are few.

So a response that would be too large does not fill the memory. Pages are ended at the limit instead (`row_bytes`).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emberpc.server.collections.types import NO_METADATA, WHOLE_RECORD, RecordParts, StoredRecord
from emberpc.server.errors import response_too_large

#: Maximum number of records whose bytes one statement of `spend` adds up. A page of records is also read this many at a
#: time. The number is small, since SQLite reads the texts of these records, and the limit is checked only after each
#: statement.
SIZES_AT_ONCE = 32
#: At most this many whole records without vectors are counted after they are read (`count`), which saves a statement.
#: Records that are together too large to be kept whole are read this many at a time (`slices`).
FEW_RECORDS = 8
#: SQL for the number of bytes of a record's text, metadata (as JSON) and class label, by the name of the column.
_BYTES = {name: f"length(CAST({name} AS BLOB))" for name in ("text", "metadata", "class_label")}
#: Upper bound of the bytes of a record in a response besides id, text, metadata, class label and vector.
_OVERHEAD = 150
#: Upper bound of the bytes of metadata in a protobuf message for each byte of the metadata as JSON.
_METADATA_FACTOR = 4


def row_bytes(row: Sequence[object], parts: RecordParts) -> int:
    """Return an upper bound of the bytes that a record takes in a response, with its vector if the row has one.

    Args:
        row: the record's row, with the columns of `rows.columns_of`.
        parts: parts of the record that the response contains.
    """
    columns = [
        len(each.encode()) if isinstance(each, str) else len(each) if isinstance(each, bytes) else 0 for each in row
    ]
    columns[2] *= parts.text
    columns[3] *= _METADATA_FACTOR * parts.metadata
    return sum(columns) + _OVERHEAD


class _Response(threading.local):
    #: Bytes that the records of the response may still have; None outside of a block of `limited`: no limit.
    left: int | None = None
    #: Bytes of whole records that may still be kept in memory in the block. It starts at the limit, as `left` does, but
    #: it also counts texts and metadata that the response excludes.
    space = 0
    parts = WHOLE_RECORD


class ResponseBytes:
    """Counts and limits the bytes of the records that each thread reads for its present response.

    The count is an estimate: it has text, class label and metadata as JSON, but no ids, vectors and times. Safe to use
    from several threads: each has a count of its own.

    Args:
        limit: limit of the bytes of one response.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._response = _Response()

    @property
    def parts(self) -> RecordParts:
        """Parts of a record that this thread's response contains; outside of a block of `limited`, all parts."""
        return self._response.parts

    @contextmanager
    def limited(self, parts: RecordParts = WHOLE_RECORD) -> Iterator[None]:
        """Limit the bytes of the records that the calling thread reads for one response, within the block, to `limit`.

        The methods `spend` and `count` raise RESOURCE_EXHAUSTED over the limit; readers in the block call them. Outside
        of a block, nothing is limited. Blocks must not be nested.

        Args:
            parts: parts of a record that the response contains. `spend` counts only these, and the class label.
        """
        self._response.left = self._response.space = self.limit
        self._response.parts = parts
        try:
            yield
        finally:
            self._response.left, self._response.parts = None, WHOLE_RECORD

    def spend(self, connection: sqlite3.Connection, column: str, keys: Sequence[object]) -> bool:
        """Count the bytes of records before they are read, in a block of `limited`; outside of it, only return True.

        Args:
            connection: a connection to the database.
            column: the column that selects the records: "label" (the record's number) or "id".
            keys: distinct values of the column, one for each record; missing records have no bytes.

        Returns:
            Whether the caller may keep all these records whole in memory. If not, the caller reads them in `slices`,
            and keeps only the response's parts (`select_parts`).

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the response would have too many bytes.
            sqlite3.Error: the database failed, or the call was cancelled.
        """
        response = self._response
        if response.left is None:
            return True
        left, space = response.left, response.space
        for start in range(0, len(keys), SIZES_AT_ONCE):
            part = keys[start : start + SIZES_AT_ONCE]
            marks = ",".join("?" * len(part))
            sizes = f"{_size(response.parts)}, {_size(WHOLE_RECORD)}"
            statement = f"SELECT {sizes} FROM records WHERE {column} IN ({marks})"  # noqa: S608 - our own names
            held, whole = connection.execute(statement, part).fetchone()
            left, space = left - int(held), space - int(whole)
            self._check(left)
        response.left = left
        if space < 0:
            return False
        response.space = space
        return True

    def count(self, records: Iterable[StoredRecord]) -> None:
        """Count the bytes of records that were read without `spend`, and that the response contains with all parts.

        Does nothing outside of a block of `limited`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the response would have too many bytes.
        """
        if self._response.left is None:
            return
        size = sum(
            len(record.text.encode()) + len(record.label.encode()) + len(record.metadata_text.encode())
            for record in records
        )
        self._check(self._response.left - size)
        self._response.left -= size
        self._response.space -= size

    def _check(self, left: int) -> None:
        if left < 0:
            raise response_too_large(self.limit, "ask for fewer records")


def select_parts(parts: RecordParts, record: StoredRecord) -> StoredRecord:
    """Return a copy of a record, in which text and metadata are empty if `parts` excludes them."""
    text = record.text if parts.text else ""
    return record._replace(text=text, metadata_text=record.metadata_text if parts.metadata else NO_METADATA)


def _size(parts: RecordParts) -> str:
    """Return an SQL aggregate: the bytes of the class labels and the given parts of all selected rows together."""
    columns = ["class_label", *(name for name, held in parts._asdict().items() if held)]
    return f"total({' + '.join(_BYTES[name] for name in columns)})"


def slices(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the keys in slices of at most `FEW_RECORDS`, for records that are together too large to be kept whole."""
    for start in range(0, len(keys), FEW_RECORDS):
        yield keys[start : start + FEW_RECORDS]
