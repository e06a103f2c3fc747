"""The data directory: the one server that may use it, which folder is which collection, and what a crash left."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.database import connect, transaction, translated
from emberpc.server.index.files import synchronise
from emberpc.server.index.types import CollectionSpec

log = logging.getLogger(__name__)

_FORMAT = 2
_DATABASE = "catalogue.db"
_COLLECTIONS = "collections"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_WHAT = "the catalogue"
_SCHEMA = """
BEGIN;
CREATE TABLE collections (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    created REAL NOT NULL
);
COMMIT;
"""
#: What format 2 has more: the collections that are to take the place of others.
_SECOND = f"""
BEGIN;
CREATE TABLE reembeddings (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    started REAL NOT NULL
);
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


@dataclass(frozen=True)
class Entry:
    """What a folder is.

    Attributes:
        spec: what the collection is.
        folder: where it is.
        since: when it was made.
    """

    spec: CollectionSpec
    folder: Path
    since: datetime


class DataDirectory:
    """Which collections there are, for the one server that may use them. Not safe to use from several threads.

    The catalogue is the truth: a folder that it does not name was never finished, or is deleted, and is removed when
    the directory is opened.

    Every method may raise `ServiceError`: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the catalogue fails.

    Args:
        path: the directory; made if it is not there.

    Raises:
        ServiceError: FAILED_PRECONDITION if it cannot be used, is another server's, or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        #: Where the collections' folders are.
        self.collections = path / _COLLECTIONS
        with ExitStack() as stack:
            stack.enter_context(_lock(path))
            self._database = _open_catalogue(path)
            stack.callback(self._database.close)
            self._remove_orphans()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Give the directory up."""
        self._resources.close()

    def find(self, name: str) -> Entry | None:
        """Return a collection's entry; None if there is none of that name."""
        with translated(_WHAT):
            row = self._database.execute(
                "SELECT spec, folder, created FROM collections WHERE name = ?", (name,)
            ).fetchone()
        return None if row is None else self._entry(row)

    def specs(self, after: str, count: int) -> list[CollectionSpec]:
        """Return what the collections that follow a name are, at most `count`, by name."""
        with translated(_WHAT):
            rows = self._database.execute(
                "SELECT spec FROM collections WHERE name > ? ORDER BY name LIMIT ?", (after, count)
            ).fetchall()
        return [CollectionSpec.from_json(row[0]) for row in rows]

    def add(self, entry: Entry) -> None:
        """Name a collection; for good when this returns.

        Raises:
            OSError: its folder cannot be made to last.
        """
        self._insert("collections", entry)

    def delete(self, name: str) -> None:
        """Name a collection no more."""
        with translated(_WHAT), transaction(self._database):
            self._database.execute("DELETE FROM collections WHERE name = ?", (name,))

    def reembeddings(self) -> list[Entry]:
        """Return the entries of those that are to take the place of the collections of their names."""
        with translated(_WHAT):
            rows = self._database.execute("SELECT spec, folder, started FROM reembeddings").fetchall()
        return [self._entry(row) for row in rows]

    def add_reembedding(self, entry: Entry) -> None:
        """Name one that is to take a collection's place; raises as `add`."""
        self._insert("reembeddings", entry)

    def delete_reembedding(self, name: str) -> None:
        """Name it no more."""
        with translated(_WHAT), transaction(self._database):
            self._database.execute("DELETE FROM reembeddings WHERE name = ?", (name,))

    def switch(self, name: str) -> None:
        """Let the one that is to take a collection's place take it; the other is named no more."""
        with translated(_WHAT), transaction(self._database):
            self._database.execute(
                "UPDATE collections SET (folder, spec) = (SELECT folder, spec FROM reembeddings WHERE name = ?1) "
                "WHERE name = ?1",
                (name,),
            )
            self._database.execute("DELETE FROM reembeddings WHERE name = ?", (name,))

    def _insert(self, table: str, entry: Entry) -> None:
        # The folder must be as lasting as the row that names it.
        for path in (entry.folder, self.collections, self._path):
            synchronise(path)
        with translated(_WHAT), transaction(self._database):
            self._database.execute(
                f"INSERT INTO {table} VALUES (?, ?, ?, ?)",  # noqa: S608 - our own tables
                (entry.spec.name, entry.folder.name, entry.spec.to_json(), entry.since.timestamp()),
            )

    def _entry(self, row: tuple[str, str, float]) -> Entry:
        spec, folder, since = row
        return Entry(
            CollectionSpec.from_json(spec), self.collections / folder, datetime.fromtimestamp(since, timezone.utc)
        )

    def _remove_orphans(self) -> None:
        """Remove what a crash left of collections that were being made or deleted; nothing that is not ours."""
        rows = self._database.execute("SELECT folder FROM collections UNION ALL SELECT folder FROM reembeddings")
        known = {row[0] for row in rows}
        for path in _collection_folders(self._path):
            if path.name not in known:
                log.info("removing %s: no collection has it", path)
                shutil.rmtree(path, ignore_errors=True)


def _collection_folders(data_dir: Path) -> list[Path]:
    folder = data_dir / _COLLECTIONS
    return [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)] if folder.is_dir() else []


def _lock(data_dir: Path) -> IO[bytes]:
    """Take the directory for this process alone; closing the file, or dying, gives it up."""
    if data_dir.exists() and not data_dir.is_dir():
        raise _unusable(data_dir, "is not a directory; choose another --data-dir")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "lock").open("wb")
    except OSError as error:
        raise _unusable(data_dir, f"cannot be written to ({error.strerror}); choose another --data-dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise _unusable(data_dir, "is in use by another server; stop it, or choose another --data-dir") from error
    return file


def _open_catalogue(data_dir: Path) -> sqlite3.Connection:
    path = data_dir / _DATABASE
    with ExitStack() as stack:
        try:
            database = connect(path, create=True)
            stack.callback(database.close)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > _FORMAT:
                raise _unusable(data_dir, "is of a newer emberpc; install that one, or choose another --data-dir")
            if version == 0:
                # Without this, a lost catalogue would make orphans of all collections.
                if _collection_folders(data_dir):
                    raise _unusable(data_dir, f"has collections but no {_DATABASE}; restore it from a copy")
                database.executescript(_SCHEMA)
            if version < _FORMAT:
                database.executescript(_SECOND)
        except sqlite3.OperationalError as error:
            log.exception("%s cannot be opened", path)
            raise _unusable(
                data_dir, "cannot be written to; make room, see to its permissions, or choose another --data-dir"
            ) from error
        except sqlite3.DatabaseError as error:
            log.exception("%s cannot be read", path)
            raise _unusable(data_dir, f"has a damaged {_DATABASE}; restore it from a copy") from error
        stack.pop_all()
    return database


def _unusable(data_dir: Path, why: str) -> ServiceError:
    return ServiceError(Code.FAILED_PRECONDITION, f"the data directory {data_dir} {why}", reason="DATA_DIRECTORY")
