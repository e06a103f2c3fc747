"""The bytes of records that are read for one answer, limited before the records are read."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from emberpc.server.collections.types import WHOLE_RECORD, RecordParts, StoredRecord
from emberpc.server.errors import response_too_large

#: Records whose bytes are looked up by one statement; SQLite reads their texts for that.
SIZES_AT_ONCE = 32
_BYTES = {name: f"length(CAST({name} AS BLOB))" for name in ("text", "metadata", "class_label")}
#: Bytes of a record in an answer beside its texts, metadata and vector.
_OVERHEAD = 150
#: Bytes of metadata as a message for each byte as JSON, at most.
_METADATA_FACTOR = 4


def row_bytes(row: Sequence[object], parts: RecordParts) -> int:
    """Return the most bytes that a row of `rows.columns_of` has in an answer of these parts."""
    columns = [
        len(each.encode()) if isinstance(each, str) else len(each) if isinstance(each, bytes) else 0 for each in row
    ]
    columns[2] *= parts.text
    columns[3] *= _METADATA_FACTOR * parts.metadata
    return sum(columns) + _OVERHEAD


class _Answer(threading.local):
    #: Bytes that the answer may still have; None: nothing is limited.
    left: int | None = None
    #: Bytes of whole records that may still be read and kept until the answer is written.
    room = 0
    parts = WHOLE_RECORD


class AnswerBytes:
    """Counts the bytes of the records that a thread reads for an answer. Safe to use from several threads.

    Args:
        limit: most bytes of one answer.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._answer = _Answer()

    @property
    def parts(self) -> RecordParts:
        """The parts that the answer of this thread holds of a record."""
        return self._answer.parts

    @contextmanager
    def one(self, parts: RecordParts = WHOLE_RECORD) -> Iterator[None]:
        """Count what this thread reads in the block; outside of one, nothing is limited.

        Args:
            parts: parts of a record that the answer holds; only their bytes count.
        """
        self._answer.left = self._answer.room = self.limit
        self._answer.parts = parts
        try:
            yield
        finally:
            self._answer.left, self._answer.parts = None, WHOLE_RECORD

    def spend(self, connection: sqlite3.Connection, column: str, keys: Sequence[object]) -> bool:
        """Count records that are about to be read.

        Args:
            connection: the database.
            column: `label` or `id`.
            keys: which records, by that column.

        Returns:
            Whether all of them may be read and kept whole; otherwise only with the answer's parts.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the answer would have too many bytes.
            sqlite3.Error: the database failed.
        """
        answer = self._answer
        if answer.left is None:
            return True
        left, room = answer.left, answer.room
        for start in range(0, len(keys), SIZES_AT_ONCE):
            part = keys[start : start + SIZES_AT_ONCE]
            marks = ",".join("?" * len(part))
            sizes = f"{_size(answer.parts)}, {_size(WHOLE_RECORD)}"
            statement = f"SELECT {sizes} FROM records WHERE {column} IN ({marks})"  # noqa: S608 - our own names
            held, whole = connection.execute(statement, part).fetchone()
            left, room = left - int(held), room - int(whole)
            self._check(left)
        answer.left = left
        if room < 0:
            return False
        answer.room = room
        return True

    def count(self, records: Iterable[StoredRecord]) -> None:
        """Count whole records that were read without `spend`, and that the answer holds whole.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the answer would have too many bytes.
        """
        if self._answer.left is None:
            return
        size = sum(
            len(record.text.encode())
            + len(record.label.encode())
            + (len(str(record.metadata)) if record.metadata else 0)
            for record in records
        )
        self._check(self._answer.left - size)
        self._answer.left -= size
        self._answer.room -= size

    def _check(self, left: int) -> None:
        if left < 0:
            raise response_too_large(self.limit, "ask for fewer records")


def only(parts: RecordParts, record: StoredRecord) -> StoredRecord:
    """Return a record without the text and the metadata that are not among the parts."""
    return record._replace(text=record.text if parts.text else "", metadata=record.metadata if parts.metadata else {})


def _size(parts: RecordParts) -> str:
    """Return SQL for the bytes of all records' labels, and of the parts that are asked for."""
    columns = ["class_label", *(name for name, held in parts._asdict().items() if held)]
    return f"total({' + '.join(_BYTES[name] for name in columns)})"
