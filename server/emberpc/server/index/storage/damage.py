"""Reading of rows in spite of damage on disk: a damaged record is logged, and left out of searches and pages.

A single damaged value can make SQLite fail a whole statement: a text that is not UTF-8, or metadata that is not JSON. A
damaged record must not make other records unavailable.
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
from emberpc.server.index.storage.rows import has_intact_vector, has_vector, record_of

log = logging.getLogger(__name__)

_NOT_JSON = "malformed JSON"
_NOT_UTF8 = "Could not decode to UTF-8"
#: Prefix that hides the records whose metadata is not JSON from the SELECT statement after the prefix. The CASE is
#: needed because SQLite may evaluate the conditions of that statement before the condition `json_valid` of the prefix.
_VALID_JSON_ONLY = """WITH records AS (
    SELECT label, id, text, CASE WHEN json_valid(metadata) THEN metadata END AS metadata, class_label, vector, revision,
        created, updated, expires, checksum, text_checksum, row_checksum
    FROM main.records WHERE json_valid(metadata)
) """


class DamageFilter:
    """Reads a collection's rows and skips damaged ones. Safe to use from several threads.

    A damaged record is marked and logged. The mark lasts as long as this object, so the record is not logged again.

    Args:
        spec: the spec of the collection.
    """

    def __init__(self, spec: CollectionSpec) -> None:
        self._spec = spec
        self._labels: frozenset[int] = frozenset()

    def select(
        self, connection: sqlite3.Connection, statement: str, parameters: Iterable[object] = ()
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a SELECT statement, in the statement's order.

        A text that is not UTF-8 is returned as bytes. If the statement fails because it reads metadata that is not
        JSON, all records with metadata that is not JSON are marked as damaged, logged and skipped.

        Args:
            connection: a connection to the database.
            statement: SQL that starts with SELECT.
            parameters: values of the statement's placeholders, in order.

        Raises:
            sqlite3.Error: the statement failed for another reason.
        """
        values = tuple(parameters)
        try:
            return _select(connection, statement, values)
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
        for label, record_id in _select(connection, "SELECT label, id FROM records WHERE NOT json_valid(metadata)", ()):
            self._note(label, f"record {record_id!r}")
        return _select(connection, _VALID_JSON_ONLY + statement, values)

    def records(self, rows: Iterable[Sequence[Any]], *, with_vectors: bool) -> Iterator[tuple[int, StoredRecord]]:
        """Yield label and record of each undamaged row. Damaged rows are skipped, marked as damaged and logged once.

        Args:
            rows: rows of the columns `rows.columns_of(with_vectors)`.
            with_vectors: whether the records contain their vectors. If not, damage of vectors is not noticed.
        """
        for row in rows:
            try:
                yield row[0], record_of(row, self._spec, with_vectors=with_vectors)
            except ServiceError as error:
                self._note(row[0], f"record {error.metadata['record']!r}")

    def vectors(self, rows: Sequence[Sequence[Any]], *, checked: bool = True) -> tuple[Labels, Matrix]:
        """Return labels and vectors, not prepared, in the order of the rows: int64 (n,) and float32 (n, dimensions).

        Damaged vectors are left out, marked as damaged and logged once. Vectors of records that were marked as damaged
        before are left out too.

        Args:
            rows: rows of the columns `rows.VECTOR_COLUMNS`; if not `checked`, `rows.UNCHECKED_COLUMNS` suffice.
            checked: whether to verify checksums. A vector must also have the right size, and be one that can be
                compared (`are_fit`); without `checked`, such a vector counts as undamaged.
        """
        size = 4 * self._spec.dimensions
        if checked:
            whole = [row for row in rows if has_intact_vector(row, size)]
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
        sound = self._are_undamaged(labels)
        return (labels, matrix) if sound.all() else (labels[sound], matrix[sound])

    def note_record(self, label: int, record_id: object) -> None:
        """Mark the record with a label as damaged: log its id, unless the record was marked before.

        Later results of `vectors` and `undamaged` leave the record out.
        """
        self._note(label, f"record {record_id!r}")

    def undamaged(self, labels: Labels) -> Labels:
        """Return the labels whose records are not marked as damaged, int64, in the given order."""
        found: Labels = labels[self._are_undamaged(labels)]
        return found

    def _are_undamaged(self, labels: Labels) -> np.ndarray[Any, np.dtype[np.bool_]]:
        damaged = self._labels
        return ~np.isin(labels, list(damaged)) if damaged else np.ones(len(labels), dtype=bool)

    def _note(self, label: int, item: str) -> None:
        if label not in self._labels:
            self._labels |= {label}
            log.error(
                "collection %s: %s is damaged on disk and left out of answers; see what VerifyCollection finds",
                self._spec.name,
                item,
            )


def is_of_metadata(error: sqlite3.OperationalError) -> bool:
    """Return whether an error of a statement means that the metadata of a record is not JSON."""
    return str(error) == _NOT_JSON


def lenient_text(data: bytes) -> str | bytes:
    """Decode a text of SQLite; return `data` itself if it is not UTF-8. Serves as a connection's `text_factory`."""
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
    # `text_factory` is set only after a failure, since calling a Python function for every text is slow.
    usual, connection.text_factory = connection.text_factory, lenient_text
    try:
        return connection.execute(statement, parameters).fetchall()
    finally:
        connection.text_factory = usual
