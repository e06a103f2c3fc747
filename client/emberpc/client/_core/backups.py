"""Backups of collections: build requests, write and read the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from emberpc.client._core import checks
from emberpc.client._core.collections import read_collection
from emberpc.client._core.files import NewFile, target_of
from emberpc.client._core.rpc_call import Call, Method
from emberpc.client.exceptions import Internal
from emberpc.client.types import ByteProgress, Collection
from emberpc.v1 import index_pb2 as pb

_SERVICE = "/emberpc.v1.IndexService/"
BACKUP_COLLECTION = Method(_SERVICE + "BackupCollection", pb.BackupCollectionResponse)
RESTORE_COLLECTION = Method(_SERVICE + "RestoreCollection", pb.RestoreCollectionResponse)

#: Default timeout of a backup or a restore, in seconds: an hour, since a backup may have many gigabytes.
TIMEOUT = 3600.0
#: Maximum number of bytes of the file in one request of a restore.
_CHUNK_BYTES = 2**20


def backup_collection(name: str) -> Call[pb.BackupCollectionResponse, pb.BackupCollectionResponse]:
    """Return the call of `Client.backup_collection`; `checks.text` validates the name.

    The result of each response is the response itself.
    """
    request = pb.BackupCollectionRequest(name=checks.text(name, "name"))
    return Call(BACKUP_COLLECTION, request, lambda message: message)


def restore_collection(name: str) -> Call[pb.RestoreCollectionResponse, Collection]:
    """Return the call of `Client.restore_collection`; `checks.text` validates the name.

    The request of the call is not sent. `BackupReader.requests` yields the requests to send.
    """
    request = pb.RestoreCollectionRequest(name=checks.text(name, "name"))
    return Call(RESTORE_COLLECTION, request, lambda response: read_collection(response.collection))


class BackupWriter:
    """Writes a backup to a `NewFile`; `finish` syncs it to disk and gives it the name `path`.

    A context manager, which discards the new file unless `finish` ended. If `path` is a link, the file behind the
    link is replaced. A device, a pipe or the path of an open file, such as `/dev/stdout`, is not replaced: it receives
    the bytes as they arrive. Only the owner may read and write the new file (mode 0600).

    Args:
        path: the file.
        progress: called by `report` with the bytes received so far and the bytes of the whole backup; None: no calls.

    Raises:
        InputTypeError: `progress` is not a function, or the path is neither a str nor a path object.
        InputError: the path is a folder, a disk or a socket.
        OSError: the new file cannot be created.
    """

    def __init__(self, path: Path | str, progress: ByteProgress | None) -> None:
        checks.function(progress, "progress")
        self._target = target_of(path, "path")
        self._progress = progress
        self._new = None if self._target.is_stream else NewFile(self._target.path, 0o600)
        self._file = self._new.file if self._new is not None else None
        self._digest = hashlib.sha256()
        self._stated = ""
        self._done = self._total = 0

    def __enter__(self) -> BackupWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._new is not None:
            self._new.close()
        elif self._file is not None:
            # Closing a pipe may raise OSError, which must not replace the error that ended the block, if there is one.
            with suppress(OSError) if kind is not None else nullcontext():
                self._file.close()

    def write(self, message: pb.BackupCollectionResponse) -> None:
        """Write the bytes of the next response, and count them for `report`; raise OSError if the write fails."""
        self._opened().write(message.chunk)
        self._digest.update(message.chunk)
        self._done += len(message.chunk)
        self._total = self._total or message.total_bytes
        self._stated = message.sha256

    def report(self) -> None:
        """Call `progress`, if there is one, with the bytes that `write` received and the bytes of the whole backup.

        The latter are 0 before the first response.
        """
        if self._progress is not None:
            self._progress(self._done, self._total)

    def finish(self) -> int:
        """Check the SHA-256, sync the file to disk, rename it to its final name, and return its size in bytes.

        A device or a pipe is neither synced nor renamed, and keeps the bytes if the check fails.

        Raises:
            Internal: the bytes do not have the SHA-256 that the last response stated, or it stated none. An existing
                file is unchanged.
            OSError: the file cannot be written.
        """
        whole = self._stated == self._digest.hexdigest()
        path = self._target.path
        if not whole and self._new is not None:
            raise Internal(f"the backup that came is not the one that was sent; {path} was not written, try again")
        if not whole:
            raise Internal(
                f"the backup that came is not the one that was sent; throw away what went into {path}, and try again"
            )
        if self._new is not None:
            self._new.commit()
        else:
            self._opened().flush()
        return self._done

    def _opened(self) -> BinaryIO:
        """Return the open file; open a device or a pipe at the first call.

        Opening a pipe blocks until another process opens it for reading. `AsyncClient` calls `write` and `finish` in
        another thread, so that does not block the event loop.
        """
        if self._file is None:
            self._file = self._target.path.open("wb")
        return self._file


class BackupReader:
    """Reads a backup from a file. A context manager: the constructor opens the file, the end of the block closes it.

    Args:
        path: the file, not a pipe: its size is read at the start, and sent first.
        name: name of the collection to create.
        progress: called by `report` with the bytes sent so far and the bytes of the whole backup; None: no calls.

    Raises:
        InputTypeError: `progress` is not a function, or the path is neither a str nor a path object.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path | str, name: str, progress: ByteProgress | None) -> None:
        checks.function(progress, "progress")
        self._file = checks.path(path, "path").open("rb")
        self._name = name
        self._total = os.fstat(self._file.fileno()).st_size
        self._progress = progress
        self._done = 0
        #: The error that ended the iteration over `requests`: of reading the file, or of `progress`; None: no error.
        #: The function that iterates sets it, since gRPC, which reads the requests, raises another error in its place.
        self.error: Exception | None = None

    def __enter__(self) -> BackupReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def requests(self) -> Iterator[pb.RestoreCollectionRequest]:
        """Yield the requests that send the file: first name and size, then chunks of at most 1 MiB, last the SHA-256.

        Call this once: it reads the file to its end.

        Raises:
            OSError: the file cannot be read.
        """
        digest = hashlib.sha256()
        yield pb.RestoreCollectionRequest(name=self._name, total_bytes=self._total)
        while chunk := self._file.read(_CHUNK_BYTES):
            digest.update(chunk)
            yield pb.RestoreCollectionRequest(chunk=chunk)
        yield pb.RestoreCollectionRequest(sha256=digest.hexdigest())

    def report(self, message: pb.RestoreCollectionRequest) -> None:
        """Count the bytes of the file in `message`, a request that was sent, and call `progress` if there is one."""
        self._done += len(message.chunk)
        if self._progress is not None:
            self._progress(self._done, self._total)
