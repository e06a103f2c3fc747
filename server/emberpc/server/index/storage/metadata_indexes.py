"""Indexes on fields of the metadata, and what they ask of those who delete rows."""

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
    """Make those indexes of a collection that are not there; one that damaged metadata keeps from being, later.

    Raises:
        sqlite3.Error: it failed otherwise.
    """
    for field in filter(can_be_indexed, spec.indexed_fields):
        try:
            connection.execute(index_statement(field))
        except sqlite3.OperationalError as error:
            if not is_of_metadata(error):
                raise
            # Searches are slower without it, and right.
            log.warning("collection %s: no index on %s: see what VerifyCollection finds", spec.name, field)


def delete_rows(connection: sqlite3.Connection, spec: CollectionSpec, labels: Iterable[int]) -> None:
    """Delete the rows of some labels, damaged or not.

    Raises:
        sqlite3.Error: it failed.
    """
    parameters = [(label,) for label in labels]
    try:
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
    except sqlite3.OperationalError as error:
        if not is_of_metadata(error):
            raise
        # An index reads the metadata of a row before it lets go of it.
        for field in filter(can_be_indexed, spec.indexed_fields):
            connection.execute(drop_index_statement(field))
        connection.executemany("DELETE FROM records WHERE label = ?", parameters)
        make_indexes(connection, spec)
