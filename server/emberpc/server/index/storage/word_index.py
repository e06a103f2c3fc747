"""Check and rebuilding of a collection's word index, which is derived from the collection's texts.

SQLite's pages have no checksums, so FTS5 may not notice damage in the index, and searches may miss texts. The check
compares the whole index with the prepared texts (`search_text`, or `text` where that is NULL), by FTS5's own integrity
check.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import schema
from emberpc.server.index.storage.database import connect, transaction

# Statements that copy the index and check the copy. FTS5's integrity check compares an index with the texts only if the
# index declares them as its content: the copy does, the index does not. The check is a statement that takes the lock of
# writes. The copy is a temporary table of the connection, so other connections can write meanwhile.
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


def is_intact(path: Path) -> bool:
    """Return whether the word index of a database can be read and holds exactly the words of the prepared texts.

    Reads and tokenizes all texts, and needs temporary disk space for a copy of the index. Damaged records can also be
    why the result is False.

    Raises:
        sqlite3.Error: the check failed, and damage is not the reason (`may_be_damage`).
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
    """Correct the prepared texts, and rebuild the word index from them, in one transaction.

    Raises:
        sqlite3.Error: the index cannot be rebuilt; nothing has changed.
    """
    with transaction(connection):
        schema.index_words(connection)


def may_be_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether a damaged word index can be the cause of an error; damaged records can cause such an error too."""
    if isinstance(error, sqlite3.OperationalError):
        return "fts5" in str(error)
    return type(error) is sqlite3.DatabaseError


def damaged(subject: str) -> ServiceError:
    """Return the error DATA_LOSS of a lexical search that found the word index damaged.

    `subject` is the name of the database in messages, such as "collection 'c'".
    """
    return ServiceError(
        Code.DATA_LOSS,
        f"the word index of {subject} is damaged; the server builds it again from the texts, which takes about 15 s "
        "for 100,000 texts of 100 words: search again after that",
        reason="WORDS_DAMAGED",
    )
