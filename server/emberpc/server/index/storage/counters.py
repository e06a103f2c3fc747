"""Counters of a collection's database: the sequence of the last write, and the greatest label ever assigned.

Opening, verification, backups, writes and restoring apply the same check.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from emberpc.server.errors import Code, ServiceError

#: Limit of a counter; greater ones would leave no numbers for later writes.
MOST = 2**62
#: Selects the possible labels; a record with another one is damaged.
SELECT_LABELS = f"SELECT label FROM records WHERE label BETWEEN 1 AND {MOST} ORDER BY label"  # noqa: S608 - ours
# A value of another type counts as missing.
_READ = """SELECT
    (SELECT count(*) FROM state),
    (SELECT CASE WHEN typeof(sequence) = 'integer' THEN sequence END FROM state),
    (SELECT count(*) FROM sqlite_sequence),
    (SELECT CASE WHEN typeof(seq) = 'integer' THEN seq END FROM sqlite_sequence WHERE name = 'records')"""


def problem(connection: sqlite3.Connection, newest_label: int = 0, newest_revision: int = 0) -> str:
    """Return what is wrong with the counters; empty if nothing is.

    Args:
        connection: the database.
        newest_label: the greatest label of the undamaged records; 0 if it is not known.
        newest_revision: the greatest revision of the undamaged records; 0 if it is not known.

    Raises:
        sqlite3.Error: the database fails.
    """
    states, sequence, counted, greatest = connection.execute(_READ).fetchone()
    if states != 1 or sequence is None:
        return "the number of its last write is missing"
    if not 0 <= sequence <= MOST:
        return f"the number of its last write is {sequence}, which is not within 0 to 2**62"
    if sequence < newest_revision:
        return f"the number of its last write is {sequence}, but a record has revision {newest_revision}"
    if counted > 1 or (counted and greatest is None):
        return "the number of its last record is missing"
    if not newest_label <= (greatest or 0) <= MOST:
        return f"the number of its last record is {greatest or 0}, which is not within {newest_label} to 2**62"
    return ""


def next_label(connection: sqlite3.Connection, subject: str) -> int:
    """Return a label that was never assigned and that no damaged row has; raise INTERNAL if the counter is damaged."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    # A damaged label that is far too great must not use up all labels.
    (present,) = connection.execute(f"SELECT max(label) FROM records WHERE label < {MOST // 2}").fetchone()  # noqa: S608 - ours
    return max(integer_of(row, subject) if row else 0, present or 0) + 1


def check(connection: sqlite3.Connection, subject: str) -> None:
    """Raise INTERNAL if the counters of the database `subject` are damaged.

    Raises:
        ServiceError: they are.
        sqlite3.Error: the database fails.
    """
    if found := problem(connection):
        raise damaged(subject, found)


def damaged(subject: str, found: str = "") -> ServiceError:
    """Return the error for damaged counters of the database `subject`; `found` is the `problem`, if it is known."""
    what = f": {found}" if found else ""
    message = (
        f"a counter in the database of {subject} is damaged{what}; restore a backup, or copy its records to a new "
        "collection"
    )
    return ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")


def integer_of(row: tuple[Any, ...] | None, subject: str) -> int:
    """Return the integer in a row of one column of the database `subject`; raise INTERNAL if it is damaged."""
    if row is None or type(row[0]) is not int:
        raise damaged(subject)
    return int(row[0])
