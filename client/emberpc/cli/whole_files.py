"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from emberpc.cli.errors import CliError
from emberpc.client import InputError
from emberpc.client._core.files import Target, target_of

#: Here Linux has a link to each file that the process has open.
_OPEN_FILES = Path("/proc/self/fd")


def check_place(path: Path, overwrite: bool, *, takes_streams: bool = True) -> Target:
    """Make sure before the work that a file has a place.

    Args:
        path: the file.
        overwrite: whether a file that is there may be replaced.
        takes_streams: whether the bytes are written in their order, so that a device or a pipe can take them.

    Returns:
        Where the bytes will go.

    Raises:
        CliError: its folder is not there, it is a folder itself, it is there and is to stay, or it is a device or a
            pipe that cannot take such a file.
    """
    target = _target(path)
    if target.is_stream:
        if not takes_streams:
            raise CliError(
                f"--output: {path} is a device or a pipe, and this kind of file is not written in one go; "
                "give the name of a file"
            )
        return target
    folder = target.path.absolute().parent
    if not folder.is_dir():
        raise CliError(f"--output: the folder {folder} is not there; make it, or choose another")
    if target.path.exists() and not overwrite:
        raise CliError(f"--output: {path} is there already; choose another name, or --overwrite")
    return target


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file that becomes `path`, and is on disk, if the block ends without an exception.

    Until then it has no name, so that nothing remains of it even if the process
    is killed. Only where there are no files without a name (NFS, macOS), a
    killed process leaves `.NAME-….part`. A link is followed. A device or a pipe
    is written into.

    Raises:
        CliError: it cannot be written.
    """
    target = _target(path)
    try:
        with target.path.open("wb") if target.is_stream else _replacing(target.path) as file:
            yield file
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror or error}") from error


def _target(path: Path) -> Target:
    """Return where the bytes of a file go; raises CliError if it is of a kind that is never written."""
    try:
        return target_of(path, "--output")
    except InputError as error:
        raise CliError(str(error)) from error
    except OSError as error:
        raise CliError(f"--output: {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file that replaces `path` if the block ends without an exception."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        file, named = _opened(part)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                # A directory is given so that linkat() is called, which follows the link; link() does not.
                os.link(_OPEN_FILES / str(file.fileno()), part, src_dir_fd=file.fileno())
        part.replace(path)
        _synchronise(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _opened(part: Path) -> tuple[BinaryIO, bool]:
    """Open a new file beside a target, and say whether it has a name."""
    if hasattr(os, "O_TMPFILE") and _OPEN_FILES.is_dir():
        # An error says that this file system has none without a name; or that there can be no file, as will the next.
        with suppress(OSError):
            return os.fdopen(os.open(part.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb"), False
    return part.open("xb"), True


def _synchronise(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
