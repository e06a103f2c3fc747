"""Is the word index of a collection sound? It is derived from the texts, and so is built again where it is not.

SQLite computes no checksum of its pages, so FTS5 may read over damage and miss texts. The check compares the whole
index with the texts, by FTS5's own means.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import schema
from emberpc.server.index.storage.database import connect, transaction

# A copy of the index as one that knows its texts, which FTS5 compares it with. FTS5 does so only in a statement that
# writes: a copy among the temporary tables of a connection keeps no other connection from writing.
_COPY = (
    "CREATE TEMP VIEW texts_of_words AS "
    "SELECT label, coalesce(search_text, text) AS text FROM main.records WHERE text <> ''",
    "CREATE VIRTUAL TABLE temp.words_copy "
    f"USING fts5(text, content='texts_of_words', content_rowid='label', {schema.TOKENIZER})",
    *(
        statement
        for table in ("data", "idx", "docsize")
        for statement in (
            f"DELETE FROM temp.words_copy_{table}",  # noqa: S608 - our own tables
            f"INSERT INTO temp.words_copy_{table} SELECT * FROM main.words_{table}",  # noqa: S608 - our own tables
        )
    ),
    "INSERT INTO temp.words_copy (words_copy, rank) VALUES ('integrity-check', 1)",
)


def is_sound(path: Path) -> bool:
    """Return whether the word index of a database has the words of its texts, no others, and can be read.

    Reads all texts and tokenizes them, and takes temporary space for a copy of the index.

    Raises:
        sqlite3.Error: the check failed.
    """
    with closing(connect(path)) as connection:
        connection.execute("BEGIN")
        try:
            for statement in _COPY:
                connection.execute(statement)
        except sqlite3.DatabaseError as error:
            if not may_be_damage(error):
                raise
            return False
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
    return True


def build(connection: sqlite3.Connection) -> None:
    """Build the word index from the texts, in one transaction.

    Raises:
        sqlite3.Error: it failed.
    """
    with transaction(connection):
        schema.index_words(connection)


def may_be_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether a damaged word index can be why a statement failed; the records can be, too."""
    if isinstance(error, sqlite3.OperationalError):
        return "fts5" in str(error)
    return type(error) is sqlite3.DatabaseError


def damaged(what: str) -> ServiceError:
    """Return the error for a search by words that met damage in the index of `what`, such as "collection 'c'"."""
    return ServiceError(
        Code.DATA_LOSS,
        f"the word index of {what} is damaged; the server builds it again from the texts, which takes about 15 s for "
        "100,000 texts of 100 words: search again after that",
        reason="WORDS_DAMAGED",
    )
