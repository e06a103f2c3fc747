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
from emberpc.server.index.words import search_text

#: What Python raises where the value of a damaged column is used.
DAMAGES = (TypeError, ValueError, OverflowError, OSError, RecursionError)
#: `json.loads` looks for encodings and blanks first, which takes as long again.
_DECODE = json.JSONDecoder().raw_decode
_COLUMNS = "label, id, text, metadata, class_label, revision, created, updated, expires, text_checksum, checksum"
#: Rows of an older version have only the checksum of texts and vector together.
_OLDER = "text_checksum IS NULL AND checksum IS NOT NULL"
#: What `is_sound_vector` takes.
VECTOR_COLUMNS = "label, vector, text_checksum, checksum"
#: What `has_vector` takes.
UNCHECKED_COLUMNS = "label, vector"
# Moments as microseconds, since JSON here has 15 digits only.
#: Takes a JSON list of labels. Gives their records as one JSON value, and the concatenated vectors of those rows that
#: cannot be checked without them: JSON holds no bytes. For `records_of_one_row`.
AS_ONE_ROW = f"""
SELECT json_group_array(json_array(
    label, id, text, metadata, class_label, revision,
    CAST(round(created * 1e6) AS INTEGER), CAST(round(updated * 1e6) AS INTEGER),
    CAST(round(expires * 1e6) AS INTEGER), text_checksum, checksum, CASE WHEN {_OLDER} THEN length(vector) END
)), CAST(group_concat(CASE WHEN {_OLDER} THEN vector END, '') AS BLOB)
FROM records WHERE label IN (SELECT value FROM json_each(?))
"""  # noqa: S608 - our own condition


class Row(NamedTuple):
    """A record as its row has it, undecoded; a column that is damaged may be of any type."""

    label: int
    id: str
    text: str
    metadata: str
    class_label: str
    vector: bytes
    checksum: int | None
    text_checksum: int | None

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
        text_checksum = text_checksum_of(*texts)
        return self.text_checksum in (None, text_checksum) and (
            self.checksum is None or self.checksum == checksum_of(text_checksum, self.vector)
        )


#: The columns of a Row.
ROW_COLUMNS = ", ".join(Row._fields)


def text_checksum_of(record_id: str, text: str, metadata: str, label: str) -> int:
    """Return the CRC-32 of a record's texts, each ended by a byte that no UTF-8 has; metadata as JSON."""
    texts = (record_id.encode(), text.encode(), metadata.encode(), label.encode(), b"")
    return zlib.crc32(b"\xff".join(texts))


def checksum_of(text_checksum: int, vector: bytes) -> int:
    """Return the CRC-32 of a record's texts, whose own is given, and of its vector behind them."""
    return zlib.crc32(vector, text_checksum)


def columns_of(with_vectors: bool) -> str:
    """Return what to select of a record for `record_of`."""
    return f"{_COLUMNS}, vector" if with_vectors else f"{_COLUMNS}, CASE WHEN {_OLDER} THEN vector END"


def record_of(row: Sequence[Any], spec: CollectionSpec, *, with_vectors: bool) -> StoredRecord:
    """Make a record of a row of `columns_of`, with the same `with_vectors`.

    Raises:
        ServiceError: DATA_LOSS if it is damaged.
    """
    _, record_id, text, metadata, label, revision, created, updated, expires, text_checksum, checksum, vector = row
    try:
        _check_texts(record_id, text, metadata, label, text_checksum, checksum, vector)
        return StoredRecord(
            record_id,
            text,
            _decoded(metadata),
            label,
            revision,
            _moment(created),
            _moment(updated),
            _vector(vector, spec) if with_vectors else None,
            None if expires is None else _moment(expires),
        )
    except DAMAGES as error:
        raise damaged(record_id) from error


def records_of_one_row(document: str, vectors: bytes | None) -> dict[int, StoredRecord]:
    """Make records, by label, of what `AS_ONE_ROW` gives; raises one of `DAMAGES` if one of them is damaged."""
    records = {}
    start = 0
    for row in json.loads(document):
        label, record_id, text, metadata, class_label, revision, created, updated, expires, text_checksum = row[:10]
        checksum, size = row[10:]
        vector = None
        if size is not None:
            vector = (vectors or b"")[start : start + size]
            start += size
        _check_texts(record_id, text, metadata, class_label, text_checksum, checksum, vector)
        records[label] = StoredRecord(
            record_id,
            text,
            _decoded(metadata),
            class_label,
            revision,
            _moment(created / 1e6),
            _moment(updated / 1e6),
            expire_time=None if expires is None else _moment(expires / 1e6),
        )
    return records


def has_vector(row: Sequence[Any], size: int) -> bool:
    """Return whether a row of `UNCHECKED_COLUMNS`, or with more behind them, has a vector of that many bytes."""
    return type(row[1]) is bytes and len(row[1]) == size


def is_sound_vector(row: Sequence[Any], size: int) -> bool:
    """Return whether a row of `VECTOR_COLUMNS` has a vector of that many bytes and, as far as it says, the right one.

    A row of an older version has no checksum of its texts; there this says no more than that it has the size.
    """
    if not has_vector(row, size):
        return False
    _, vector, text_checksum, checksum = row
    try:
        return text_checksum is None or checksum is None or checksum_of(text_checksum, vector) == checksum
    except (TypeError, OverflowError):
        return False


def _check_texts(
    record_id: Any, text: Any, metadata: Any, label: Any, text_checksum: Any, checksum: Any, vector: Any
) -> None:
    """Raise ValueError, TypeError or OverflowError if the texts, or the vector where it is given, are damaged."""
    if not (type(record_id) is type(text) is type(metadata) is type(label) is str):
        raise TypeError
    found = text_checksum_of(record_id, text, metadata, label)
    if text_checksum is not None and text_checksum != found:
        raise ValueError
    if vector is not None and checksum is not None and checksum_of(found, vector) != checksum:
        raise ValueError


def _decoded(metadata: str) -> dict[str, Any]:
    """Return what a JSON object says; raise TypeError or ValueError if it is none."""
    if metadata == "{}":
        return {}
    found = _DECODE(metadata)[0]
    if type(found) is not dict:
        raise TypeError
    return found


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
        Code.DATA_LOSS,
        f"record {name!r} is damaged on disk; delete it or upsert it again, and see what VerifyCollection finds",
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
    text_checksum = text_checksum_of(*texts)
    return connection.execute(
        "INSERT INTO records (id, text, metadata, class_label, vector, revision, created, updated, expires, "
        "text_checksum, checksum, search_text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*texts, data, *times, text_checksum, checksum_of(text_checksum, data), search_text(texts[1])),
    ).lastrowid
