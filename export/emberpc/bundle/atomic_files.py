"""Write a file atomically: at every moment, also after a crash, readers find the old file or the complete new one.

The export and the server use this module, as both import the bundle.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Limit in bytes of a name to which `.`, 16 digits and `.tmp` are added. Common file systems allow names of 255 bytes.
_MAX_BYTES = 255 - 21


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file in the same folder; the new file replaces `path` after the block.

    The block, or a library or a child process that the block waits for, writes the new file. After the block, the file
    is synced to disk, renamed to `path`, and the folder is synced. On an exception in the block, and if a step before
    the end of the renaming fails, the new file is removed, and `path` stays unchanged. A folder that may be written but
    not read is not synced.

    Several writers of one `path` do not disturb each other: each has a new file of its own name, and the last one to
    end replaces the others. A writer that is killed leaves `NAME.….tmp`, or `.HASH.….tmp` for a name of more than 234
    bytes. The next writer of `path` removes it. For that, each writer locks its new file; where the file system has no
    locks, the file stays.

    Raises:
        OSError: the new file cannot be created, synced or renamed; or only the folder cannot be synced, and then `path`
            is the new file already.
    """
    _remove_abandoned(path)
    temporary, lock = _create(path)
    try:
        yield temporary
        sync_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error counts
            temporary.unlink()
        raise
    finally:
        os.close(lock)
    with suppress(PermissionError):
        sync_to_disk(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file as UTF-8, as `atomic_path` does.

    Raises:
        OSError: see `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the list of entries of a folder, is on disk.

    Raises:
        OSError: the path does not exist, cannot be opened for reading, or cannot be written to disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stem(path: Path) -> str:
    """Return the start of the names of new files for `path`: its name, or a hash of a name that leaves no space."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= _MAX_BYTES else f".{hashlib.sha256(name).hexdigest()[:32]}"


def _create(path: Path) -> tuple[Path, int]:
    """Create and lock a new file beside `path`; return its path, and the descriptor that holds the lock."""
    with suppress(FileNotFoundError):
        path.lstat()  # raises OSError if the name is too long, before anything is written
    stem = _stem(path)
    while True:
        temporary = path.with_name(f"{stem}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer removed the file as abandoned, before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the new files that killed writers of `path` left; an OSError ends this function silently."""
    own = re.compile(rf"{re.escape(_stem(path))}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        for left in [each for each in path.parent.iterdir() if own.fullmatch(each.name)]:
            with suppress(OSError):
                _remove_if_unlocked(left)


def _remove_if_unlocked(path: Path) -> None:
    """Remove a file; raise OSError if another process holds its lock, or its file system has no locks.

    Anything else than a file stays: the name may be that of a pipe of another user.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)
