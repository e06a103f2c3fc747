"""Rows of a collection's database, and what they are as records."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from emberpc.server.index.types import Labels, Matrix, StoredRecord

#: `json.loads` looks for encodings and blanks first, which takes as long again.
_DECODE = json.JSONDecoder().raw_decode
_COLUMNS = "label, id, text, metadata, class_label, revision, created, updated, expires"
# Moments as microseconds, since JSON here has 15 digits only.
#: Takes a JSON list of labels; gives their records as one value.
AS_ONE_ROW = """
SELECT json_group_array(json_array(
    label, id, text, json(metadata), class_label, revision,
    CAST(round(created * 1e6) AS INTEGER), CAST(round(updated * 1e6) AS INTEGER),
    CAST(round(expires * 1e6) AS INTEGER)
)) FROM records WHERE label IN (SELECT value FROM json_each(?))
"""


class Row(NamedTuple):
    """A record as its row has it, undecoded."""

    label: int
    id: str
    metadata: str
    vector: bytes


def columns_of(with_vectors: bool) -> str:
    """Return what to select of a record for `record_of`."""
    return f"{_COLUMNS}, vector" if with_vectors else _COLUMNS


def record_of(row: Sequence[Any]) -> StoredRecord:
    """Make a record of a row of `columns_of`."""
    return StoredRecord(
        id=row[1],
        text=row[2],
        metadata=_DECODE(row[3])[0],
        label=row[4],
        revision=row[5],
        create_time=_moment(row[6]),
        update_time=_moment(row[7]),
        vector=np.frombuffer(row[9], dtype="<f4") if len(row) > 9 else None,
        expire_time=_moment_or_none(row[8]),
    )


def record_of_json(row: Sequence[Any]) -> StoredRecord:
    """Make a record of a row of the value of `AS_ONE_ROW`."""
    _, record_id, text, metadata, label, revision, created, updated, expires = row
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


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _moment_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _moment(seconds)


def vectors_of(rows: list[tuple[Any, ...]]) -> tuple[Labels, Matrix]:
    """Return labels and vectors of rows of both: int64 (n,) and float32 (n, dimensions)."""
    labels = np.array([row[0] for row in rows], dtype=np.int64)
    matrix = np.frombuffer(b"".join([row[1] for row in rows]), dtype="<f4").reshape(len(rows), -1 if rows else 0)
    return labels, matrix


def insert_row(
    connection: sqlite3.Connection,
    texts: tuple[str, str, str, str],
    vector: Matrix,
    times: tuple[int, float, float, float | None],
) -> int | None:
    """Insert a record: id, text, metadata, label; vector; revision, when made, written, gone. Return its own label."""
    return connection.execute(
        "INSERT INTO records (id, text, metadata, class_label, vector, revision, created, updated, expires) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*texts, vector.astype("<f4").tobytes(), *times),
    ).lastrowid
