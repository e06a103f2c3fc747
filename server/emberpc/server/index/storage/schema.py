"""The tables of a collection's database, and the steps from older ones to these.

`PRAGMA user_version` is the number of steps done. A step is never changed once it was released.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.database import transaction
from emberpc.server.index.storage.filter_sql import INDEX_PREFIX
from emberpc.server.index.storage.lexical_terms import search_text
from emberpc.server.index.storage.rows import ROW_COLUMNS, Row, checksum_of_bytes

# The label is the record's number in the graph. AUTOINCREMENT: it is never used again, and an update gets a new one,
# so the graph's content follows from the set of labels alone.
_FIRST = """
BEGIN;
CREATE TABLE records (
    label INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL,
    class_label TEXT NOT NULL,
    vector BLOB NOT NULL,
    revision INTEGER NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL);
INSERT INTO state VALUES (1, 0);
COMMIT;
"""

# The words of the texts. Triggers keep them in the very transaction that writes the records; a record is only ever
# inserted or deleted. Texts themselves are read from `records`.
_WORDS = (
    "CREATE VIRTUAL TABLE words USING fts5(text, content='records', content_rowid='label', "
    "tokenize='porter unicode61')",
    "CREATE TRIGGER words_of_new AFTER INSERT ON records WHEN new.text <> '' "
    "BEGIN INSERT INTO words (rowid, text) VALUES (new.label, new.text); END",
    "CREATE TRIGGER words_of_old AFTER DELETE ON records WHEN old.text <> '' "
    "BEGIN INSERT INTO words (words, rowid, text) VALUES ('delete', old.label, old.text); END",
    "INSERT INTO words (rowid, text) SELECT label, text FROM records WHERE text <> ''",
)

# When a record is gone, in seconds since 1970; NULL: never. The index has only the few records that go at all.
_EXPIRY = (
    "ALTER TABLE records ADD COLUMN expires REAL",
    "CREATE INDEX records_expiring ON records (expires) WHERE expires IS NOT NULL",
)

# `rows.checksum_of` the others; NULL in rows of an older version.
_CHECKSUM = ("ALTER TABLE records ADD COLUMN checksum INTEGER",)

# `rows.text_checksum_of` id, text, metadata and label, so that these are checked without reading the vector. NULL in
# rows of an older version. The step computes none: given a new checksum, a damaged row would pass for whole.
_TEXT_CHECKSUM = ("ALTER TABLE records ADD COLUMN text_checksum INTEGER",)

#: Gives the database an identity that no other has.
IDENTITY_ANEW = "UPDATE state SET identity = lower(hex(randomblob(16)))"

# What says of a snapshot whose it is.
_IDENTITY = ("ALTER TABLE state ADD COLUMN identity TEXT", IDENTITY_ANEW)

#: Computes the texts that are indexed from those that are stored; `_add_functions` has the function.
_SEARCH_TEXTS = (
    "UPDATE records SET search_text = search_text_of(CAST(text AS BLOB)) "
    "WHERE search_text IS NOT search_text_of(CAST(text AS BLOB))"
)
_INDEX_WORDS = "INSERT INTO words (rowid, text) SELECT label, coalesce(search_text, text) FROM records WHERE text <> ''"

#: How the index splits what `words.search_text` gives.
TOKENIZER = "tokenize=\"porter unicode61 remove_diacritics 0 categories 'L* M* N* Co'\""

# An empty index, whatever is there. FTS5 needs its version and its first records to look at a table at all, even to
# delete it.
_NO_WORDS = (
    "DELETE FROM words_config",
    "INSERT INTO words_config VALUES ('version', 4)",
    "INSERT OR REPLACE INTO words_data VALUES (1, x''), (10, x'00000000000000')",
    "INSERT INTO words (words) VALUES ('delete-all')",
)

# The words are those of `words.search_text`, NULL where that is the text itself. The table stores no texts: a trigger
# gives it that of a deleted record. Marks are part of a word; accents were removed before.
_NORMALISED_WORDS = (
    "DROP TRIGGER words_of_new",
    "DROP TRIGGER words_of_old",
    "DROP TABLE words",
    "ALTER TABLE records ADD COLUMN search_text TEXT",
    _SEARCH_TEXTS,
    f"CREATE VIRTUAL TABLE words USING fts5(text, content='', {TOKENIZER})",
    "CREATE TRIGGER words_of_new AFTER INSERT ON records WHEN new.text <> '' "
    "BEGIN INSERT INTO words (rowid, text) VALUES (new.label, coalesce(new.search_text, new.text)); END",
    "CREATE TRIGGER words_of_old AFTER DELETE ON records WHEN old.text <> '' "
    "BEGIN INSERT INTO words (words, rowid, text) "
    "VALUES ('delete', old.label, coalesce(old.search_text, old.text)); END",
    _INDEX_WORDS,
)

# The same tables, with the words as `words.search_text` gives them since it ignores invisible characters and
# compatibility forms. Only texts whose words differ are indexed again.
_FORMLESS_WORDS = (
    "CREATE TEMP TABLE changed (label INTEGER PRIMARY KEY, search_text TEXT)",
    # With a limit, SQLite computes `found` once for each row.
    "INSERT INTO changed SELECT label, found FROM (SELECT label, search_text, "
    "search_text_of(CAST(text AS BLOB)) AS found FROM records WHERE search_text IS NOT NULL LIMIT -1) "
    "WHERE found IS NOT search_text",
    "INSERT INTO words (words, rowid, text) SELECT 'delete', label, coalesce(records.search_text, text) "
    "FROM records JOIN changed USING (label)",
    "UPDATE records SET search_text = (SELECT search_text FROM changed WHERE label = records.label) "
    "WHERE label IN (SELECT label FROM changed)",
    "INSERT INTO words (rowid, text) SELECT label, coalesce(records.search_text, text) "
    "FROM records JOIN changed USING (label)",
    "DROP TABLE changed",
)

# `rows.row_checksum_of` all columns that are served but the vector, so that no checksum may be NULL any more. Rows that
# are there up to the label `unconverted` are given theirs by `_convert`.
_ROW_CHECKSUM = (
    "ALTER TABLE records ADD COLUMN row_checksum INTEGER",
    "ALTER TABLE state ADD COLUMN unconverted INTEGER NOT NULL DEFAULT 0",
    "UPDATE state SET unconverted = coalesce((SELECT max(label) FROM records), 0)",
)

#: What each step does, statement by statement; a new database goes through all of them too.
STEPS: tuple[tuple[str, ...], ...] = (
    _WORDS,
    _EXPIRY,
    _CHECKSUM,
    _IDENTITY,
    _TEXT_CHECKSUM,
    _NORMALISED_WORDS,
    _FORMLESS_WORDS,
    _ROW_CHECKSUM,
)
#: Versions from this one on have all checksums in each row.
CHECKED_VERSION = len(STEPS)
#: Rows that are given checksums in one transaction: the write-ahead log stays small, and what was done stays done.
_CONVERTED_AT_ONCE = 500


def prepare(connection: sqlite3.Connection, what: str, *, create: bool) -> None:
    """Make the tables, or bring those of an older version up to this one's; each step as a whole.

    Args:
        connection: the database.
        what: whose it is, for messages.
        create: it is empty.

    Raises:
        ServiceError: INTERNAL if a newer version wrote it, or its tables are not those of its version.
        sqlite3.Error: it failed.
    """
    if create:
        connection.executescript(_FIRST)
    done = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if done > len(STEPS):
        message = f"{what} was written by a newer version of emberpc; serve it with that, or restore a backup"
        raise ServiceError(Code.INTERNAL, message, reason="NEWER_FORMAT")
    if objects(connection) != _objects_of(max(0, done)):
        message = f"the tables of the database of {what} are not as they were made: it is damaged; restore a backup"
        raise ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")
    _add_functions(connection)
    for number, statements in enumerate(STEPS[done:], done + 1):
        with transaction(connection):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
    _convert(connection, what)


def _convert(connection: sqlite3.Connection, what: str) -> None:
    """Give the rows of an older version the checksums that they lack, if those that they have are right.

    A row that is damaged gets none, and so is damaged still. A row without any checksum is taken to be as it was
    written, unless it came after one with a checksum: then it had one.
    """
    statement = "SELECT label FROM records WHERE checksum IS NOT NULL ORDER BY label LIMIT 1"
    (first,) = connection.execute(statement).fetchone() or (None,)

    def is_whole(row: Row) -> bool:
        return row.was_whole and row.revision > 0 and (row.checksum is not None or first is None or row.label < first)

    usual, connection.text_factory = connection.text_factory, lenient_text
    try:
        while last := _unconverted(connection, what):
            statement = f"SELECT {ROW_COLUMNS} FROM records WHERE label <= ? ORDER BY label DESC LIMIT ?"  # noqa: S608 - ours
            rows = [Row(*values) for values in connection.execute(statement, (last, _CONVERTED_AT_ONCE))]
            with transaction(connection):
                connection.executemany(
                    "UPDATE records SET text_checksum = ?, checksum = ?, row_checksum = ? "
                    "WHERE label = ? AND row_checksum IS NULL",
                    [(*row.checksums(), row.label) for row in rows if is_whole(row)],
                )
                connection.execute("UPDATE state SET unconverted = ?", (rows[-1].label - 1 if rows else 0,))
    finally:
        connection.text_factory = usual


def _unconverted(connection: sqlite3.Connection, what: str) -> int:
    """Return the greatest label of the rows that may lack checksums since an older version wrote them; 0: none do."""
    row = connection.execute("SELECT unconverted FROM state").fetchone()
    if row is None or type(row[0]) is not int:
        message = f"the state of the database of {what} is damaged; restore a backup"
        raise ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")
    return max(0, row[0])


def make(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables of an empty database as they were after so many steps, 0 to all.

    Raises:
        sqlite3.Error: it failed.
    """
    connection.executescript(_FIRST)
    _add_functions(connection)
    for statement in (statement for statements in STEPS[:version] for statement in statements):
        connection.execute(statement)


def objects(connection: sqlite3.Connection) -> list[tuple[bytes, ...]]:
    """Return the tables, indexes, triggers and views of a database as they were declared, without indexes on metadata.

    As bytes, since a damaged one may be no UTF-8.

    Raises:
        sqlite3.Error: they cannot be read.
    """
    return connection.execute(
        "SELECT CAST(type AS BLOB), CAST(name AS BLOB), CAST(tbl_name AS BLOB), CAST(coalesce(sql, '') AS BLOB) "
        "FROM sqlite_master WHERE NOT (type = 'index' AND name GLOB ?) ORDER BY type, name",
        (f"{INDEX_PREFIX}*",),
    ).fetchall()


@cache
def _objects_of(version: int) -> list[tuple[bytes, ...]]:
    """Return the objects of a database after that many steps."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        make(connection, version)
        return objects(connection)


def index_words(connection: sqlite3.Connection) -> None:
    """Index the words of all texts from the beginning, in a database at the last step, whatever it has of them.

    Raises:
        sqlite3.Error: it failed.
    """
    _add_functions(connection)
    for statement in (_SEARCH_TEXTS, *_NO_WORDS, _INDEX_WORDS):
        connection.execute(statement)


def _add_functions(connection: sqlite3.Connection) -> None:
    """Add the functions that the steps use; triggers use none, so that any SQLite can write to the database."""
    connection.create_function("search_text_of", 1, _search_text_of, deterministic=True)


def add_checksum_function(connection: sqlite3.Connection) -> None:
    """Add `text_checksum_of`, which takes id, text, metadata and label as bytes."""
    connection.create_function("text_checksum_of", 4, _checksum_of_bytes, deterministic=True)


def _checksum_of_bytes(*texts: bytes) -> int | None:
    """Return the checksum of a record's texts; None if one is missing."""
    return None if None in texts else checksum_of_bytes(texts)


def _search_text_of(data: bytes) -> str | None:
    # A damaged text must not keep its collection from being opened.
    return search_text(data.decode(errors="replace"))
