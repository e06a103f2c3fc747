"""Rows of a collection's database, and what they are as records."""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.types import Labels, Matrix, StoredRecord

log = logging.getLogger(__name__)

#: `json.loads` looks for encodings and blanks first, which takes as long again.
_DECODE = json.JSONDecoder().raw_decode
_COLUMNS = "label, id, text, metadata, class_label, revision, created, updated, expires"
# Moments as microseconds, since JSON here has 15 digits only.
#: Takes a JSON list of labels; gives their records as one value.
AS_ONE_ROW = """
SELECT json_group_array(json_array(
    label, id, text, CASE WHEN json_valid(metadata) THEN json(metadata) END, class_label, revision,
    CAST(round(created * 1e6) AS INTEGER), CAST(round(updated * 1e6) AS INTEGER),
    CAST(round(expires * 1e6) AS INTEGER)
)) FROM records WHERE label IN (SELECT value FROM json_each(?))
"""


class Row(NamedTuple):
    """A record as its row has it, undecoded; a column that is damaged may be of any type."""

    label: int
    id: str
    text: str
    metadata: str
    class_label: str
    vector: bytes
    checksum: int | None

    @property
    def is_whole(self) -> bool:
        """Whether it is as it was written; a row of an older version is taken to be."""
        if self.checksum is None:
            return True
        texts = (self.id, self.text, self.metadata, self.class_label)
        if not isinstance(self.vector, bytes) or not all(isinstance(each, str) for each in texts):
            return False
        return self.checksum == checksum_of(texts, self.vector)


#: The columns of a Row.
ROW_COLUMNS = "label, id, text, metadata, class_label, vector, checksum"


def checksum_of(texts: Sequence[str], vector: bytes) -> int:
    """Return the CRC-32 of id, text, metadata and label, each ended by a byte that no UTF-8 has, and the vector."""
    return zlib.crc32(vector, zlib.crc32(b"".join(each.encode() + b"\xff" for each in texts)))


def columns_of(with_vectors: bool) -> str:
    """Return what to select of a record for `record_of`."""
    return f"{_COLUMNS}, vector" if with_vectors else _COLUMNS


def record_of(row: Sequence[Any]) -> StoredRecord:
    """Make a record of a row of `columns_of`.

    Raises:
        ServiceError: INTERNAL if it is damaged so much that it is none.
    """
    try:
        metadata = _DECODE(row[3])[0]
        vector = np.frombuffer(row[9], dtype="<f4") if len(row) > 9 else None
    except (TypeError, ValueError) as error:
        raise damaged(row[1]) from error
    return StoredRecord(
        id=row[1],
        text=row[2],
        metadata=metadata,
        label=row[4],
        revision=row[5],
        create_time=_moment(row[6]),
        update_time=_moment(row[7]),
        vector=vector,
        expire_time=_moment_or_none(row[8]),
    )


def record_of_json(row: Sequence[Any]) -> StoredRecord:
    """Make a record of a row of the value of `AS_ONE_ROW`; raises as `record_of`."""
    _, record_id, text, metadata, label, revision, created, updated, expires = row
    if metadata is None:
        raise damaged(record_id)
    return StoredRecord(
        record_id,
        text,
        metadata,
        label,
        revision,
        _moment(created / 1e6),
        _moment(updated / 1e6),
        expire_time=None if expires is None else _moment(expires / 1e6),
    )


def damaged(record_id: str) -> ServiceError:
    """Return the error for a record whose row is none any more."""
    return ServiceError(
        Code.INTERNAL,
        f"record {record_id!r} is damaged on disk; delete it or write it anew, and see what VerifyCollection finds",
        reason="RECORD_DAMAGED",
        metadata={"record": record_id},
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _moment_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)


def vectors_of(rows: Sequence[tuple[Any, ...]], dimensions: int) -> tuple[Labels, Matrix]:
    """Return labels and vectors of rows of both: int64 (n,) and float32 (n, dimensions).

    A vector that is damaged is left out, so that the others can be searched; VerifyCollection tells of it.
    """
    whole = [row for row in rows if isinstance(row[1], bytes) and len(row[1]) == 4 * dimensions]
    matrix = np.frombuffer(b"".join([row[1] for row in whole]), dtype="<f4").reshape(len(whole), dimensions)
    finite = np.isfinite(matrix).all(axis=1)
    labels = np.array([row[0] for row in whole], dtype=np.int64)
    if len(whole) == len(rows) and finite.all():
        return labels, matrix
    lost = len(rows) - int(finite.sum())
    log.error("%d vectors are damaged on disk and not searched: see what VerifyCollection finds", lost)
    return labels[finite], matrix[finite]


def insert_row(
    connection: sqlite3.Connection,
    texts: tuple[str, str, str, str],
    vector: Matrix,
    times: tuple[int, float, float, float | None],
) -> int | None:
    """Insert a record: id, text, metadata, label; vector; revision, when made, written, gone. Return its own label."""
    data = vector.astype("<f4").tobytes()
    return connection.execute(
        "INSERT INTO records (id, text, metadata, class_label, vector, revision, created, updated, expires, checksum) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*texts, data, *times, checksum_of(texts, data)),
    ).lastrowid
