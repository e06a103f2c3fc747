"""Tables of a collection's database, and the migration steps from older versions.

`PRAGMA user_version` is the number of steps that a database has had. A released step is never changed: the tables of
databases that had the step would differ from those that the changed step makes, and count as damaged.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import cache

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage.counters import integer_of
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.database import transaction
from emberpc.server.index.storage.filter_sql import INDEX_PREFIX
from emberpc.server.index.storage.lexical_terms import search_text
from emberpc.server.index.storage.rows import ROW_COLUMNS, Row, checksum_of_bytes

# Tables before the first step. `class_label` is the record's label. `label` is a number that names the record's vector
# in the graph; each write of a record gives a new number. AUTOINCREMENT: SQLite remembers the greatest number ever
# assigned, so that no number is reused: a number always means the same vector.
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

# The first word index, which `_NORMALISED_WORDS` replaces. Triggers update it in the transaction that writes records.
# No statement updates a text, so there are triggers for INSERT and DELETE only. FTS5 reads the texts from `records`.
_WORDS = (
    "CREATE VIRTUAL TABLE words USING fts5(text, content='records', content_rowid='label', "
    "tokenize='porter unicode61')",
    "CREATE TRIGGER words_of_new AFTER INSERT ON records WHEN new.text <> '' "
    "BEGIN INSERT INTO words (rowid, text) VALUES (new.label, new.text); END",
    "CREATE TRIGGER words_of_old AFTER DELETE ON records WHEN old.text <> '' "
    "BEGIN INSERT INTO words (words, rowid, text) VALUES ('delete', old.label, old.text); END",
    "INSERT INTO words (rowid, text) SELECT label, text FROM records WHERE text <> ''",
)

# Adds the time at which a record expires, in seconds since 1970; NULL: never. The index holds only records that expire.
_EXPIRY = (
    "ALTER TABLE records ADD COLUMN expires REAL",
    "CREATE INDEX records_expiring ON records (expires) WHERE expires IS NOT NULL",
)

# Adds the checksum of a row's texts and vector, see `rows.checksum_of`; NULL in older rows until `_convert`.
_CHECKSUM = ("ALTER TABLE records ADD COLUMN checksum INTEGER",)

# Adds the checksum of a row's texts, see `rows.text_checksum_of`, by which texts are checked without the vector. NULL
# in older rows until `_convert`, which checks a row before it adds checksums. The step cannot check: a checksum that it
# computed would make a damaged row count as undamaged.
_TEXT_CHECKSUM = ("ALTER TABLE records ADD COLUMN text_checksum INTEGER",)

#: Statement that gives a database a new random identity.
NEW_IDENTITY = "UPDATE state SET identity = lower(hex(randomblob(16)))"

# Adds the identity. A snapshot and the file `acknowledged` have the identity of the database to which they belong.
_IDENTITY = ("ALTER TABLE state ADD COLUMN identity TEXT", NEW_IDENTITY)

#: Statement that corrects the column `search_text`, the prepared text, of all records where it is wrong or missing;
#: `_add_functions` adds its function `search_text_of`.
_SEARCH_TEXTS = (
    "UPDATE records SET search_text = search_text_of(CAST(text AS BLOB)) "
    "WHERE search_text IS NOT search_text_of(CAST(text AS BLOB))"
)
#: Statement that fills an empty word index: with `search_text`, or where that is NULL with `text`. Empty texts are left
#: out.
_INDEX_WORDS = "INSERT INTO words (rowid, text) SELECT label, coalesce(search_text, text) FROM records WHERE text <> ''"

#: Option that chooses FTS5's tokenizer for texts prepared by `lexical_terms.search_text`. Words consist of the
#: characters that `lexical_terms` keeps in words (the categories): letters, marks, numbers, and private-use characters,
#: which some texts use for letters of their own. `porter` stems English words.
TOKENIZER = "tokenize=\"porter unicode61 remove_diacritics 0 categories 'L* M* N* Co'\""

# Statements that empty the word index, even if its content is damaged. FTS5 opens a table, even to empty it, only if it
# finds a version in `words_config`, and the rows 1 and 10 of `words_data`, so these are written before.
_NO_WORDS = (
    "DELETE FROM words_config",
    "INSERT INTO words_config VALUES ('version', 4)",
    "INSERT OR REPLACE INTO words_data VALUES (1, x''), (10, x'00000000000000')",
    "INSERT INTO words (words) VALUES ('delete-all')",
)

# Replaces the word index by an index of prepared texts, see `lexical_terms.search_text`. The column `search_text` holds
# the prepared text, NULL where the text itself is indexed (ASCII). The FTS5 table stores no texts, so a trigger passes
# it the text of a deleted record. The tokenizer counts marks as part of a word, since accents are removed before.
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

# Prepares the texts again, for databases whose texts were prepared when `lexical_terms.search_text` did not yet remove
# invisible characters and compatibility forms. Only texts whose prepared text changes are indexed again.
_FORMLESS_WORDS = (
    "CREATE TEMP TABLE changed (label INTEGER PRIMARY KEY, search_text TEXT)",
    # LIMIT -1 limits nothing. It keeps SQLite from computing `found` twice for a row: in result and condition.
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

# Adds the checksum of a row's texts and numbers, see `rows.row_checksum_of`. Rows that exist at this step have labels
# up to `unconverted`. `_convert` adds the missing checksums of the undamaged ones. A row that then lacks a checksum is
# damaged.
_ROW_CHECKSUM = (
    "ALTER TABLE records ADD COLUMN row_checksum INTEGER",
    "ALTER TABLE state ADD COLUMN unconverted INTEGER NOT NULL DEFAULT 0",
    "UPDATE state SET unconverted = coalesce((SELECT max(label) FROM records), 0)",
)

#: Statements of each step, the first step first; a new database goes through all steps too. New steps are appended.
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
#: Number of steps after which each undamaged row has all three checksums: the number of all steps, but only while
#: `_ROW_CHECKSUM` is the last step.
CHECKED_VERSION = len(STEPS)
#: Version of two kinds of databases: those that had the steps up to `_FORMLESS_WORDS`, and those that had
#: `_ROW_CHECKSUM` as step 7, which was so in the commits from 5afe5d74 to 36243cf3, before `_FORMLESS_WORDS` was
#: inserted. The second kind has the tables of version 8, but its texts are not prepared again yet.
_SHARED_VERSION = 7
#: Maximum number of rows that `_convert` converts in one transaction. The number is small, so that the write-ahead log
#: stays small, and an interrupted conversion loses little of its progress.
_CONVERTED_AT_ONCE = 500


def prepare(connection: sqlite3.Connection, subject: str, *, create: bool) -> None:
    """Create the tables, or migrate those of an older version; each migration step is one transaction.

    Then undamaged rows that an older version wrote get their missing checksums, in transactions of their own. An
    interrupted migration is continued by the next call.

    Args:
        connection: a connection to the database.
        subject: name of the database in messages.
        create: whether the database is empty and its tables must be created.

    Raises:
        ServiceError: INTERNAL if a newer version wrote the database, its tables are not those of its version, or the
            number `unconverted` in it is damaged.
        sqlite3.Error: a statement failed, or was interrupted since the call of the thread is cancelled.
    """
    if create:
        connection.executescript(_FIRST)
    done = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if done > len(STEPS):
        message = (
            f"the database of {subject} has the format {done}, and this emberpc reads formats up to {len(STEPS)}: a "
            "newer version of emberpc wrote it; serve it with that, or restore a backup"
        )
        raise ServiceError(Code.INTERNAL, message, reason="NEWER_FORMAT")
    found = objects(connection)
    if found not in map(_objects_of, tables_of(max(0, done))):
        message = f"the tables of the database of {subject} are not as they were made: it is damaged; restore a backup"
        raise ServiceError(Code.INTERNAL, message, reason="DATABASE_DAMAGED")
    _add_functions(connection)
    steps = list(enumerate(STEPS, 1))[max(0, done) :]
    if done == _SHARED_VERSION and found == _objects_of(_SHARED_VERSION + 1):
        steps[0] = (_SHARED_VERSION + 1, _FORMLESS_WORDS)
    for number, statements in steps:
        with transaction(connection):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
    _convert(connection, subject)


def tables_of(version: int) -> tuple[int, ...]:
    """Return the numbers of steps after which tables are as those of a database of a version may be.

    That is the version itself, and for `_SHARED_VERSION` also the next one.
    """
    return (version, version + 1) if version == _SHARED_VERSION else (version,)


def _convert(connection: sqlite3.Connection, subject: str) -> None:
    """Add the missing checksums to undamaged rows that an older version wrote; leave damaged rows unchanged.

    A row counts as damaged if one of its checksums is wrong, a value has a wrong type, or the revision is not positive.
    A row without `checksum` also counts as damaged if a row with a smaller label has one: `checksum` was then lost.
    Rows are converted from the greatest label down, so that this rule is right after an interruption too.

    Args:
        connection: a connection to the database.
        subject: name of the database in messages.

    Raises:
        ServiceError: INTERNAL if the number `unconverted` is damaged.
        sqlite3.Error: a statement failed.
    """
    statement = "SELECT label FROM records WHERE checksum IS NOT NULL ORDER BY label LIMIT 1"
    (first,) = connection.execute(statement).fetchone() or (None,)

    def is_whole(row: Row) -> bool:
        return row.was_intact and row.revision > 0 and (row.checksum is not None or first is None or row.label < first)

    usual, connection.text_factory = connection.text_factory, lenient_text
    try:
        while last := _unconverted(connection, subject):
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


def _unconverted(connection: sqlite3.Connection, subject: str) -> int:
    """Return the label up to which rows of an older version may still lack checksums; 0 if all rows are converted.

    Raises:
        ServiceError: INTERNAL, which names the database `subject`, if the number is missing or no integer.
    """
    row = connection.execute("SELECT unconverted FROM state").fetchone()
    return max(0, integer_of(row, subject))


def make(connection: sqlite3.Connection, version: int) -> None:
    """Create the tables in an empty database as they are after `version` migration steps, 0 to `len(STEPS)`.

    `PRAGMA user_version` stays 0: the database serves only for comparison with a collection's database.

    Raises:
        sqlite3.Error: a statement failed.
    """
    connection.executescript(_FIRST)
    _add_functions(connection)
    for statement in (statement for statements in STEPS[:version] for statement in statements):
        connection.execute(statement)


def objects(connection: sqlite3.Connection) -> list[tuple[bytes, ...]]:
    """Return the declarations of tables, indexes, triggers and views of a database, without metadata indexes.

    The metadata indexes, by the prefix of their names, are left out since they differ between collections.

    Returns:
        Type, name, table and SQL of each, sorted by type and name. SQL is empty for indexes that SQLite made itself.
        All are bytes, since a damaged declaration may not be UTF-8.

    Raises:
        sqlite3.Error: the declarations cannot be read.
    """
    return connection.execute(
        "SELECT CAST(type AS BLOB), CAST(name AS BLOB), CAST(tbl_name AS BLOB), CAST(coalesce(sql, '') AS BLOB) "
        "FROM sqlite_master WHERE NOT (type = 'index' AND name GLOB ?) ORDER BY type, name",
        (f"{INDEX_PREFIX}*",),
    ).fetchall()


@cache
def _objects_of(version: int) -> list[tuple[bytes, ...]]:
    """Return the result of `objects` for an undamaged database that has had `version` migration steps."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        make(connection, version)
        return objects(connection)


def index_words(connection: sqlite3.Connection) -> None:
    """Correct the prepared texts, and rebuild the word index from them; the caller holds a transaction.

    A damaged index is replaced, if SQLite can write to its tables. The database must have had all migration steps.

    Raises:
        sqlite3.Error: a statement failed.
    """
    _add_functions(connection)
    for statement in (_SEARCH_TEXTS, *_NO_WORDS, _INDEX_WORDS):
        connection.execute(statement)


def _add_functions(connection: sqlite3.Connection) -> None:
    """Add the SQL function `search_text_of`, which steps and `index_words` use, to a connection.

    The function takes a text as bytes and returns its prepared text, or NULL if the text itself is to be indexed.
    Triggers use only SQLite's own functions, so that any SQLite program can write to the database.
    """
    connection.create_function("search_text_of", 1, _search_text_of, deterministic=True)


def add_checksum_function(connection: sqlite3.Connection) -> None:
    """Add the SQL function `text_checksum_of` to a connection.

    The function takes id, text, metadata and `class_label` as bytes, and returns the CRC-32 that
    `rows.checksum_of_bytes` returns, or NULL if one of them is NULL.
    """
    connection.create_function("text_checksum_of", 4, _checksum_of_bytes, deterministic=True)


def _checksum_of_bytes(*texts: bytes) -> int | None:
    """Return `rows.checksum_of_bytes` of id, text, metadata and `class_label`; None if one of them is None."""
    return None if None in texts else checksum_of_bytes(texts)


def _search_text_of(data: bytes | None) -> str | None:
    # A text that is not UTF-8 or is NULL, as after damage, must not prevent the collection from being opened.
    return search_text((data or b"").decode(errors="replace"))
