"""How `AsyncClient` makes a file of a collection, and a collection of a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from emberpc.client import _backup
from emberpc.client._aio_running import AsyncRunner
from emberpc.client.exceptions import EmberpcError
from emberpc.client.types import Collection
from emberpc.v1 import index_pb2 as pb


class AsyncBackupCalls:
    """The part of `AsyncClient` that is about backups. Files are written and read in other threads."""

    _runner: AsyncRunner

    async def backup_collection(
        self, name: str, path: Path | str, *, progress: _backup.Told | None = None, timeout: float | None = None
    ) -> int:
        """Do what `Client.backup_collection` does."""
        call = _backup.backup_collection(name)
        timeout = _backup.TIMEOUT if timeout is None else timeout
        with _backup.BackupWriter(path, progress) as file:
            async with aclosing(self._runner.receive(call, timeout)) as messages:
                async for message in messages:
                    await asyncio.to_thread(file.take, message)
                    file.tell()
            return await asyncio.to_thread(file.finish)

    async def restore_collection(
        self, name: str, path: Path | str, *, progress: _backup.Told | None = None, timeout: float | None = None
    ) -> Collection:
        """Do what `Client.restore_collection` does; `progress` is told in the loop's own thread."""
        call = _backup.restore_collection(name)
        timeout = _backup.TIMEOUT if timeout is None else timeout
        with _backup.BackupReader(path, name, progress) as file:
            try:
                return await self._runner.send(call, _told(file), timeout)
            except EmberpcError:
                if file.error is not None:
                    raise file.error from None
                raise


async def _told(file: _backup.BackupReader) -> AsyncIterator[pb.RestoreCollectionRequest]:
    """Give the messages of a file, and tell of them."""
    messages = file.messages()
    try:
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            yield message
            file.tell(message)
    except Exception as error:  # raised again where the caller can see it
        file.error = error
