"""Helpers for files in the data directory: full disks, errors, new folders, checksums."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.server import descriptors
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: A disk with fewer free bytes than this (64 KiB) counts as full: SQLite needs about as many to open a database.
_FULL = 64 * 2**10


def disk_is_full(folder: Path) -> bool:
    """Return whether the disk of a folder has less than 64 KiB free, a possible cause of an error that states none.

    Raises:
        OSError: the free space cannot be read, as when the folder does not exist.
    """
    return shutil.disk_usage(folder).free < _FULL


@contextmanager
def translated_os_errors(consequence: str) -> Iterator[None]:
    """Translate each OSError in the block, which writes to the data directory, to `ServiceError`.

    Args:
        consequence: the effect of an error, such as "no collection was made", for the server's log and for the message
            of a full disk.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the disk or a quota is full, a file would be too large, or no file
            descriptor is free; else INTERNAL. The server's log has the details.
    """
    try:
        yield
    except OSError as error:
        log.exception("%s", consequence)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"the disk is full; {consequence}, free some space and try again"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, message, reason="DISK_FULL") from error
        if descriptors.is_shortage(error):
            raise descriptors.shortage() from error
        message = "the data directory cannot be written to; see to its permissions"
        raise ServiceError(Code.INTERNAL, message, reason="DATA_DIRECTORY") from error


def new_folder(collections: Path) -> Path:
    """Create a folder with a random name, for temporary data or for a new collection, and return its path.

    The caller removes a temporary folder. After a crash, the next start removes folders that the catalogue does not
    name (see `DataDirectory`).

    Args:
        collections: the parent of the collections' folders; created if it is missing.

    Raises:
        OSError: the folder cannot be created.
    """
    folder = collections / uuid.uuid4().hex
    folder.mkdir(parents=True)
    return folder


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
