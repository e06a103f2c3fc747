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
from functools import partial
from pathlib import Path
from typing import IO

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import wal
from emberpc.server.index.storage.database import connect, transaction, translated
from emberpc.server.index.storage.files import synchronise
from emberpc.server.index.storage.reserve import Reserve

log = logging.getLogger(__name__)

_FORMAT = 2
_DATABASE = "catalogue.db"
_COLLECTIONS = "collections"
_RESERVE = "reserve"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_WHAT = "the catalogue"
#: Columns of an entry, but for its time. As bytes: one damaged text would otherwise fail the query for all entries.
_ROW = "CAST(name AS BLOB), CAST(spec AS BLOB), CAST(folder AS BLOB)"
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
            #: What deletions use on a full disk.
            self.reserve = Reserve(path / _RESERVE)
            self._database = self.reserve.run(partial(_open_catalogue, path))
            stack.callback(self._database.close)
            self._remove_orphans()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Give the directory up."""
        self._resources.close()

    def find(self, name: str) -> Entry | None:
        """Return a collection's entry; None if there is none of that name.

        Raises:
            ServiceError: besides the usual, INTERNAL if the entry is damaged.
        """
        with translated(_WHAT):
            row = self._database.execute(
                f"SELECT {_ROW}, created FROM collections WHERE name = ?",  # noqa: S608 - our own columns
                (name,),
            ).fetchone()
        return None if row is None else self._entry(row)

    def folder(self, name: str) -> Path | None:
        """Return a collection's folder, also if the rest of its entry is damaged; None if there is none of that name.

        Raises:
            ServiceError: besides the usual, INTERNAL if the folder's name is damaged.
        """
        with translated(_WHAT):
            row = self._database.execute(
                "SELECT CAST(folder AS BLOB) FROM collections WHERE name = ?", (name,)
            ).fetchone()
        return None if row is None else self._path_of(name, row[0])

    def check_count(self, most: int) -> None:
        """Raise RESOURCE_EXHAUSTED if there are `most` collections or more."""
        with translated(_WHAT):
            count = self._database.execute("SELECT count(*) FROM collections").fetchone()[0]
        if count >= most:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"there are {count} collections, and the limit is {most}; delete some, or start the server with a "
                "higher --max-collections",
                reason="TOO_MANY_COLLECTIONS",
                metadata={"limit": str(most)},
            )

    def specs(self, after: str, count: int) -> list[CollectionSpec]:
        """Return the specs of the collections that follow a name, at most `count`, by name.

        Of a collection whose entry is damaged, only the name is right, and the dimensions are 0.
        """
        with translated(_WHAT):
            rows = self._database.execute(
                "SELECT CAST(name AS BLOB), CAST(spec AS BLOB) FROM collections WHERE name > ? ORDER BY name LIMIT ?",
                (after, count),
            ).fetchall()
        specs = []
        for name, text in rows:
            try:
                specs.append(_spec(_text(name), text))
            except ServiceError:
                specs.append(CollectionSpec(_text(name), 0))
        return specs

    def add(self, entry: Entry) -> None:
        """Name a collection; for good when this returns.

        Raises:
            OSError: its folder cannot be made to last.
        """
        self._insert("collections", entry)

    def update(self, spec: CollectionSpec) -> None:
        """Replace the spec of a collection; of one that is to take its place, the truncation only."""
        with translated(_WHAT), transaction(self._database):
            self._database.execute("UPDATE collections SET spec = ? WHERE name = ?", (spec.to_json(), spec.name))
            self._database.execute(
                "UPDATE reembeddings SET spec = json_set(spec, '$.truncation', ?) WHERE name = ?",
                (spec.truncation, spec.name),
            )

    def delete(self, name: str) -> None:
        """Name a collection no more."""
        self._delete("DELETE FROM collections WHERE name = ?", name)

    def reembeddings(self) -> list[Entry]:
        """Return the entries of those that are to take the place of the collections of their names.

        A damaged entry is left out, and its folder stays.
        """
        with translated(_WHAT):
            rows = self._database.execute(
                f"SELECT {_ROW}, started FROM reembeddings"  # noqa: S608 - our own columns
            ).fetchall()
        entries = []
        for row in rows:
            try:
                entries.append(self._entry(row))
            except ServiceError:
                log.exception("a re-embedding cannot go on")
        return entries

    def add_reembedding(self, entry: Entry) -> None:
        """Name one that is to take a collection's place; raises as `add`."""
        self._insert("reembeddings", entry)

    def delete_reembedding(self, name: str) -> None:
        """Name it no more."""
        self._delete("DELETE FROM reembeddings WHERE name = ?", name)

    def switch(self, name: str) -> None:
        """Let the one that is to take a collection's place take it; the other is named no more."""
        with translated(_WHAT), transaction(self._database):
            self._database.execute(
                "UPDATE collections SET (folder, spec) = (SELECT folder, spec FROM reembeddings WHERE name = ?1) "
                "WHERE name = ?1",
                (name,),
            )
            self._database.execute("DELETE FROM reembeddings WHERE name = ?", (name,))

    def _delete(self, statement: str, name: str) -> None:
        def delete() -> None:
            with translated(_WHAT), transaction(self._database):
                self._database.execute(statement, (name,))

        self.reserve.run(delete)

    def _insert(self, table: str, entry: Entry) -> None:
        self.reserve.check("no collection was made")
        # The folder must be as lasting as the row that names it.
        for path in (entry.folder, self.collections, self._path):
            synchronise(path)
        with translated(_WHAT), transaction(self._database):
            self._database.execute(
                f"INSERT INTO {table} VALUES (?, ?, ?, ?)",  # noqa: S608 - our own tables
                (entry.spec.name, entry.folder.name, entry.spec.to_json(), entry.since.timestamp()),
            )

    def _entry(self, row: tuple[bytes, bytes, bytes, float]) -> Entry:
        name = _text(row[0])
        try:
            since = datetime.fromtimestamp(row[3], timezone.utc)
        except (ValueError, OverflowError, OSError, TypeError) as error:
            raise _damaged(name) from error
        return Entry(_spec(name, row[1]), self._path_of(name, row[2]), since)

    def _path_of(self, name: str, folder: bytes) -> Path:
        if not _FOLDER.fullmatch(_text(folder)):
            raise _damaged(name)
        return self.collections / _text(folder)

    def _remove_orphans(self) -> None:
        """Remove what a crash left of collections that were being made or deleted; nothing that is not ours.

        If a folder that the catalogue names is missing, nothing is removed: one damaged bit in that name would cost
        the collection its data.
        """
        with translated(_WHAT):
            rows = self._database.execute(
                "SELECT CAST(folder AS BLOB) FROM collections UNION ALL SELECT CAST(folder AS BLOB) FROM reembeddings"
            ).fetchall()
        known = {_text(row[0]) for row in rows}
        there = _collection_folders(self._path)
        if missing := known - {path.name for path in there}:
            log.error(
                "%d folders that the catalogue names are missing, such as %r; no other folder is removed",
                len(missing),
                min(missing),
            )
            return
        for path in there:
            if path.name not in known:
                log.info("removing %s: no collection has it", path)
                shutil.rmtree(path, ignore_errors=True)


def _text(data: bytes) -> str:
    """Return a name of the catalogue; damaged bytes become a character that no valid name has."""
    return data.decode(errors="replace")


def _spec(name: str, text: bytes) -> CollectionSpec:
    """Read the spec of a collection from the catalogue.

    Raises:
        ServiceError: INTERNAL if it is damaged, as far as that can be known.
    """
    try:
        spec = CollectionSpec.from_json(text.decode())
        spec.check()
        whole = spec.name == name and all(
            type(number) is int for number in (spec.dimensions, spec.m, spec.ef_construction)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ServiceError) as error:
        raise _damaged(name) from error
    if not whole:
        raise _damaged(name)
    return spec


def _damaged(name: str) -> ServiceError:
    return ServiceError(
        Code.INTERNAL,
        f"the entry of collection {name!r} in {_DATABASE} is damaged; stop the server and restore a copy of the data "
        "directory, or delete the collection and restore a backup of it",
        reason="COLLECTION_DAMAGED",
        metadata={"collection": name},
    )


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
            found = wal.look(path)
            database = connect(path, create=True)
            stack.callback(database.close)
            wal.report(database, found, _WHAT)
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
        # Python decodes names and messages of SQLite, which hold damaged bytes of the schema.
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            log.exception("%s cannot be read", path)
            raise _unusable(data_dir, f"has a damaged {_DATABASE}; restore it from a copy") from error
        stack.pop_all()
    return database


def _unusable(data_dir: Path, why: str) -> ServiceError:
    return ServiceError(Code.FAILED_PRECONDITION, f"the data directory {data_dir} {why}", reason="DATA_DIRECTORY")
