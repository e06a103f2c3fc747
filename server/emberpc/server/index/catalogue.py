"""The data directory: which collections there are, and the one server that may use them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import shutil
import sqlite3
import threading
import uuid
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from emberpc.server.errors import Code, ServiceError, not_found
from emberpc.server.index.collection import BUFFER_LIMIT, Collection
from emberpc.server.index.types import CollectionSpec, Distance
from emberpc.server.paging import decode_token, encode_token

log = logging.getLogger(__name__)

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (
    name TEXT PRIMARY KEY,
    folder TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    created REAL NOT NULL
);
"""


class Index:
    """All collections of a data directory. Safe to use from several threads.

    A collection's folder has a name of its own, so that a name can be used again
    while the files of a deleted collection are still going. The catalogue is the
    truth: a folder that it does not name was never finished, or is deleted.

    Args:
        data_dir: the directory; made if it is not there.
        buffer_limit: vectors of a collection that may wait for its graph.

    Raises:
        ServiceError: FAILED_PRECONDITION if it cannot be used, is another server's, or of a newer format.
    """

    def __init__(self, data_dir: Path, *, buffer_limit: int = BUFFER_LIMIT) -> None:
        self._data_dir = Path(data_dir)
        self._buffer_limit = buffer_limit
        self._lock = threading.RLock()
        self._open: dict[str, Collection] = {}
        self._lock_file = _lock(self._data_dir)
        self._database = self._connect()
        self._remove_orphans()
        self._work: SimpleQueue[Collection | None] = SimpleQueue()
        self._queued: set[Collection] = set()
        self._thread: threading.Thread | None = None

    def create(self, spec: CollectionSpec) -> Collection:
        """Create a collection.

        Raises:
            ServiceError: INVALID_ARGUMENT if the spec is wrong, ALREADY_EXISTS if there is one of its name.
        """
        spec.check()
        folder, created = uuid.uuid4().hex, datetime.now(timezone.utc)
        with self._lock:
            if self._row(spec.name):
                raise ServiceError(
                    Code.ALREADY_EXISTS,
                    f"there is a collection {spec.name!r} already; use it, delete it, or choose another name",
                    reason="COLLECTION_EXISTS",
                    metadata={"collection": spec.name},
                )
            (self._data_dir / folder).mkdir()
            collection = Collection(spec, self._data_dir / folder, created, self._wake, self._buffer_limit)
            self._database.execute(
                "INSERT INTO collections VALUES (?, ?, ?, ?)",
                (spec.name, folder, json.dumps(dataclasses.asdict(spec)), created.timestamp()),
            )
            self._open[spec.name] = collection
        return collection

    def get(self, name: str) -> Collection:
        """Return a collection.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name.
        """
        with self._lock:
            if name not in self._open:
                row = self._row(name)
                if row is None:
                    raise not_found("collection", name, "see ListCollections, or create it")
                folder, text, created = row
                spec = json.loads(text)
                spec["distance"] = Distance(spec["distance"])
                spec["indexed_fields"] = tuple(spec["indexed_fields"])
                self._open[name] = Collection(
                    CollectionSpec(**spec),
                    self._data_dir / folder,
                    datetime.fromtimestamp(created, timezone.utc),
                    self._wake,
                    self._buffer_limit,
                )
            return self._open[name]

    def page(self, page_size: int, page_token: str) -> tuple[list[Collection], str]:
        """Return a page of collections by name, and the token of the next page, empty after the last."""
        after = decode_token(page_token)
        with self._lock:
            rows = self._database.execute(
                "SELECT name FROM collections WHERE name > ? ORDER BY name LIMIT ?", (after, page_size + 1)
            ).fetchall()
            names = [row[0] for row in rows]
            token = encode_token(names[page_size - 1]) if len(names) > page_size else ""
            return [self.get(name) for name in names[:page_size]], token

    def delete(self, name: str) -> None:
        """Delete a collection; searches under way finish first.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name.
        """
        with self._lock:
            collection = self.get(name)
            self._database.execute("DELETE FROM collections WHERE name = ?", (name,))
            del self._open[name]
        collection.drop()

    def close(self) -> None:
        """Save snapshots, close every collection, and give up the directory."""
        with self._lock:
            collections = list(self._open.values())
        for collection in collections:
            collection.close()
        self._work.put(None)
        if self._thread:
            self._thread.join()
        with self._lock:
            self._database.close()
            self._lock_file.close()

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._data_dir / "catalogue.db", isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > _FORMAT:
                raise _unusable(self._data_dir, "is of a newer emberpc; install that one, or choose another --data-dir")
            database.executescript(_SCHEMA)
            database.execute(f"PRAGMA user_version = {_FORMAT}")
        except (sqlite3.Error, ServiceError) as error:
            database.close()
            self._lock_file.close()
            if isinstance(error, ServiceError):
                raise
            raise _unusable(self._data_dir, "has a damaged catalogue.db; restore it from a copy") from error
        return database

    def _row(self, name: str) -> tuple[str, str, float] | None:
        row: tuple[str, str, float] | None = self._database.execute(
            "SELECT folder, spec, created FROM collections WHERE name = ?", (name,)
        ).fetchone()
        return row

    def _remove_orphans(self) -> None:
        known = {row[0] for row in self._database.execute("SELECT folder FROM collections")}
        for path in self._data_dir.iterdir():
            if path.is_dir() and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    def _wake(self, collection: Collection) -> None:
        """Have a collection maintained; the thread for it starts when it is first needed."""
        with self._lock:
            if collection in self._queued:
                return
            self._queued.add(collection)
            if self._thread is None:
                self._thread = threading.Thread(target=self._maintain, name="index-maintenance", daemon=True)
                self._thread.start()
        self._work.put(collection)

    def _maintain(self) -> None:
        while (collection := self._work.get()) is not None:
            with self._lock:
                self._queued.discard(collection)
            try:
                collection.maintain()
            except ServiceError as error:
                log.warning("collection %s: not maintained: %s", collection.spec.name, error.message)
            except Exception:  # one bad collection must not keep the others from being maintained
                log.exception("collection %s: not maintained", collection.spec.name)


def _lock(data_dir: Path) -> IO[bytes]:
    """Take the directory for this process alone; closing the file, or dying, gives it up."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "lock").open("wb")
    except OSError as error:
        raise _unusable(data_dir, f"cannot be used ({error.strerror}); choose another --data-dir") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise _unusable(data_dir, "is in use by another server; stop it, or choose another --data-dir") from error
    return file


def _unusable(data_dir: Path, why: str) -> ServiceError:
    return ServiceError(Code.FAILED_PRECONDITION, f"the data directory {data_dir} {why}", reason="DATA_DIRECTORY")
