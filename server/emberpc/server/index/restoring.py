"""Restoring of a collection from a backup that arrives piece by piece.

Until the backup is checked, its data is in a folder that the catalogue does not name. If the restore fails or is given
up, the folder is removed; if the server is killed, the next start removes the folder. A new entry in the catalogue
turns the folder into a collection, in one step.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from emberpc.server.collections.types import CollectionSpec
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.index.collection import Collection
from emberpc.server.index.jobs import backup
from emberpc.server.index.jobs.backup_checks import check_backup, damaged, restore_cancelled
from emberpc.server.index.storage import schema
from emberpc.server.index.storage.data_directory import CatalogueEntry
from emberpc.server.index.storage.database import connect, transaction, translated
from emberpc.server.index.storage.files import new_folder, translated_os_errors
from emberpc.server.index.storage.store import DATABASE_NAME

_NOTHING_RESTORED = "nothing was restored"


class Restoration:
    """Receives a backup and creates a collection from it.

    Call `write` for all bytes, then `finish` once, and in any case `close` at the end. Only `close` may be called while
    another method runs.

    Args:
        collections: the parent of the collections' folders.
        name: the new collection's name; the name in the backup is ignored.
        total: bytes of the backup, for which the disk must have space; 0: not known.
        accept: called with the spec in the backup; raises ValueError or ServiceError if the spec cannot be served.
        adopt: opens a folder as a collection, adds the collection to the catalogue, and returns it.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the disk has no space or no file descriptor is free, INTERNAL if the folder
            cannot be written to.
    """

    def __init__(
        self,
        collections: Path,
        name: str,
        total: int,
        accept: Callable[[CollectionSpec], None],
        adopt: Callable[[CatalogueEntry], Collection],
    ) -> None:
        self._name = name
        self._subject = f"collection {name!r}"
        self._accept = accept
        self._adopt = adopt
        self._lock = threading.Lock()
        self._closed = threading.Event()
        #: Digest of all bytes so far, without those in `_held_back`, which may be the last line of the backup.
        self._digest = hashlib.sha256()
        self._held_back = b""
        with ExitStack() as stack, translated_os_errors(_NOTHING_RESTORED):
            self._folder = new_folder(collections)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            backup.check_space(self._folder, total, "the backup")
            self._path = self._folder / DATABASE_NAME
            self._file = stack.enter_context(self._path.open("wb"))
            self._resources = stack.pop_all()

    def write(self, data: bytes) -> None:
        """Write the next bytes of the backup to the new collection's folder, without the last line of the backup.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk has no space (64 MiB must stay free), UNAVAILABLE after `close`
                or a successful `finish`, INTERNAL if the file cannot be written.
        """
        with self._lock, translated_os_errors(_NOTHING_RESTORED):
            self._check_open()
            backup.check_space(self._folder, len(data), "what is still to come of the backup")
            self._write(data)

    def finish(self, sha256: str) -> Collection:
        """Check the backup, create the collection, and return it.

        Args:
            sha256: SHA-256 of all bytes of the backup, in hexadecimal.

        Raises:
            ServiceError: INVALID_ARGUMENT if the bytes are not an undamaged backup, `sha256` is empty or differs, or
                `accept` raised an error; FAILED_PRECONDITION if a newer version wrote the backup; ALREADY_EXISTS if
                another collection has the name by now; RESOURCE_EXHAUSTED if the disk is full, no file descriptor is
                free or there are too many collections; UNAVAILABLE if `close` was called or the index is closed;
                INTERNAL if the database or its folder fails.
        """
        with self._lock, translated_os_errors(_NOTHING_RESTORED):
            self._check_open()
            self._check_digests(sha256)
            self._file.close()
            spec, created = check_backup(self._path, self._accept, self._closed.is_set)
            with translated(self._subject):
                self._make_ours()
            self._check_open()
            collection = self._adopt(CatalogueEntry(replace(spec, name=self._name), self._folder, created))
            self._resources.pop_all()
            self._closed.set()
        return collection

    def close(self) -> None:
        """Let a `finish` in progress end early, wait for the method in progress, and remove all files.

        Files that became a collection stay. May be called several times.
        """
        self._closed.set()
        with self._lock:
            self._resources.close()

    def _write(self, data: bytes) -> None:
        data = self._held_back + data
        self._held_back = data[-backup.LAST_LINE_SIZE :]
        body = data[: -backup.LAST_LINE_SIZE]
        self._digest.update(body)
        self._file.write(body)

    def _check_digests(self, sha256: str) -> None:
        """Check the SHA-256 of all bytes against `sha256`, and that of all before the last line against that line.

        Raises:
            ServiceError: INVALID_ARGUMENT if `sha256` is empty or one of the two differs.
        """
        if not sha256:
            raise invalid("sha256", "is missing; the last message must have the SHA-256 of the whole")
        whole = self._digest.copy()
        whole.update(self._held_back)
        if whole.hexdigest() != sha256.lower():
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                f"sha256 is {sha256[:64]!r}, and that of what came is {whole.hexdigest()!r}; send it again",
                reason="BACKUP_DAMAGED",
            )
        if self._held_back != backup.last_line(self._digest.hexdigest()):
            raise damaged("it was cut off or changed, or is none, since its last line is not the SHA-256 of the rest")

    def _make_ours(self) -> None:
        """Turn the checked backup into a collection's database.

        Remove the table and the mark of a backup, migrate the tables, rebuild the word index, and set a new identity.
        With the new identity, snapshots of the collection that was backed up do not belong to the new database.

        Raises:
            sqlite3.Error: the database fails.
        """
        with closing(connect(self._path)) as connection:
            with transaction(connection):
                connection.execute("DROP TABLE backup")
                connection.execute("PRAGMA application_id = 0")
            schema.prepare(connection, self._subject, create=False)
            with transaction(connection):
                schema.index_words(connection)
                connection.execute(schema.NEW_IDENTITY)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise restore_cancelled()
