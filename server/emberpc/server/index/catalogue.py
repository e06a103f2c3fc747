"""The data directory: which collections there are, and the one server that may use them."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.backend import collection_exists, no_collection
from emberpc.server.index.collection import Collection
from emberpc.server.index.database import connect, transaction, translated
from emberpc.server.index.files import synchronise, written
from emberpc.server.index.maintenance import Maintainer
from emberpc.server.index.probing import ProbeFigures
from emberpc.server.index.record_cache import RecordCache
from emberpc.server.index.restoring import Restoration
from emberpc.server.index.types import CollectionSpec, check_name, check_page_size
from emberpc.server.index.upkeep import Pace
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

_FORMAT = 1
_CATALOGUE = "catalogue.db"
_COLLECTIONS = "collections"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_WHAT = "the catalogue"
_SCHEMA = f"""
BEGIN;
CREATE TABLE collections (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    created REAL NOT NULL
);
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


class Index:
    """All collections of a data directory. Safe to use from several threads.

    A collection's folder has a name of its own, so that a name can be used again
    while the files of a deleted collection are still going. The catalogue is the
    truth: a folder that it does not name was never finished, or is deleted.

    Every method may raise `ServiceError`: UNAVAILABLE once the index is closed,
    INTERNAL if a database fails.

    Args:
        data_dir: the directory; made if it is not there.
        buffer_limit: vectors of a collection that may wait for its graph.
        snapshot_every: vectors that a graph takes in between snapshots.
        record_cache_bytes: most bytes of records kept in memory for those who find them again, about; 0: none.
        probe_share: share of the searches that are done again, exactly, to measure recall; 0: none.

    Raises:
        ServiceError: FAILED_PRECONDITION if it cannot be used, is another server's, or of a newer format.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        buffer_limit: int = Pace.buffer_limit,
        snapshot_every: int = Pace.snapshot_every,
        record_cache_bytes: int = 0,
        probe_share: float = 0,
    ) -> None:
        self._data_dir = Path(data_dir)
        self._folder = self._data_dir / _COLLECTIONS
        self._pace = Pace(buffer_limit, snapshot_every)
        self._probe_share = probe_share
        self._cache = RecordCache(record_cache_bytes)
        self._lock = threading.RLock()
        self._closed = False
        #: Those that are open, or being opened: that takes long for a large one, so it is done outside the lock.
        self._open: dict[str, Future[Collection]] = {}
        self._maintainer = Maintainer()
        with ExitStack() as stack:
            stack.enter_context(_lock(self._data_dir))
            self._database = _open_catalogue(self._data_dir)
            stack.callback(self._database.close)
            self._remove_orphans()
            #: Gives up everything again, the directory last.
            self._resources = stack.pop_all()

    def create(self, spec: CollectionSpec) -> Collection:
        """Create a collection.

        Raises:
            ServiceError: INVALID_ARGUMENT if the spec is wrong, ALREADY_EXISTS if there is one of its name,
                RESOURCE_EXHAUSTED if the disk is full.
        """
        spec.check()
        created = datetime.now(timezone.utc)
        with self._use(), written("no collection was made"):
            if self._row(spec.name):
                raise collection_exists(spec.name)
            folder = self._folder / uuid.uuid4().hex
            folder.mkdir(parents=True)
            collection = self._collection(spec, folder, created, create=True)
            self._enter(collection, folder, created)
        return collection

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> Restoration:
        """Begin to make a collection of a backup; see `Restoration`.

        Args:
            name: its name; the one that it had goes for nothing.
            total: bytes of the backup; 0: not known.
            accept: raises ValueError or ServiceError if a collection cannot be served.

        Raises:
            ServiceError: INVALID_ARGUMENT if the name is wrong, ALREADY_EXISTS if there is one of it,
                RESOURCE_EXHAUSTED if there is no room.
        """
        check_name(name, "name")
        with self._use():
            if self._row(name):
                raise collection_exists(name)
            return Restoration(self._folder, name, total, accept, self._adopt)

    def get(self, name: str) -> Collection:
        """Return a collection; the first call for it reads its graph, and keeps only those waiting that want it too.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name, INTERNAL if it is damaged.
        """
        with self._use():
            opened = self._open.get(name)
            if opened is None:
                folder, spec, created = self._existing_row(name)
                opening = self._open[name] = Future()
        if opened is not None:
            return opened.result()
        try:
            collection = self._collection(
                CollectionSpec.from_json(spec), self._folder / folder, datetime.fromtimestamp(created, timezone.utc)
            )
        except BaseException as error:
            with self._lock:
                if self._open.get(name) is opening:
                    del self._open[name]
            opening.set_exception(error)
            raise
        opening.set_result(collection)
        return collection

    def opened(self, name: str) -> Collection | None:
        """Return a collection if it is open already; never waits."""
        opened = self._open.get(name)
        return opened.result() if opened is not None and opened.done() and opened.exception() is None else None

    def probed(self) -> dict[str, ProbeFigures]:
        """Return what probes of searches found, of each collection that is open and was probed, by name."""
        opened = {name: self.opened(name) for name in list(self._open)}
        return {name: each.probed for name, each in opened.items() if each is not None and each.probed.count}

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return what the collections of a page are, by name, and the token of the next page, empty after the last."""
        check_page_size(page_size)
        after = decode_token(page_token)
        with self._use(), translated(_WHAT):
            rows = self._database.execute(
                "SELECT spec FROM collections WHERE name > ? ORDER BY name LIMIT ?", (after, page_size + 1)
            ).fetchall()
        specs = [CollectionSpec.from_json(row[0]) for row in rows]
        token = encode_token(specs[page_size - 1].name) if len(specs) > page_size else ""
        return specs[:page_size], token

    def delete(self, name: str) -> None:
        """Delete a collection; calls under way finish first.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name.
        """
        with self._use():
            folder = self._folder / self._existing_row(name)[0]
            with translated(_WHAT), transaction(self._database):
                self._database.execute("DELETE FROM collections WHERE name = ?", (name,))
            opened = self._open.pop(name, None)
        if opened is None or opened.exception() is not None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            opened.result().drop()

    def close(self) -> None:
        """Let calls under way finish, save snapshots, close every collection, and give up the directory."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with self._resources as stack:
            stack.callback(self._maintainer.close)
            for opened in [*self._open.values()]:
                if opened.exception() is None:
                    stack.callback(opened.result().close)

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Hold the lock for a call; UNAVAILABLE if the index is closed."""
        with self._lock:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "the index is closed; try again", reason="CLOSED")
            yield

    def _adopt(self, spec: CollectionSpec, folder: Path, created: datetime) -> Collection:
        """Open a restored collection, which may take long, and have the catalogue name it."""
        collection = self._collection(spec, folder, created)
        self._enter(collection, folder, created)
        return collection

    def _enter(self, collection: Collection, folder: Path, created: datetime) -> None:
        """Have the catalogue name a new collection; if it cannot, the collection is dropped.

        Raises:
            OSError: its folder cannot be made to last.
        """
        spec = collection.spec
        with ExitStack() as undo:
            undo.callback(collection.drop)
            with self._use():
                if self._row(spec.name):
                    raise collection_exists(spec.name)
                # The folder must be as lasting as the row that names it.
                for path in (folder, self._folder, self._data_dir):
                    synchronise(path)
                with translated(_WHAT), transaction(self._database):
                    self._database.execute(
                        "INSERT INTO collections VALUES (?, ?, ?, ?)",
                        (spec.name, folder.name, spec.to_json(), created.timestamp()),
                    )
                self._open[spec.name] = Future()
                self._open[spec.name].set_result(collection)
            undo.pop_all()

    def _collection(self, spec: CollectionSpec, folder: Path, created: datetime, *, create: bool = False) -> Collection:
        return Collection(
            spec,
            folder,
            created,
            self._maintainer.wake,
            self._cache,
            pace=self._pace,
            probe_share=self._probe_share,
            create=create,
        )

    def _row(self, name: str) -> tuple[str, str, float] | None:
        with translated(_WHAT):
            row: tuple[str, str, float] | None = self._database.execute(
                "SELECT folder, spec, created FROM collections WHERE name = ?", (name,)
            ).fetchone()
        return row

    def _existing_row(self, name: str) -> tuple[str, str, float]:
        row = self._row(name)
        if row is None:
            raise no_collection(name)
        return row

    def _remove_orphans(self) -> None:
        """Remove what a crash left of collections that were being made or deleted; nothing that is not ours."""
        known = {row[0] for row in self._database.execute("SELECT folder FROM collections")}
        for path in _collection_folders(self._data_dir):
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
    path = data_dir / _CATALOGUE
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
                    raise _unusable(data_dir, f"has collections but no {_CATALOGUE}; restore it from a copy")
                database.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            log.exception("%s cannot be opened", path)
            raise _unusable(
                data_dir, "cannot be written to; make room, see to its permissions, or choose another --data-dir"
            ) from error
        except sqlite3.DatabaseError as error:
            log.exception("%s cannot be read", path)
            raise _unusable(data_dir, f"has a damaged {_CATALOGUE}; restore it from a copy") from error
        stack.pop_all()
    return database


def _unusable(data_dir: Path, why: str) -> ServiceError:
    return ServiceError(Code.FAILED_PRECONDITION, f"the data directory {data_dir} {why}", reason="DATA_DIRECTORY")
