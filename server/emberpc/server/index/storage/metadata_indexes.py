"""Creation of indexes on metadata fields, and deletion of rows even if these indexes fail because of damage."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable

from emberpc.server.collections.filters import can_be_indexed
from emberpc.server.collections.types import CollectionSpec
from emberpc.server.index.storage.damage import is_of_metadata
from emberpc.server.index.storage.filter_sql import drop_index_statement, index_statement

log = logging.getLogger(__name__)


def make_indexes(connection: sqlite3.Connection, spec: CollectionSpec) -> None:
    """Create the missing metadata indexes of a collection, those of `spec.indexed_fields`.

    Fields that SQLite cannot index are skipped. If damaged metadata prevents an index, a warning is logged and the
    index is skipped.

    Raises:
        sqlite3.Error: an index cannot be created for another reason.
    """
    for field in filter(can_be_indexed, spec.indexed_fields):
        try:
            connection.execute(index_statement(field))
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
            # Without the index, searches are slower, but their results are the same.
            log.warning("collection %s: no index on %s: see what VerifyCollection finds", spec.name, field)


def delete_rows(connection: sqlite3.Connection, spec: CollectionSpec, labels: Iterable[int]) -> None:
    """Delete the rows with the given labels, damaged or not; missing labels are ignored.

    If damaged metadata prevents the deletion, the metadata indexes are dropped before it, and created again after it by
    `make_indexes`, which leaves out an index if damaged metadata of another row prevents it.

    Raises:
        sqlite3.Error: the deletion failed for another reason.
    """
    parameters = [(label,) for label in labels]
    try:
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
    except sqlite3.OperationalError as error:
        if not is_of_metadata(error):
            raise
        # To remove a row from a metadata index, SQLite evaluates the row's metadata, which fails if that is damaged.
        for field in filter(can_be_indexed, spec.indexed_fields):
            connection.execute(drop_index_statement(field))
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
        make_indexes(connection, spec)
