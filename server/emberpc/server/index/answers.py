"""The bytes of records that are read for one answer, limited before the records are read."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from emberpc.server.errors import response_too_large

#: Records whose bytes are looked up by one statement; SQLite reads their texts for that.
SIZES_AT_ONCE = 32
#: Bytes of a record's texts and metadata.
_SIZE = "length(CAST(text AS BLOB)) + length(CAST(metadata AS BLOB)) + length(CAST(class_label AS BLOB))"
#: Bytes of a record in an answer beside its texts, metadata and vector.
_OVERHEAD = 150
#: Bytes of metadata as a message for each byte as JSON, at most.
_METADATA_FACTOR = 4


def row_bytes(row: Sequence[object]) -> int:
    """Return the most bytes that a row of `rows.columns_of` has in an answer."""
    columns = [
        len(each.encode()) if isinstance(each, str) else len(each) for each in row if isinstance(each, (str, bytes))
    ]
    metadata = row[3]
    more = (_METADATA_FACTOR - 1) * len(metadata) if isinstance(metadata, (str, bytes)) else 0
    return sum(columns) + more + _OVERHEAD


class AnswerBytes:
    """Counts the bytes of the records that a thread reads for an answer. Safe to use from several threads.

    Args:
        limit: most bytes of one answer.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._local = threading.local()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count what this thread reads in the block; outside of one, nothing is limited."""
        self._local.left = self.limit
        try:
            yield
        finally:
            self._local.left = None

    def spend(self, connection: sqlite3.Connection, column: str, keys: Sequence[object]) -> None:
        """Count records that are about to be read.

        Args:
            connection: the database.
            column: `label` or `id`.
            keys: which records, by that column.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the answer would have too many bytes.
            sqlite3.Error: the database failed.
        """
        left: int | None = getattr(self._local, "left", None)
        if left is None:
            return
        for start in range(0, len(keys), SIZES_AT_ONCE):
            part = keys[start : start + SIZES_AT_ONCE]
            marks = ",".join("?" * len(part))
            statement = f"SELECT total({_SIZE}) FROM records WHERE {column} IN ({marks})"  # noqa: S608 - our own names
            left -= int(connection.execute(statement, part).fetchone()[0])
            if left < 0:
                raise response_too_large(self.limit, "ask for fewer records")
        self._local.left = left
