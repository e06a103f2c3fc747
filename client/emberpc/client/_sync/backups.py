"""Methods that write a collection to a file, and restore it from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from emberpc.client._core import backups
from emberpc.client._core.backups import BackupReader, BackupWriter
from emberpc.client._sync.runner import Runner
from emberpc.client._sync.transport import run_blocking
from emberpc.client.exceptions import EmberpcError
from emberpc.client.types import ByteProgress, Collection
from emberpc.v1 import index_pb2 as pb


class BackupMethods:
    """Methods of `Client` about backups."""

    _runner: Runner

    def backup_collection(
        self, name: str, path: Path | str, *, progress: ByteProgress | None = None, timeout: float | None = None
    ) -> int:
        """Write a consistent backup of a collection to one file. The collection may be read and written meanwhile.

        Args:
            name: name of the collection.
            path: the file. An existing file is replaced when the new one is complete, checked and on disk. A link is
                followed. A device or a pipe, such as `/dev/stdout`, is written into.
            progress: called repeatedly with the bytes received and the bytes of the whole backup.
            timeout: None: an hour.

        Returns:
            The size of the file in bytes.

        Raises:
            InputError: the path is a folder, a disk or a socket.
            ResourceExhausted: the server's disk has no room for the copy that it makes.
            OSError: the file cannot be written.
            EmberpcError: the call failed otherwise.
        """
        call = backups.backup_collection(name)
        timeout = backups.TIMEOUT if timeout is None else timeout
        with BackupWriter(path, progress) as file:
            with closing(self._runner.responses(call, timeout)) as responses:
                for response in responses:
                    run_blocking(file.write, response)
                    file.report()
            return run_blocking(file.finish)

    def restore_collection(
        self, name: str, path: Path | str, *, progress: ByteProgress | None = None, timeout: float | None = None
    ) -> Collection:
        """Create a collection from the file of a backup. Atomic: all of it or nothing.

        Args:
            name: name of the new collection; it may differ from the name of the old one.
            path: the file.
            progress: called repeatedly with the bytes sent and the bytes of the whole backup.
                It is called in another thread.
            timeout: None: an hour.

        Returns:
            The collection. If the server does not serve the model of its vectors, it refuses texts until it does.

        Raises:
            AlreadyExists: a collection of this name exists, perhaps created by a try of this call whose response was
                lost.
            InvalidArgument: the file is not a backup, or damaged.
            FailedPrecondition: a newer version wrote the file.
            ResourceExhausted: the server's disk has no room for the collection.
            OSError: the file cannot be read.
            EmberpcError: the call failed otherwise.
        """
        call = backups.restore_collection(name)
        timeout = backups.TIMEOUT if timeout is None else timeout
        with BackupReader(path, name, progress) as file:
            try:
                return self._runner.upload(call, _requests(file), timeout)
            except EmberpcError:
                if file.error is not None:
                    raise file.error from None
                raise


def _requests(file: BackupReader) -> Iterator[pb.RestoreCollectionRequest]:
    """Yield the requests that send a file, and report the progress."""
    requests = file.requests()
    try:
        while (request := run_blocking(next, requests, None)) is not None:
            yield request
            file.report(request)
    except Exception as error:  # raised again in `restore_collection`, where the caller sees it
        file.error = error
