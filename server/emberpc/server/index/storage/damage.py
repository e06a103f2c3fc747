"""What of a collection's records is damaged on disk: read past, told once, and left out of answers from then on.

A record that is damaged must cost no other its service, and SQLite fails a whole statement over one bad value.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from emberpc.server.collections.metric import are_fit
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix, StoredRecord
from emberpc.server.errors import ServiceError
from emberpc.server.index.storage.rows import has_vector, is_sound_vector, record_of

log = logging.getLogger(__name__)

_NOT_JSON = "malformed JSON"
_NOT_UTF8 = "Could not decode to UTF-8"
#: Put before a statement, lets it see only the records whose metadata is JSON. The CASE: SQLite may look at the
#: statement's own conditions first.
_SOUND_ONLY = """WITH records AS (
    SELECT label, id, text, CASE WHEN json_valid(metadata) THEN metadata END AS metadata, class_label, vector, revision,
        created, updated, expires, checksum, text_checksum, row_checksum
    FROM main.records WHERE json_valid(metadata)
) """


class Damage:
    """Reads a collection's rows past what is damaged. Safe to use from several threads.

    Args:
        spec: the collection.
    """

    def __init__(self, spec: CollectionSpec) -> None:
        self._spec = spec
        self._labels: frozenset[int] = frozenset()

    def select(
        self, connection: sqlite3.Connection, statement: str, parameters: Iterable[object] = ()
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a statement that reads.

        A text that is no UTF-8 comes as bytes. Where conditions look at metadata that is no JSON, the records that
        have such are passed over.

        Raises:
            sqlite3.Error: it failed otherwise.
        """
        values = tuple(parameters)
        try:
            return _select(connection, statement, values)
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
        for label, record_id in _select(connection, "SELECT label, id FROM records WHERE NOT json_valid(metadata)", ()):
            self._note(label, f"record {record_id!r}")
        return _select(connection, _SOUND_ONLY + statement, values)

    def records(self, rows: Iterable[Sequence[Any]], *, with_vectors: bool) -> Iterator[tuple[int, StoredRecord]]:
        """Return label and record of each row of `rows.columns_of(with_vectors)` that is not damaged."""
        for row in rows:
            try:
                yield row[0], record_of(row, self._spec, with_vectors=with_vectors)
            except ServiceError as error:
                self._note(row[0], f"record {error.metadata['record']!r}")

    def vectors(self, rows: Sequence[Sequence[Any]], *, checked: bool = True) -> tuple[Labels, Matrix]:
        """Return labels and vectors of rows of `rows.VECTOR_COLUMNS`: int64 (n,) and float32 (n, dimensions).

        One that is damaged, or whose record is known to be, is left out.

        Args:
            rows: the rows.
            checked: whether to compute checksums. If not, the rows may have only `rows.UNCHECKED_COLUMNS`, and a vector
                of the right size that is fit to be compared is taken to be sound.
        """
        size = 4 * self._spec.dimensions
        if checked:
            whole = [row for row in rows if is_sound_vector(row, size)]
        else:
            whole = [row for row in rows if has_vector(row, size)]
        data = b"".join([row[1] for row in whole])
        matrix: Matrix = np.frombuffer(data, dtype="<f4").reshape(len(whole), self._spec.dimensions)
        labels = np.array([row[0] for row in whole], dtype=np.int64)
        fit = are_fit(matrix, self._spec.distance)
        if len(whole) < len(rows) or not fit.all():
            labels, matrix = labels[fit], matrix[fit]
            for label in {row[0] for row in rows} - set(labels.tolist()):
                self._note(label, f"the vector of record number {label}")
        sound = self._are_sound(labels)
        return (labels, matrix) if sound.all() else (labels[sound], matrix[sound])

    def note_record(self, label: int, record_id: object) -> None:
        """Take note that a record is damaged: the log says so once, and its vector is left out from then on."""
        self._note(label, f"record {record_id!r}")

    def sound(self, labels: Labels) -> Labels:
        """Return those of the labels, int64 (n,), that are not known to be damaged."""
        found: Labels = labels[self._are_sound(labels)]
        return found

    def _are_sound(self, labels: Labels) -> np.ndarray[Any, np.dtype[np.bool_]]:
        damaged = self._labels
        return ~np.isin(labels, list(damaged)) if damaged else np.ones(len(labels), dtype=bool)

    def _note(self, label: int, what: str) -> None:
        if label not in self._labels:
            self._labels |= {label}
            log.error(
                "collection %s: %s is damaged on disk and left out of answers; see what VerifyCollection finds",
                self._spec.name,
                what,
            )


def is_of_metadata(error: sqlite3.OperationalError) -> bool:
    """Return whether metadata that is no JSON made a statement fail."""
    return str(error) == _NOT_JSON


def lenient_text(data: bytes) -> str | bytes:
    """Return a text as SQLite holds it, as bytes if it is no UTF-8. To be a connection's `text_factory`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _select(connection: sqlite3.Connection, statement: str, parameters: tuple[object, ...]) -> list[tuple[Any, ...]]:
    try:
        return connection.execute(statement, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if not str(error).startswith(_NOT_UTF8):
            raise
    # Only where it must be: a call for every text takes its time.
    usual, connection.text_factory = connection.text_factory, lenient_text
    try:
        return connection.execute(statement, parameters).fetchall()
    finally:
        connection.text_factory = usual
