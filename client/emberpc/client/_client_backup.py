"""How `Client` makes a file of a collection, and a collection of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from emberpc.client import _backup
from emberpc.client._running import Runner
from emberpc.client.exceptions import EmberpcError
from emberpc.client.types import Collection
from emberpc.v1 import index_pb2 as pb


class BackupCalls:
    """The part of `Client` that is about backups."""

    _runner: Runner

    def backup_collection(
        self, name: str, path: Path | str, *, progress: _backup.Told | None = None, timeout: float | None = None
    ) -> int:
        """Write a collection to one file, as it is at one moment, while it is read and written.

        Args:
            name: name of the collection.
            path: the file. A file that is there is replaced when the new one is whole, checked and on disk. A link is
                followed. A device or a pipe, such as `/dev/stdout`, is written into.
            progress: told again and again how many bytes came, of how many.
            timeout: None: an hour.

        Returns:
            The size of the file in bytes.

        Raises:
            InputError: the path is a folder, a disk or a socket.
            ResourceExhausted: the server has no room for the copy that it makes.
            OSError: the file cannot be written.
            EmberpcError: the call failed otherwise.
        """
        call = _backup.backup_collection(name)
        timeout = _backup.TIMEOUT if timeout is None else timeout
        with _backup.BackupWriter(path, progress) as file, closing(self._runner.receive(call, timeout)) as messages:
            for message in messages:
                file.take(message)
                file.tell()
            return file.finish()

    def restore_collection(
        self, name: str, path: Path | str, *, progress: _backup.Told | None = None, timeout: float | None = None
    ) -> Collection:
        """Make a collection of the file of a backup; there is all of it or nothing.

        Args:
            name: name of the new collection; it need not be the one that it had.
            path: the file.
            progress: told again and again how many bytes were sent, of how many, from another thread.
            timeout: None: an hour.

        Returns:
            The collection. If the model that made its vectors is not served, texts are refused until it is.

        Raises:
            AlreadyExists: there is one of that name, perhaps made by a try of this very call whose answer was lost.
            InvalidArgument: the file is no backup, or damaged.
            FailedPrecondition: a newer version wrote it.
            ResourceExhausted: the server has no room for it.
            OSError: the file cannot be read.
            EmberpcError: the call failed otherwise.
        """
        call = _backup.restore_collection(name)
        timeout = _backup.TIMEOUT if timeout is None else timeout
        with _backup.BackupReader(path, name, progress) as file:
            try:
                return self._runner.send(call, _told(file), timeout)
            except EmberpcError:
                if file.error is not None:
                    raise file.error from None
                raise


def _told(file: _backup.BackupReader) -> Iterator[pb.RestoreCollectionRequest]:
    """Give the messages of a file, and tell of them."""
    try:
        for message in file.messages():
            yield message
            file.tell(message)
    except Exception as error:  # raised again where the caller can see it
        file.error = error
