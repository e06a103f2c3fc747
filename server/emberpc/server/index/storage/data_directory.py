"""The data directory: its lock, the catalogue of collections with their folders, and the removal of unused folders."""

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

from emberpc.bundle.atomic_files import sync_to_disk
from emberpc.server import descriptors
from emberpc.server.collections.types import CollectionSpec
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage import wal
from emberpc.server.index.storage.database import DESCRIPTORS, connect, transaction, translated
from emberpc.server.index.storage.reserve import Reserve

log = logging.getLogger(__name__)

FORMAT = 2
_DATABASE = "catalogue.db"
_COLLECTIONS = "collections"
_RESERVE = "reserve"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_SUBJECT = "the catalogue"
#: Columns of an entry except its time. They are selected as bytes: a text that is not UTF-8 would fail the query for
#: all entries.
_ROW = "CAST(name AS BLOB), CAST(spec AS BLOB), CAST(folder AS BLOB)"
#: Creates the tables of the catalogue. IF NOT EXISTS, since a catalogue of format 1 has the first table, and an older
#: version whose start failed may have left some tables.
_SCHEMA = f"""
BEGIN;
CREATE TABLE IF NOT EXISTS collections (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    created REAL NOT NULL
);
-- Collections that are to replace others of the same name (re-embeddings).
CREATE TABLE IF NOT EXISTS reembeddings (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    started REAL NOT NULL
);
PRAGMA user_version = {FORMAT};
COMMIT;
"""


@dataclass(frozen=True)
class CatalogueEntry:
    """An entry of the catalogue: a collection, or the new collection of a reembedding, which replaces another later.

    Attributes:
        spec: the spec of the collection.
        folder: the folder with the collection's data.
        since: when the collection was created, or when the reembedding began.
    """

    spec: CollectionSpec
    folder: Path
    since: datetime


class DataDirectory:
    """The catalogue of collections, for the one server that may use it. Not safe to use from several threads.

    The catalogue decides which collections exist. A folder that the catalogue does not name belongs to a collection
    that was never finished, was deleted or was replaced. Such folders are removed when the directory is opened, unless
    a folder that the catalogue names is missing.

    Every method except `close` may raise `ServiceError`: RESOURCE_EXHAUSTED if the disk is full or no file descriptor
    is free, INTERNAL if the catalogue fails.

    Args:
        path: the directory; created if it is missing, and locked until `close`.

    Raises:
        ServiceError: FAILED_PRECONDITION if the directory cannot be locked (see `_lock`), or the catalogue is damaged,
            cannot be opened, is of a newer format, or is missing although there are folders of collections.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        #: Parent of the collections' folders.
        self.collections = path / _COLLECTIONS
        with ExitStack() as stack:
            stack.enter_context(_lock(path))
            #: Reserved disk space, by which records and collections can be deleted when the disk is full.
            self.reserve = Reserve(path / _RESERVE)
            self._database = self.reserve.run(partial(_open_catalogue, path))
            stack.callback(self._database.close)
            self._remove_orphans()
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Close the catalogue, and release the lock of the data directory."""
        self._resources.close()

    def find(self, name: str) -> CatalogueEntry | None:
        """Return the entry of a collection; None if no collection has that name.

        Raises:
            ServiceError: INTERNAL if the entry is damaged or the catalogue fails.
        """
        with translated(_SUBJECT):
            row = self._database.execute(
                f"SELECT {_ROW}, created FROM collections WHERE name = ?",  # noqa: S608 - our own columns
                (name,),
            ).fetchone()
        return None if row is None else self._entry(row)

    def folder(self, name: str) -> Path | None:
        """Return the folder of a collection, even if the rest of its entry is damaged; None if there is no entry.

        Raises:
            ServiceError: INTERNAL if the folder's name in the entry is damaged or the catalogue fails.
        """
        with translated(_SUBJECT):
            row = self._database.execute(
                "SELECT CAST(folder AS BLOB) FROM collections WHERE name = ?", (name,)
            ).fetchone()
        return None if row is None else self._path_of(name, row[0])

    def check_count(self, maximum: int) -> None:
        """Raise RESOURCE_EXHAUSTED if there are `maximum` collections or more, reembeddings not counted.

        INTERNAL if the catalogue fails.
        """
        with translated(_SUBJECT):
            count = self._database.execute("SELECT count(*) FROM collections").fetchone()[0]
        if count >= maximum:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"there are {count} collections, and the limit is {maximum}; delete some, or start the server with a "
                "higher --max-collections",
                reason="TOO_MANY_COLLECTIONS",
                metadata={"limit": str(maximum)},
            )

    def specs(self, after: str, count: int) -> list[CollectionSpec]:
        """Return the specs of the first `count` collections whose names are greater than `after`, sorted by name.

        If the spec of a collection is damaged, the returned spec has only the name, and 0 dimensions.

        Raises:
            ServiceError: INTERNAL if the catalogue fails.
        """
        with translated(_SUBJECT):
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

    def add(self, entry: CatalogueEntry) -> None:
        """Insert the entry of a new collection, whose name must be free and whose folder must exist.

        When this returns, the entry is on disk, and so is the folder with its list of files.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the catalogue fails.
            OSError: the folder cannot be synchronised to disk.
        """
        self._insert("INTO collections", entry)

    def update(self, spec: CollectionSpec) -> None:
        """Replace the spec of the collection with the name `spec.name`; do nothing if there is none.

        In the same transaction, replace the truncation in the spec of the collection's reembedding, if there is one.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the catalogue fails.
        """
        with translated(_SUBJECT), transaction(self._database):
            self._database.execute("UPDATE collections SET spec = ? WHERE name = ?", (spec.to_json(), spec.name))
            self._database.execute(
                "UPDATE reembeddings SET spec = json_set(spec, '$.truncation', ?) WHERE name = ?",
                (spec.truncation, spec.name),
            )

    def delete(self, name: str) -> None:
        """Delete the entry of a collection, if there is one; may use the reserve of disk space on a full disk.

        The folder stays, and so does the entry of a reembedding.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full despite the reserve, INTERNAL if the catalogue fails.
        """
        self._delete("DELETE FROM collections WHERE name = ?", name)

    def reembeddings(self) -> list[CatalogueEntry]:
        """Return the entries of unfinished reembeddings: each is that of the new collection, not of the replaced one.

        A damaged entry is logged and left out; the entry and its folder stay.

        Raises:
            ServiceError: INTERNAL if the catalogue fails.
        """
        with translated(_SUBJECT):
            rows = self._database.execute(
                f"SELECT {_ROW}, started FROM reembeddings"  # noqa: S608 - our own columns
            ).fetchall()
        entries = []
        for row in rows:
            try:
                entries.append(self._entry(row))
            except ServiceError:
                log.exception("a re-embedding cannot be resumed: its catalogue entry is damaged")
        return entries

    def add_reembedding(self, entry: CatalogueEntry) -> None:
        """Insert the entry of a reembedding: of the new collection that will replace the collection of the same name.

        An entry that could not be opened is replaced. The folder must exist; folder and entry are on disk afterwards.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the catalogue fails.
            OSError: the folder cannot be synchronised to disk.
        """
        self._insert("OR REPLACE INTO reembeddings", entry)

    def delete_reembedding(self, name: str) -> None:
        """Delete the entry of a collection's reembedding, if there is one, not its folder; may use the reserve.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full despite the reserve, INTERNAL if the catalogue fails.
        """
        self._delete("DELETE FROM reembeddings WHERE name = ?", name)

    def switch(self, name: str) -> None:
        """Give a collection the folder and spec of its reembedding, and delete the reembedding's entry, atomically.

        Both entries must exist. The creation time stays. The collection's old folder is not deleted.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, INTERNAL if the catalogue fails.
        """
        with translated(_SUBJECT), transaction(self._database):
            self._database.execute(
                "UPDATE collections SET (folder, spec) = (SELECT folder, spec FROM reembeddings WHERE name = ?) "
                "WHERE name = ?",
                (name, name),
            )
            self._database.execute("DELETE FROM reembeddings WHERE name = ?", (name,))

    def _delete(self, statement: str, name: str) -> None:
        def delete() -> None:
            with translated(_SUBJECT), transaction(self._database):
                self._database.execute(statement, (name,))

        self.reserve.run(delete)

    def _insert(self, into: str, entry: CatalogueEntry) -> None:
        self.reserve.check("no collection was made")
        # The folder must be on disk before the row that names it: a power cut must not leave a row without a folder.
        for path in (entry.folder, self.collections, self._path):
            sync_to_disk(path)
        with translated(_SUBJECT), transaction(self._database):
            self._database.execute(
                f"INSERT {into} VALUES (?, ?, ?, ?)",  # noqa: S608 - our own tables
                (entry.spec.name, entry.folder.name, entry.spec.to_json(), entry.since.timestamp()),
            )

    def _entry(self, row: tuple[bytes, bytes, bytes, float]) -> CatalogueEntry:
        name = _text(row[0])
        try:
            since = datetime.fromtimestamp(row[3], timezone.utc)
        except (ValueError, OverflowError, OSError, TypeError) as error:
            raise _damaged(name) from error
        return CatalogueEntry(_spec(name, row[1]), self._path_of(name, row[2]), since)

    def _path_of(self, name: str, folder: bytes) -> Path:
        if not _FOLDER.fullmatch(_text(folder)):
            raise _damaged(name)
        return self.collections / _text(folder)

    def _remove_orphans(self) -> None:
        """Remove the folders of collections that the catalogue does not name; other files stay.

        A crash leaves folders of unfinished creations and deletions. If a folder that the catalogue names is missing,
        no folder is removed: the name may be damaged, and the collection's folder would look unused.
        """
        with translated(_SUBJECT):
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
                log.info("removing %s: it belongs to no collection", path)
                shutil.rmtree(path, ignore_errors=True)


def _text(data: bytes) -> str:
    """Decode a name in the catalogue; bytes that are not UTF-8 become U+FFFD, which no valid name contains."""
    return data.decode(errors="replace")


def _spec(name: str, text: bytes) -> CollectionSpec:
    """Decode the spec in the catalogue entry of the collection `name`.

    Raises:
        ServiceError: INTERNAL if the spec is not the JSON of a spec, has invalid values, or has another name.
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
    """Create the data directory if it is missing, and lock it for this process.

    Returns:
        The lock file; closing it, or the end of the process, unlocks the directory.

    Raises:
        ServiceError: FAILED_PRECONDITION if the path is no directory or cannot be written to, no file descriptor is
            free, another server has locked the directory, or it cannot be locked.
    """
    try:
        if data_dir.exists() and not data_dir.is_dir():
            raise _unusable(data_dir, "is not a directory; choose another --data-dir")
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "lock").open("wb")
    except OSError as error:
        if descriptors.is_shortage(error):
            raise _unusable(data_dir, f"cannot be opened: {descriptors.shortage_at_start()}") from error
        raise _unusable(data_dir, f"cannot be written to ({error.strerror}); choose another --data-dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise _unusable(data_dir, "is in use by another server; stop it, or choose another --data-dir") from error
        raise _unusable(data_dir, f"cannot be locked ({error.strerror}); choose another --data-dir") from error
    return file


def _open_catalogue(data_dir: Path) -> sqlite3.Connection:
    path = data_dir / _DATABASE
    with ExitStack() as stack:
        try:
            found = wal.inspect(path)
            database = connect(path, create=True)
            stack.callback(database.close)
            wal.report_lost_commits(database, found, _SUBJECT)
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > FORMAT:
                why = f"has a catalogue of the format {version} of a newer emberpc, and this one reads up to {FORMAT}; "
                raise _unusable(data_dir, why + "install the newer one, or choose another --data-dir")
            # Without this check, a new, empty catalogue would replace a lost one, and all folders would be removed.
            if version == 0 and _collection_folders(data_dir):
                raise _unusable(data_dir, f"has collections but no {_DATABASE}; restore it from a copy")
            if version < FORMAT:
                database.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            log.exception("%s cannot be opened", path)
            if descriptors.none_free(DESCRIPTORS):
                raise _unusable(data_dir, f"cannot be opened: {descriptors.shortage_at_start()}") from error
            raise _unusable(
                data_dir, "cannot be written to; free some space, see to its permissions, or choose another --data-dir"
            ) from error
        # UnicodeDecodeError: Python decodes names and messages of SQLite, which may have damaged bytes of the schema.
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            log.exception("%s cannot be read", path)
            raise _unusable(data_dir, f"has a damaged {_DATABASE}; restore it from a copy") from error
        stack.pop_all()
    return database


def _unusable(data_dir: Path, why: str) -> ServiceError:
    return ServiceError(Code.FAILED_PRECONDITION, f"the data directory {data_dir} {why}", reason="DATA_DIRECTORY")
