"""Limit on the bytes of the records in one response, checked before records are read, or after if they are few."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emberpc.server.collections.types import NO_METADATA, WHOLE_RECORD, RecordParts, StoredRecord
from emberpc.server.errors import response_too_large

#: Number of records whose bytes one statement adds up. A page of records is also read this many at a time. The number
#: is small, since SQLite reads the texts of these records, and the limit is checked only after each statement.
SIZES_AT_ONCE = 32
#: The bytes of at most this many whole records without vectors are counted after the records are read, which saves a
#: statement. Records that are too large to be kept whole are read this many at a time.
FEW_RECORDS = 8
#: SQL for the number of bytes of each text of a record, by its column.
_BYTES = {name: f"length(CAST({name} AS BLOB))" for name in ("text", "metadata", "class_label")}
#: Bytes of a record in a response besides its texts, metadata and vector.
_OVERHEAD = 150
#: Upper bound of the bytes of metadata in a protobuf message for each byte of the metadata as JSON.
_METADATA_FACTOR = 4


def row_bytes(row: Sequence[object], parts: RecordParts) -> int:
    """Return an upper bound of the bytes that a record takes in a response.

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
    #: Bytes that the response may still use; None: no limit.
    left: int | None = None
    #: Bytes of whole records that may still be read and kept in memory until the response is written.
    room = 0
    parts = WHOLE_RECORD


class ResponseBytes:
    """Counts the bytes of the records that a thread reads for a response. Safe to use from several threads.

    Args:
        limit: limit of the bytes of one response.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._response = _Response()

    @property
    def parts(self) -> RecordParts:
        """Parts of a record that this thread's response contains."""
        return self._response.parts

    @contextmanager
    def limited(self, parts: RecordParts = WHOLE_RECORD) -> Iterator[None]:
        """Limit the bytes of the records that the calling thread reads in the block for one response, to `limit`.

        A read over the limit (`spend`, `count`) raises RESOURCE_EXHAUSTED in the block. Outside of a block, nothing is
        limited. Blocks must not be nested.

        Args:
            parts: parts of a record that the response contains. `spend` counts these and the label, and no vectors.
        """
        self._response.left = self._response.room = self.limit
        self._response.parts = parts
        try:
            yield
        finally:
            self._response.left, self._response.parts = None, WHOLE_RECORD

    def spend(self, connection: sqlite3.Connection, column: str, keys: Sequence[object]) -> bool:
        """Count the bytes of records before they are read, in a block of `limited`; outside of it, return True.

        Args:
            connection: a connection to the database.
            column: the column that selects the records: "label" or "id".
            keys: values of that column, one for each record.

        Returns:
            Whether all these records may be read and kept whole; if not, only the response's parts may be kept.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the response would have too many bytes.
            sqlite3.Error: the database failed.
        """
        response = self._response
        if response.left is None:
            return True
        left, room = response.left, response.room
        for start in range(0, len(keys), SIZES_AT_ONCE):
            part = keys[start : start + SIZES_AT_ONCE]
            marks = ",".join("?" * len(part))
            sizes = f"{_size(response.parts)}, {_size(WHOLE_RECORD)}"
            statement = f"SELECT {sizes} FROM records WHERE {column} IN ({marks})"  # noqa: S608 - our own names
            held, whole = connection.execute(statement, part).fetchone()
            left, room = left - int(held), room - int(whole)
            self._check(left)
        response.left = left
        if room < 0:
            return False
        response.room = room
        return True

    def count(self, records: Iterable[StoredRecord]) -> None:
        """Count the bytes of records that were read without `spend` and that the response contains whole.

        Does nothing outside of a block of `limited`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the response would have too many bytes.
        """
        if self._response.left is None:
            return
        size = sum(
            len(record.text.encode()) + len(record.label.encode()) + len(record.document.encode()) for record in records
        )
        self._check(self._response.left - size)
        self._response.left -= size
        self._response.room -= size

    def _check(self, left: int) -> None:
        if left < 0:
            raise response_too_large(self.limit, "ask for fewer records")


def select_parts(parts: RecordParts, record: StoredRecord) -> StoredRecord:
    """Return a copy of a record, with empty text and empty metadata in place of those that `parts` excludes."""
    text = record.text if parts.text else ""
    return record._replace(text=text, document=record.document if parts.metadata else NO_METADATA)


def _size(parts: RecordParts) -> str:
    """Return SQL for the sum, over the selected rows, of the bytes of class labels and of the requested parts."""
    columns = ["class_label", *(name for name, held in parts._asdict().items() if held)]
    return f"total({' + '.join(_BYTES[name] for name in columns)})"


def slices(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield slices of at most `FEW_RECORDS` keys, to read records that are together too large to be kept whole."""
    for start in range(0, len(keys), FEW_RECORDS):
        yield keys[start : start + FEW_RECORDS]
