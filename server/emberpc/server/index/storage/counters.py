"""Counters of a collection's database: the sequence of the last write, and the greatest label ever assigned.

A label is here the number of a record's row, not its class. The function `problem` checks the counters when a
collection is opened, verified, backed up or restored, and before records are inserted or replaced. A deletion checks
only the sequence.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from emberpc.server.errors import Code, ServiceError

#: Greatest valid value of a counter. SQLite's integers end at 2**63 - 1, so enough numbers remain for later writes.
LARGEST = 2**62
#: Selects the labels of the records, in ascending order, but only labels from 1 to `LARGEST`: a record with another
#: label is damaged.
SELECT_LABELS = f"SELECT label FROM records WHERE label BETWEEN 1 AND {LARGEST} ORDER BY label"  # noqa: S608 - ours
# Reads both counters, each after the number of rows of its table, which is 1 if the table is undamaged (0 for labels
# before the first insert). A counter that is not an integer becomes NULL, as if it were missing.
_READ = """SELECT
    (SELECT count(*) FROM state),
    (SELECT CASE WHEN typeof(sequence) = 'integer' THEN sequence END FROM state),
    (SELECT count(*) FROM sqlite_sequence),
    (SELECT CASE WHEN typeof(seq) = 'integer' THEN seq END FROM sqlite_sequence WHERE name = 'records')"""


def problem(connection: sqlite3.Connection, newest_label: int = 0, newest_revision: int = 0) -> str:
    """Return a description of the first problem found in the counters of a database; empty if they are valid.

    A counter must be an integer from 0 to `LARGEST`, and not less than the argument that belongs to it. If there is no
    counter of labels, as before the first insert, it counts as 0.

    Args:
        connection: a connection to the database.
        newest_label: the greatest label of the undamaged records; 0 if it is not known.
        newest_revision: the greatest revision of the undamaged records, for the sequence; 0 if it is not known.

    Raises:
        sqlite3.Error: the database fails.
    """
    states, sequence, counted, greatest = connection.execute(_READ).fetchone()
    if states != 1 or sequence is None:
        return "the number of its last write is missing"
    if not 0 <= sequence <= LARGEST:
        return f"the number of its last write is {sequence}, which is not within 0 to 2**62"
    if sequence < newest_revision:
        return f"the number of its last write is {sequence}, but a record has revision {newest_revision}"
    if counted > 1 or (counted and greatest is None):
        return "the number of its last record is missing"
    if not newest_label <= (greatest or 0) <= LARGEST:
        return f"the number of its last record is {greatest or 0}, which is not within {newest_label} to 2**62"
    return ""


def next_label(connection: sqlite3.Connection, subject: str) -> int:
    """Return a new label: one more than the counter of labels or the greatest present label, whichever is greater.

    Present labels of 2**61 and more are ignored. The counter is not changed: SQLite updates it when the row is
    inserted.

    Args:
        connection: a connection to the database.
        subject: name of the database in messages.

    Raises:
        ServiceError: INTERNAL if the counter of labels is not an integer. Its range is not checked.
        sqlite3.Error: the database fails.
    """
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
    # Labels from 2**61 on can only come from damage. They are ignored, since a label after them may exceed `LARGEST`.
    (present,) = connection.execute(f"SELECT max(label) FROM records WHERE label < {LARGEST // 2}").fetchone()  # noqa: S608 - ours
    return max(integer_of(row, subject) if row else 0, present or 0) + 1


def check(connection: sqlite3.Connection, subject: str) -> None:
    """Raise an error if a counter of a database is damaged; `subject` is the database's name in messages.

    Raises:
        ServiceError: INTERNAL if a counter is damaged.
        sqlite3.Error: the database fails.
    """
    if found := problem(connection):
        raise damaged(subject, found)


def damaged(subject: str, found: str = "") -> ServiceError:
    """Return the error INTERNAL for damaged counters of a database.

    Args:
        subject: name of the database in the message.
        found: what is wrong with the counters, a result of `problem`; empty: not known.
    """
    what = f": {found}" if found else ""
    message = (
        f"a counter in the database of {subject} is damaged{what}; restore a backup, or copy its records to a new "
        "collection"
    )
    return ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")


def integer_of(row: tuple[Any, ...] | None, subject: str) -> int:
    """Return the only value of `row`, the row of a counter; the range of the value is not checked.

    Raises:
        ServiceError: INTERNAL, which names the database `subject`, if `row` is None or the value is no integer.
    """
    if row is None or type(row[0]) is not int:
        raise damaged(subject)
    return int(row[0])
