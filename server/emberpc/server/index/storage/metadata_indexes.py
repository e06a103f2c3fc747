"""Creation of indexes on metadata fields, and deletion of rows whose damaged metadata the indexes cannot read."""

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
    """Create the missing indexes on the fields of `spec.indexed_fields`.

    Fields that SQLite cannot index (`can_be_indexed`) are skipped. If the metadata of a record is damaged and not JSON,
    no index can be created; a warning is logged for each.

    Raises:
        sqlite3.Error: an index cannot be created for another reason.
    """
    for field in filter(can_be_indexed, spec.indexed_fields):
        try:
            connection.execute(index_statement(field))
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
            # No error is raised: without the index, filters on the field are slower, but select the same records.
            log.warning("collection %s: no index on %s: see what VerifyCollection finds", spec.name, field)


def delete_rows(connection: sqlite3.Connection, spec: CollectionSpec, labels: Iterable[int]) -> None:
    """Delete the rows with the given labels (numbers of records), damaged or not; missing labels are ignored.

    If the deletion fails because the metadata of a row is not JSON, drop the metadata indexes, delete the rows, and
    create the indexes again by `make_indexes`. It creates none if another row has such metadata. The caller holds a
    transaction.

    Raises:
        sqlite3.Error: the rows cannot be deleted, or the indexes not dropped or created, for another reason.
    """
    parameters = [(label,) for label in labels]
    try:
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
    except sqlite3.OperationalError as error:
        if not is_of_metadata(error):
            raise
        # To remove a row from a metadata index, SQLite reads the row's metadata, and fails if the metadata is not JSON.
        for field in filter(can_be_indexed, spec.indexed_fields):
            connection.execute(drop_index_statement(field))
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
        make_indexes(connection, spec)
