"""Filters over records whose metadata contains NUL (U+0000), which older versions accepted and backups may contain.

SQLite's JSON functions end a string at NUL, so `"a\\0b"` would equal `"a"`. Python evaluates filters on these records.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from contextlib import suppress

from emberpc.server import cancellation
from emberpc.server.collections.filters import Filter, matches
from emberpc.server.index.storage.filter_sql import INDEX_PREFIX, Clause, compile_filter
from emberpc.server.index.storage.rows import DAMAGE_ERRORS

log = logging.getLogger(__name__)

# SQL condition for metadata with NUL, which JSON can contain only as an escape. The condition is also true for an
# escaped backslash before `u0000`, so Python evaluates filters on a few records without NUL too.
_HOLDS_NUL = r"instr(metadata, '\u0000') > 0"
# The name of the index has the prefix of metadata indexes, so that backups and the check of the tables leave it out.
_INDEX = f"CREATE INDEX IF NOT EXISTS {INDEX_PREFIX}nul ON records (label) WHERE {_HOLDS_NUL}"


def make_index(connection: sqlite3.Connection, subject: str) -> None:
    """Create the index of records whose metadata contains NUL, if the index is missing.

    With the index, `compiled` finds in microseconds that there are no such records. A `sqlite3.OperationalError` is
    only logged, with `subject` as the database's name.

    Raises:
        sqlite3.Error: another error, as of a damaged database.
    """
    try:
        connection.execute(_INDEX)
    except sqlite3.OperationalError:
        # The cause may be a full disk. No error is raised: without the index, `compiled` reads the metadata of all
        # records, which is slower, with the same result.
        log.warning("%s: no index of metadata with NUL characters", subject, exc_info=True)


def compiled(connection: sqlite3.Connection, condition: Filter) -> Clause:
    """Compile a filter to an SQL clause that selects the right records, also those whose metadata contains NUL.

    Python evaluates the filter on the records with NUL. The clause lists the numbers (column `label`) of those that
    meet the filter, so the clause is right only for the records that are present now. A record with NUL whose metadata
    is damaged and not JSON does not meet the filter.

    Args:
        connection: a connection to the database.
        condition: the filter, validated.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if the call was cancelled while records were read.
        sqlite3.Error: the database fails, or the call was cancelled during a statement.
    """
    clause = compile_filter(condition)
    statement = f"SELECT label, CAST(metadata AS BLOB) FROM records WHERE {_HOLDS_NUL}"  # noqa: S608 - our own condition
    holds_nul = False
    found = []
    # Rows are read one at a time, since the metadata of all records with NUL may not fit into memory.
    for label, metadata_text in connection.execute(statement):
        cancellation.check()
        holds_nul = True
        with suppress(*DAMAGE_ERRORS):
            if matches(condition, json.loads(metadata_text)):
                found.append(label)
    if not holds_nul:
        return clause
    # The deepest clause comes first, since SQLite's parser then needs fewer stack entries (see `filter_sql._join`).
    sql = f"(({clause.sql} AND NOT {_HOLDS_NUL}) OR label IN (SELECT value FROM json_each(?)))"  # noqa: S608 - ours
    return Clause(sql, (*clause.parameters, json.dumps(found)), clause.depth + 2)
