"""Creation of indexes on metadata fields, and deletion of rows in spite of them."""

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
    """Create the missing metadata indexes of a collection; an index that damaged metadata prevents is skipped.

    Raises:
        sqlite3.Error: it failed otherwise.
    """
    for field in filter(can_be_indexed, spec.indexed_fields):
        try:
            connection.execute(index_statement(field))
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
            # Searches without the index are slower, and their results are the same.
            log.warning("collection %s: no index on %s: see what VerifyCollection finds", spec.name, field)


def delete_rows(connection: sqlite3.Connection, spec: CollectionSpec, labels: Iterable[int]) -> None:
    """Delete rows by label, damaged or not.

    Raises:
        sqlite3.Error: it failed.
    """
    parameters = [(label,) for label in labels]
    try:
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
    except sqlite3.OperationalError as error:
        if not is_of_metadata(error):
            raise
        # An index must evaluate the metadata of a row to remove it, which fails for damaged metadata.
        for field in filter(can_be_indexed, spec.indexed_fields):
            connection.execute(drop_index_statement(field))
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
        make_indexes(connection, spec)
