"""Rows of a collection's database, and what they are as records."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.metric import are_fit
from emberpc.server.index.types import CollectionSpec, Matrix, StoredRecord

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
    def name(self) -> str:
        """Its id, as far as that can be read."""
        return self.id if isinstance(self.id, str) else ascii(self.id)

    @property
    def is_whole(self) -> bool:
        """Whether it is as it was written; a row of an older version is taken to be if it can be read."""
        texts = (self.id, self.text, self.metadata, self.class_label)
        if not isinstance(self.vector, bytes) or not all(isinstance(each, str) for each in texts):
            return False
        return self.checksum is None or self.checksum == checksum_of(texts, self.vector)


#: The columns of a Row.
ROW_COLUMNS = "label, id, text, metadata, class_label, vector, checksum"


def checksum_of(texts: Sequence[str], vector: bytes) -> int:
    """Return the CRC-32 of id, text, metadata and label, each ended by a byte that no UTF-8 has, and the vector."""
    return zlib.crc32(vector, zlib.crc32(b"".join(each.encode() + b"\xff" for each in texts)))


def columns_of(with_vectors: bool) -> str:
    """Return what to select of a record for `record_of`."""
    return f"{_COLUMNS}, vector" if with_vectors else _COLUMNS


def record_of(row: Sequence[Any], spec: CollectionSpec) -> StoredRecord:
    """Make a record of a row of `columns_of`.

    Raises:
        ServiceError: INTERNAL if it is damaged so much that it is none.
    """
    record_id, text, label = row[1], row[2], row[4]
    try:
        metadata = _DECODE(row[3])[0]
        _check_types(record_id, text, metadata, label)
        return StoredRecord(
            record_id,
            text,
            metadata,
            label,
            row[5],
            _moment(row[6]),
            _moment(row[7]),
            _vector(row[9], spec) if len(row) > 9 else None,
            None if row[8] is None else _moment(row[8]),
        )
    except (TypeError, ValueError, OverflowError, OSError, RecursionError) as error:
        raise damaged(record_id) from error


def record_of_json(row: Sequence[Any]) -> StoredRecord:
    """Make a record of a row of the value of `AS_ONE_ROW`; raises one of several errors if it is damaged."""
    _, record_id, text, metadata, label, revision, created, updated, expires = row
    _check_types(record_id, text, metadata, label)
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


def _check_types(record_id: object, text: object, metadata: object, label: object) -> None:
    if type(metadata) is not dict or not (type(record_id) is type(text) is type(label) is str):
        raise TypeError


def _vector(data: Any, spec: CollectionSpec) -> Matrix:
    """Return a stored vector; raise ValueError or TypeError if none of the collection can be such."""
    vector: Matrix = np.frombuffer(data, dtype="<f4")
    if len(vector) != spec.dimensions or not are_fit(vector[None], spec.distance)[0]:
        raise ValueError
    return vector


def damaged(record_id: object) -> ServiceError:
    """Return the error for a record whose row is none any more, and whose id may be of any type."""
    name = record_id if isinstance(record_id, str) else ascii(record_id)
    return ServiceError(
        Code.INTERNAL,
        f"record {name!r} is damaged on disk; delete it or write it anew, and see what VerifyCollection finds",
        reason="RECORD_DAMAGED",
        metadata={"record": name},
    )


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


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
