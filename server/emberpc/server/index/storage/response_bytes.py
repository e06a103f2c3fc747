"""Limit on the bytes of the records in one response, checked before the records are read."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emberpc.server.collections.types import NO_METADATA, WHOLE_RECORD, RecordParts, StoredRecord
from emberpc.server.errors import response_too_large

#: Records whose sizes one statement computes; SQLite reads their texts for that.
SIZES_AT_ONCE = 32
#: For at most this many records, bytes are counted after the read, which saves a statement. Records too large to be
#: kept whole are read this many at a time.
FEW_RECORDS = 8
_BYTES = {name: f"length(CAST({name} AS BLOB))" for name in ("text", "metadata", "class_label")}
#: Bytes of a record in a response besides its texts, metadata and vector.
_OVERHEAD = 150
#: Upper bound of the bytes of metadata in a message for each byte as JSON.
_METADATA_FACTOR = 4


def row_bytes(row: Sequence[object], parts: RecordParts) -> int:
    """Return an upper bound of the bytes of a row of `rows.columns_of` in a response with these parts."""
    columns = [
        len(each.encode()) if isinstance(each, str) else len(each) if isinstance(each, bytes) else 0 for each in row
    ]
    columns[2] *= parts.text
    columns[3] *= _METADATA_FACTOR * parts.metadata
    return sum(columns) + _OVERHEAD


class _Response(threading.local):
    #: Bytes that the response may still use; None: no limit.
    left: int | None = None
    #: Bytes of whole records that may still be read and kept until the response is written.
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
        """Limit the bytes that this thread reads in the block; outside of the block nothing is limited.

        Args:
            parts: parts of a record that the response contains; only their bytes count.
        """
        self._response.left = self._response.room = self.limit
        self._response.parts = parts
        try:
            yield
        finally:
            self._response.left, self._response.parts = None, WHOLE_RECORD

    def spend(self, connection: sqlite3.Connection, column: str, keys: Sequence[object]) -> bool:
        """Count the bytes of records before they are read.

        Args:
            connection: the database.
            column: `label` or `id`.
            keys: the records' values of that column.

        Returns:
            Whether all of them may be read and kept whole; if not, only the response's parts may be kept.

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
        """Count the bytes of whole records that were read without `spend` and that the response contains whole.

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
    """Return a record without the text or the metadata if the parts exclude them."""
    text = record.text if parts.text else ""
    return record._replace(text=text, document=record.document if parts.metadata else NO_METADATA)


def _size(parts: RecordParts) -> str:
    """Return SQL for the bytes of all records' labels and of the requested parts."""
    columns = ["class_label", *(name for name, held in parts._asdict().items() if held)]
    return f"total({' + '.join(_BYTES[name] for name in columns)})"


def slices(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield slices of keys, for records that are too large to be kept whole."""
    for start in range(0, len(keys), FEW_RECORDS):
        yield keys[start : start + FEW_RECORDS]
