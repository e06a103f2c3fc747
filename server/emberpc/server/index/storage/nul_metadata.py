"""Filters over records whose metadata contains NUL (U+0000), which older versions accepted.

SQLite's JSON functions end a string at NUL, so `"a\\0b"` would equal `"a"`. These records are compared in Python.
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

# JSON holds NUL as an escape only. An escaped backslash before `u0000` matches too, which does no harm.
_HOLDS_NUL = r"instr(metadata, '\u0000') > 0"
# Its name is that of a metadata index, so that backups leave it out.
_INDEX = f"CREATE INDEX IF NOT EXISTS {INDEX_PREFIX}nul ON records (label) WHERE {_HOLDS_NUL}"


def make_index(connection: sqlite3.Connection, subject: str) -> None:
    """Create the index of these records if it is missing, so that finding none takes microseconds."""
    try:
        connection.execute(_INDEX)
    except sqlite3.OperationalError:
        # As on a full disk. Every filter then reads all metadata once more.
        log.warning("%s: no index of metadata with NUL characters", subject, exc_info=True)


def compiled(connection: sqlite3.Connection, condition: Filter) -> Clause:
    """Compile a filter to SQL that means the same for the records that the database has now.

    Raises:
        ServiceError: the call was cancelled, see `cancellation`.
        sqlite3.Error: the database fails.
    """
    clause = compile_filter(condition)
    statement = f"SELECT label, CAST(metadata AS BLOB) FROM records WHERE {_HOLDS_NUL}"  # noqa: S608 - our own condition
    holds_nul = False
    found = []
    # One row at a time: an old collection may have any number of them.
    for label, document in connection.execute(statement):
        cancellation.check()
        holds_nul = True
        with suppress(*DAMAGE_ERRORS):
            if matches(condition, json.loads(document)):
                found.append(label)
    if not holds_nul:
        return clause
    # The deepest first, as in `filter_sql`.
    sql = f"(({clause.sql} AND NOT {_HOLDS_NUL}) OR label IN (SELECT value FROM json_each(?)))"  # noqa: S608 - ours
    return Clause(sql, (*clause.parameters, json.dumps(found)), clause.depth + 2)
