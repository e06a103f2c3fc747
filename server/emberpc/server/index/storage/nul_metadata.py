"""Filters over records whose metadata contains NUL (U+0000), which older versions accepted.

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
# escaped backslash before `u0000`. Python then evaluates filters on that record too, with the right result.
_HOLDS_NUL = r"instr(metadata, '\u0000') > 0"
# The name of this index has the prefix of metadata indexes, so that backups leave it out.
_INDEX = f"CREATE INDEX IF NOT EXISTS {INDEX_PREFIX}nul ON records (label) WHERE {_HOLDS_NUL}"


def make_index(connection: sqlite3.Connection, subject: str) -> None:
    """Create the index of records whose metadata contains NUL, if it is missing; an OperationalError is only logged.

    With the index, `compiled` finds in microseconds that there are no such records. `subject` names the database.
    """
    try:
        connection.execute(_INDEX)
    except sqlite3.OperationalError:
        # The cause may be a full disk. Without the index, every search with a filter reads all metadata once more.
        log.warning("%s: no index of metadata with NUL characters", subject, exc_info=True)


def compiled(connection: sqlite3.Connection, condition: Filter) -> Clause:
    """Compile a filter to a clause that is right also for records whose metadata contains NUL.

    The clause lists the labels of such records that meet the filter, so it is valid only for the present records.

    Args:
        connection: a connection to the database, from which records with NUL are read.
        condition: the filter, validated.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if the call was cancelled.
        sqlite3.Error: the database fails.
    """
    clause = compile_filter(condition)
    statement = f"SELECT label, CAST(metadata AS BLOB) FROM records WHERE {_HOLDS_NUL}"  # noqa: S608 - our own condition
    holds_nul = False
    found = []
    # Rows are read one at a time, since an old collection may have too many records with NUL to hold in memory.
    for label, document in connection.execute(statement):
        cancellation.check()
        holds_nul = True
        with suppress(*DAMAGE_ERRORS):
            if matches(condition, json.loads(document)):
                found.append(label)
    if not holds_nul:
        return clause
    # The deepest clause comes first, since SQLite's parser then needs fewer stack entries (see `filter_sql`).
    sql = f"(({clause.sql} AND NOT {_HOLDS_NUL}) OR label IN (SELECT value FROM json_each(?)))"  # noqa: S608 - ours
    return Clause(sql, (*clause.parameters, json.dumps(found)), clause.depth + 2)
