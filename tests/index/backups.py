"""Helpers that take backups, restore them, and change them as an attacker would."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs.backup import LAST_LINE_SIZE, last_line


def accept_all(spec: CollectionSpec) -> None:
    """Accept every collection, where a service would check the spec."""


def taken(collection: Collection) -> bytes:
    """Return the whole file of a backup of a collection."""
    pieces = list(collection.backup(lambda: False))
    whole = b"".join(piece.data for piece in pieces)
    assert pieces[0].total == len(whole)
    assert pieces[-1].sha256 == hashlib.sha256(whole).hexdigest()
    return whole


def restored(index: Index, name: str, whole: bytes, *, step: int = 100_000) -> Collection:
    """Restore a backup that arrives in pieces of `step` bytes; return the collection."""
    restoration = index.restore(name, len(whole), accept_all)
    try:
        for start in range(0, len(whole), step):
            restoration.write(whole[start : start + step])
        return restoration.finish(hashlib.sha256(whole).hexdigest())
    finally:
        restoration.close()


def changed(whole: bytes, path: Path, *change: str | Callable[[sqlite3.Connection], object]) -> bytes:
    """Return a backup whose database was changed, with a last line that matches the changed bytes."""
    path.write_bytes(whole[:-LAST_LINE_SIZE])
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for each in change:
            if isinstance(each, str):
                database.execute(each)
            else:
                each(database)
    return sealed(path.read_bytes())


def sealed(body: bytes) -> bytes:
    """Return bytes followed by the last line of a backup that matches them."""
    return body + last_line(hashlib.sha256(body).hexdigest())


def folders(data_dir: Path) -> int:
    """Return the number of folders in the folder of collections."""
    return len(list((data_dir / "collections").iterdir()))
