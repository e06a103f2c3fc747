# Generated from ../_sync/backups.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods that back up a collection to a file, and restore a collection from a file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._aio.transport import run_blocking
from emberpc.client._core import backups
from emberpc.client._core.backups import BackupReader, BackupWriter
from emberpc.client.exceptions import EmberpcError
from emberpc.client.types import ByteProgress, Collection
from emberpc.v1 import index_pb2 as pb


class AsyncBackupMethods:
    """Methods of `AsyncClient` that write and restore backups of collections."""

    _runner: AsyncRunner

    async def backup_collection(
        self, name: str, path: Path | str, *, progress: ByteProgress | None = None, timeout: float | None = None
    ) -> int:
        """Write a backup of one state of a collection to one file.

        Meanwhile the collection may be read and written.

        Args:
            name: name of the collection.
            path: the file. An existing file is replaced when the backup is complete, checked and on disk. If `path` is
                a link, the file behind the link is written. A device or a pipe, such as `/dev/stdout`, receives the
                bytes as they arrive, and keeps them if the call fails.
            progress: called repeatedly with the bytes received so far and the bytes of the whole backup; None: no
                calls.
            timeout: seconds that the whole backup may take; None: an hour.

        Returns:
            The size of the backup in bytes.

        Raises:
            InputError: the path is a folder, a block device or a socket, or another argument is wrong.
            NotFound: there is no collection of this name.
            DataLoss: a record is damaged on the server's disk.
            ResourceExhausted: the server's disk has no space for the copy that the server makes first, or too many
                backups wait.
            DeadlineExceeded: the timeout passed; or the server could send nothing for a minute (15 seconds while other
                backups wait), because `progress` or the reader of a pipe was slow.
            Unimplemented: the server's index backend has no backups.
            Internal: the bytes that arrived are not those that the server sent, and no file was replaced; or the
                server failed.
            OSError: the file cannot be written.
            EmberpcError: the call failed otherwise.
        """
        call = backups.backup_collection(name)
        timeout = backups.TIMEOUT if timeout is None else timeout
        with BackupWriter(path, progress) as file:
            async with aclosing(self._runner.responses(call, timeout)) as responses:
                async for response in responses:
                    await run_blocking(file.write, response)
                    file.report()
            return await run_blocking(file.finish)

    async def restore_collection(
        self, name: str, path: Path | str, *, progress: ByteProgress | None = None, timeout: float | None = None
    ) -> Collection:
        """Create a collection from the file of a backup. Atomic: either the whole collection is created, or nothing.

        After DeadlineExceeded, Unavailable or Cancelled, the collection may have been created.

        Args:
            name: name of the new collection, which may differ from the name in the backup.
            path: the file; not a pipe, since the size of the file is sent first.
            progress: called repeatedly with the bytes sent so far and the bytes of the whole backup; None: no calls.
                It is called in the thread of the event loop.
                An exception that it raises ends the call, and is raised; after the last request it is ignored.
            timeout: seconds that the whole call may take; None: an hour.

        Returns:
            The new collection. While the server does not serve the model that made the collection's vectors, the
            collection refuses texts that must be embedded.

        Raises:
            AlreadyExists: a collection of this name exists.
            InvalidArgument: the name is invalid, the file is not a backup, or the backup is damaged.
            FailedPrecondition: a newer version of emberpc wrote the file.
            ResourceExhausted: the server's disk has no space for the collection, the server has as many collections as
                its limit allows, or too many restores wait.
            DeadlineExceeded: the timeout passed; or nothing was sent for a minute (15 seconds while other restores
                wait), because `progress` or the disk was slow.
            Unimplemented: the server's index backend has no backups.
            OSError: the file cannot be read.
            EmberpcError: the call failed otherwise.
        """
        call = backups.restore_collection(name)
        timeout = backups.TIMEOUT if timeout is None else timeout
        with BackupReader(path, name, progress) as file:
            try:
                return await self._runner.upload(call, _requests(file), timeout)
            except EmberpcError:
                if file.error is not None:
                    raise file.error from None
                raise


async def _requests(file: BackupReader) -> AsyncIterator[pb.RestoreCollectionRequest]:
    """Yield the requests that send a file, and report the progress after each.

    An error of reading the file or of the progress function ends the iteration. This function keeps the error as
    `file.error`, since gRPC, which reads the requests, would raise another error in its place.
    """
    requests = file.requests()
    try:
        while (request := await run_blocking(next, requests, None)) is not None:
            yield request
            file.report(request)
    except Exception as error:  # raised again in `restore_collection`, where the caller sees it
        file.error = error
