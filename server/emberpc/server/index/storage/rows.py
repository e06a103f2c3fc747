"""Rows of a collection's database: columns, checksums, and conversion to records."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from emberpc.server.collections.types import CollectionSpec, Matrix, StoredRecord, decode_metadata
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage.lexical_terms import search_text

#: Exceptions that code may raise when it uses the value of a damaged column.
DAMAGE_ERRORS = (TypeError, ValueError, OverflowError, OSError, RecursionError, struct.error)
# Times are selected as integers of microseconds: SQLite writes a float to JSON with only 15 digits, and the row's
# checksum covers the times in microseconds.
_COLUMNS = """label, id, text, metadata, class_label, revision,
    CAST(round(created * 1e6) AS INTEGER), CAST(round(updated * 1e6) AS INTEGER),
    CAST(round(expires * 1e6) AS INTEGER), text_checksum"""
_PRINTABLE_BYTES = re.compile(r"""b(['"])(?:[ -\[\]-~]|\\(?:[\\'"tnr]|x[0-9a-f]{2}))*\1""")
#: Columns of the rows that `has_intact_vector` reads.
VECTOR_COLUMNS = "label, vector, text_checksum, checksum"
#: Columns of the rows that `has_intact_numbers` reads.
NUMBER_COLUMNS = "label, revision, created, updated, expires, text_checksum, row_checksum"
#: Encodes the five numbers of a record for `row_checksum_of`, as little-endian integers of 64 bits.
_NUMBERS = struct.Struct("<5q").pack
#: Value that `row_checksum_of` uses for the expiry of a record that never expires. No valid time has this value.
_NEVER = -(2**63)
#: From this number on every double is an integer. SQLite's `round` does not change it, so `_microseconds` does not.
_WHOLE = 2**52
#: Columns of the rows that `has_vector` reads.
UNCHECKED_COLUMNS = "label, vector"
#: Selects the records of a JSON list of labels, without vectors, as one JSON value for `records_of_one_row`: one row is
#: faster to read than many. For a `checksum` that is no integer, `row_checksum` is null, so that the damage is found.
AS_ONE_ROW = f"""
SELECT json_group_array(json_array({_COLUMNS}, CASE WHEN typeof(checksum) = 'integer' THEN row_checksum END))
FROM records WHERE label IN (SELECT value FROM json_each(?))
"""  # noqa: S608 - our own columns


class Row(NamedTuple):
    """A record as stored in its row, undecoded; a damaged column may have any type.

    `label` is the record's number in the database, `class_label` its class. `metadata` is JSON. The times are in
    seconds since 1970; `expires` is None for never. `search_text` is None if the word index has `text` itself.
    """

    label: int
    id: str
    text: str
    metadata: str
    class_label: str
    vector: bytes
    revision: int
    created: float
    updated: float
    expires: float | None
    text_checksum: int | None
    checksum: int | None
    row_checksum: int | None
    search_text: str | None

    @property
    def name(self) -> str:
        """The id; if the id is damaged and not a string, its `printable_id`."""
        return printable_id(self.id)

    @property
    def is_intact(self) -> bool:
        """Whether the row has all three checksums, and they match its values; `search_text` has no checksum."""
        try:
            return (self.text_checksum, self.checksum, self.row_checksum) == self.checksums()
        except DAMAGE_ERRORS:
            return False

    @property
    def was_intact(self) -> bool:
        """Whether a row that an older version wrote matches its checksums; a missing checksum counts as right.

        The values must have the right types even if the row has no checksum.
        """
        try:
            pairs = zip((self.text_checksum, self.checksum, self.row_checksum), self.checksums(), strict=True)
            return all(checksum in (None, found) for checksum, found in pairs)
        except DAMAGE_ERRORS:
            return False

    def checksums(self) -> tuple[int, int, int]:
        """Compute what `text_checksum`, `checksum` and `row_checksum` must be for the other values of the row.

        Raises one of `DAMAGE_ERRORS` if a value cannot be right, such as a text that is not a string.
        """
        texts = (self.id, self.text, self.metadata, self.class_label)
        if type(self.vector) is not bytes or not all(type(each) is str for each in texts):
            raise TypeError
        text_checksum = text_checksum_of(*texts)
        moments = (_microseconds(self.created), _microseconds(self.updated), _microseconds(self.expires))
        return (
            text_checksum,
            checksum_of(text_checksum, self.vector),
            row_checksum_of(text_checksum, self.label, self.revision, *moments),
        )


#: Columns of the table `records`, in the order of the fields of `Row`.
ROW_COLUMNS = ", ".join(Row._fields)
_INSERT = f"INSERT INTO records ({ROW_COLUMNS}) VALUES ({', '.join('?' * len(Row._fields))})"  # noqa: S608 - our own


def text_checksum_of(record_id: str, text: str, metadata: str, label: str) -> int:
    """Return the CRC-32 of id, text, metadata and label of a record, its texts.

    Each is encoded as UTF-8 and followed by the byte 0xFF, which UTF-8 never contains. `metadata` is JSON, and `label`
    is the class label, not the record's number. Raises ValueError if a text cannot be encoded.
    """
    return checksum_of_bytes((record_id.encode(), text.encode(), metadata.encode(), label.encode()))


def checksum_of_bytes(texts: Sequence[bytes]) -> int:
    """Return the CRC-32 of a record's texts, each followed by the byte 0xFF.

    `texts` has id, text, metadata and class label, in this order, in UTF-8. See `text_checksum_of` for strings.
    """
    return zlib.crc32(b"\xff".join((*texts, b"")))


def checksum_of(text_checksum: int, vector: bytes) -> int:
    """Return the CRC-32 of a record's texts followed by its vector, from the checksum of the texts and the vector."""
    return zlib.crc32(vector, text_checksum)


def row_checksum_of(
    text_checksum: int, label: int, revision: int, created: int | None, updated: int | None, expires: int | None
) -> int:
    """Return the CRC-32 of a record's texts followed by its numbers, from the checksum of the texts and the numbers.

    `label` is the record's number in the database. The times are in microseconds since 1970; only `expires` may be
    None, for never. Raises one of `DAMAGE_ERRORS` if another number is not an integer of 64 bits.
    """
    numbers = _NUMBERS(label, revision, created, updated, _NEVER if expires is None else expires)
    return zlib.crc32(numbers, text_checksum)


def columns_of(with_vectors: bool) -> str:
    """Return the SQL columns that `record_of` reads, with times in microseconds; without vectors, the last is NULL."""
    return f"{_COLUMNS}, checksum, row_checksum, {'vector' if with_vectors else 'NULL'}"


def record_of(row: Sequence[Any], spec: CollectionSpec, *, with_vectors: bool) -> StoredRecord:
    """Convert a row to a record.

    Args:
        row: a row with the columns `columns_of(with_vectors)`.
        spec: the spec of the collection.
        with_vectors: whether the row and the record contain the vector.

    Raises:
        ServiceError: DATA_LOSS if the row is damaged or lacks a checksum. Without vectors, damage of the vector is not
            found.
    """
    number, record_id, text, metadata, label, revision, created, updated, expires, *more = row
    text_checksum, checksum, row_checksum, vector = more
    try:
        found = _checked_texts(record_id, text, metadata, label, text_checksum)
        # The checksums do not suffice: a row that an older version wrote may have got them later, when its metadata was
        # damaged already. Only decoding shows whether the metadata is a JSON object.
        decode_metadata(metadata)
        numbers = (number, revision, created, updated, expires)
        if row_checksum_of(found, *numbers) != row_checksum or type(checksum) is not int:
            raise ValueError
        if vector is not None and checksum_of(found, vector) != checksum:
            raise ValueError
        return StoredRecord(
            record_id,
            text,
            metadata,
            label,
            revision,
            _moment(created),
            _moment(updated),
            _vector(vector, spec) if with_vectors else None,
            None if expires is None else _moment(expires),
        )
    except DAMAGE_ERRORS as error:
        raise damaged(record_id) from error


def records_of_one_row(value: str) -> dict[int, StoredRecord]:
    """Convert the value that `AS_ONE_ROW` selects to records without vectors, by label (the record's number).

    Raises one of `DAMAGE_ERRORS` if one of the records is damaged; its vector is not checked.
    """
    records = {}
    for (
        label,
        record_id,
        text,
        metadata,
        class_label,
        revision,
        created,
        updated,
        expires,
        text_checksum,
        row_checksum,
    ) in json.loads(value):
        found = _checked_texts(record_id, text, metadata, class_label, text_checksum)
        if row_checksum_of(found, label, revision, created, updated, expires) != row_checksum:
            raise ValueError
        decode_metadata(metadata)
        records[label] = StoredRecord(
            record_id,
            text,
            metadata,
            class_label,
            revision,
            _moment(created),
            _moment(updated),
            expire_time=None if expires is None else _moment(expires),
        )
    return records


def has_vector(row: Sequence[Any], size: int) -> bool:
    """Return whether a row that starts with `UNCHECKED_COLUMNS` has a vector of `size` bytes, damaged or not."""
    return type(row[1]) is bytes and len(row[1]) == size


def has_intact_vector(row: Sequence[Any], size: int) -> bool:
    """Return whether a row of `VECTOR_COLUMNS` has a vector of `size` bytes that matches the checksums.

    False if a checksum is missing. The texts are not checked.
    """
    if not has_vector(row, size):
        return False
    _, vector, text_checksum, checksum = row
    try:
        return bool(checksum_of(text_checksum, vector) == checksum)
    except (TypeError, OverflowError):
        return False


def has_intact_numbers(row: Sequence[Any]) -> bool:
    """Return whether label (the record's number), revision and times of a row of `NUMBER_COLUMNS` match the checksums.

    False if a checksum is missing. The texts are not checked.
    """
    label, revision, created, updated, expires, text_checksum, row_checksum = row
    try:
        moments = (_microseconds(created), _microseconds(updated), _microseconds(expires))
        return bool(row_checksum_of(text_checksum, label, revision, *moments) == row_checksum)
    except DAMAGE_ERRORS:
        return False


def _checked_texts(record_id: Any, text: Any, metadata: Any, label: Any, checksum: Any) -> int:
    """Return the checksum of a record's texts, of which `label` is the class label.

    Raises TypeError if one of them is not a string, ValueError if they do not match `checksum`.
    """
    if not (type(record_id) is type(text) is type(metadata) is type(label) is str):
        raise TypeError
    found = text_checksum_of(record_id, text, metadata, label)
    if checksum != found:
        raise ValueError
    return found


def _microseconds(seconds: float | None) -> int | None:
    """Convert a time from seconds to microseconds since 1970, rounded as by `_COLUMNS`; None if `seconds` is None.

    Raises TypeError, ValueError or OverflowError if `seconds` is not a finite float.
    """
    if seconds is None:
        return None
    if type(seconds) is not float:
        raise TypeError
    scaled = seconds * 1e6
    return int(scaled + 0.5) if 0 <= scaled < _WHOLE else round(scaled)


def _vector(data: Any, spec: CollectionSpec) -> Matrix:
    """Decode the bytes of a stored vector, which the caller compared with the checksum: float32 (dimensions,).

    Raises ValueError or TypeError if `data` are not the bytes of `spec.dimensions` numbers. The numbers are not
    validated: the write validated them, and `are_fit` for one vector takes ten times as long as the checksum.
    """
    vector: Matrix = np.frombuffer(data, dtype="<f4")
    if len(vector) != spec.dimensions:
        raise ValueError
    return vector


def printable_id(record_id: object) -> str:
    """Return an id unchanged; for a damaged id that is not a string, the `ascii` of its value, such as `b'\\xff'`."""
    return record_id if isinstance(record_id, str) else ascii(record_id)


def bytes_of_printable_id(name: str) -> bytes | None:
    """Return the bytes for which `printable_id` returns `name`; None if there are none."""
    if not _PRINTABLE_BYTES.fullmatch(name):
        return None
    try:
        found = ast.literal_eval(name)
    except (SyntaxError, ValueError):  # an ordinary id, such as b'it's'
        return None
    return found if isinstance(found, bytes) and printable_id(found) == name else None


def damaged(record_id: object) -> ServiceError:
    """Return the error DATA_LOSS for a record whose row is damaged; `record_id` is its id, which may be damaged too."""
    name = printable_id(record_id)
    return ServiceError(
        Code.DATA_LOSS,
        f"record {name!r} is damaged on disk; delete it or upsert it again, and see what VerifyCollection finds",
        reason="RECORD_DAMAGED",
        metadata={"record": name},
    )


def _moment(microseconds: Any) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, timezone.utc)


def insert_row(
    connection: sqlite3.Connection,
    number: int,
    texts: tuple[str, str, str, str],
    vector: Matrix,
    times: tuple[int, float, float, float | None],
) -> None:
    """Insert a record's row, with its checksums and its `search_text`; a trigger adds the words to the word index.

    Args:
        connection: a connection to the database, in a transaction.
        number: the record's number in the database, for the column `label`.
        texts: id, text, metadata as JSON, and class label.
        vector: float32 (dimensions,).
        times: revision; then create, update and expire time as floats, in seconds since 1970. The expire time may be
            None: never.

    Raises:
        sqlite3.Error: the row cannot be inserted.
    """
    values = Row(number, *texts, vector.astype("<f4").tobytes(), *times, None, None, None, search_text(texts[1]))
    connection.execute(_INSERT, (*values[:-4], *values.checksums(), values.search_text))
