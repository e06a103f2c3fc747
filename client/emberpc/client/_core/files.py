"""Resolve the path of a file to write, decide whether the file is replaced or written into, and replace a file."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from emberpc.client._core import checks
from emberpc.client.exceptions import InputError

#: Folders whose paths, such as `/proc/self/fd/1`, name files that a process has open, for example pipes. Such a file is
#: written into and not replaced, even if it is a regular file. On macOS the folder is `/dev/fd`.
_OPEN_FILES = (Path("/proc"), Path("/dev/fd"))
#: Folder in which Linux has a link to each open file of the process. Through it, a file without a name gets one.
_OWN_OPEN_FILES = Path("/proc/self/fd")


@dataclass(frozen=True)
class Target:
    """The destination of a new file.

    Attributes:
        path: the file. If `is_stream` is false, all links in the path are resolved.
        is_stream: whether `path` is a device, a pipe, or names a file that a process has open, such as `/dev/stdout`.
            The user of this class must then write into `path`. If false, it must replace `path` by the complete file.
    """

    path: Path
    is_stream: bool


def target_of(path: Path | str, name: str) -> Target:
    """Return the destination for a path that a caller gave.

    Args:
        path: the path. The file and its folder need not exist.
        name: name of the argument in errors.

    Raises:
        InputTypeError: the path is neither a str nor a path object.
        InputError: the path is a folder, a block device or a socket.
        OSError: the path cannot be resolved, for example because of a loop of links.
    """
    given = checks.path(path, name)
    try:
        mode = given.stat().st_mode
    except FileNotFoundError:
        # If the path is a link to a missing file, this missing file is created, and the link stays.
        return Target(Path(os.path.realpath(given)), is_stream=False)
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is {str(path)!r}, a folder; give the name of a file")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        kind = "a disk" if stat.S_ISBLK(mode) else "a socket"
        raise InputError(f"{name} is {str(path)!r}, {kind}; give the name of a file")
    if not stat.S_ISREG(mode) or _is_open_file(given):
        return Target(given, is_stream=True)
    return Target(Path(os.path.realpath(given)), is_stream=False)


class NewFile:
    """A new file, which replaces `path` when `commit` is called; until then `path` stays as it is.

    A context manager, which discards the new file if `commit` was not called. While the file is written it has no name,
    so nothing remains if the process is killed. Without unnamed files (NFS, macOS), a killed process leaves
    `.….part`, with a name of its own for each writer.

    Args:
        path: the file to replace, not a link or a stream; its folder must exist.
        mode: permissions of the new file; the umask of the process limits them.

    Raises:
        OSError: the new file cannot be created.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self._path = path
        self._part = path.with_name(f".{secrets.token_hex(8)}.part")  # short: a name has at most 255 bytes
        #: The new file, open for writing.
        self.file: BinaryIO
        self.file, self._is_named = self._open(mode)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def commit(self) -> None:
        """Sync the new file to disk, rename it to `path`, and sync the folder.

        A folder that may be written but not read cannot be synced. The file is there all the same.

        Raises:
            OSError: the file cannot be written, and `path` is unchanged; or only the folder cannot be synced, and
                `path` is the new file already.
        """
        self.file.flush()
        os.fsync(self.file.fileno())
        if not self._is_named:
            # The source is a link to the open file. link() would link the link itself. With any `src_dir_fd`, Python
            # calls linkat(), which follows the link and so gives the file the name `_part`.
            os.link(_OWN_OPEN_FILES / str(self.file.fileno()), self._part, src_dir_fd=self.file.fileno())
        self._part.replace(self._path)
        try:
            folder = os.open(self._path.absolute().parent, os.O_RDONLY)
        except PermissionError:
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close the new file, and discard it unless `commit` renamed it. May be called several times."""
        with suppress(OSError):  # the bytes that cannot be written are those of a file that is discarded
            self.file.close()
        self._part.unlink(missing_ok=True)

    def _open(self, mode: int) -> tuple[BinaryIO, bool]:
        """Open a new file; return the file, and whether its name is `_part`; else it has no name."""
        if hasattr(os, "O_TMPFILE") and _OWN_OPEN_FILES.is_dir():
            # An error means that the file system has no unnamed files, or that no file can be created here. In the
            # second case the call of `os.open` below fails too, and raises the error.
            with suppress(OSError):
                descriptor = os.open(self._path.absolute().parent, os.O_TMPFILE | os.O_WRONLY, mode)
                return os.fdopen(descriptor, "wb"), False
        return os.fdopen(os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"), True


def _is_open_file(path: Path) -> bool:
    """Return whether a path is below a folder of `_OPEN_FILES`, or is a link that leads to such a path.

    For example, `/dev/stdout` is a link to `/proc/self/fd/1`. A link may lead there over further links. Links in the
    names of folders are resolved too. The links must not form a loop.
    """
    while True:
        folder = Path(os.path.realpath(path.parent))
        if any(folder.is_relative_to(known) for known in _OPEN_FILES):
            return True
        if not path.is_symlink():
            return False
        path = folder / path.readlink()
