"""Check the paths of output files, and write output files atomically."""

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

#: Folder in which Linux has a link to each open file of the process. Through it, a file without a name gets one.
_OPEN_FILES = Path("/proc/self/fd")


def check_output_path(path: Path, overwrite: bool, *, takes_streams: bool = True) -> Target:
    """Check the path of an output file before the work starts. Permission to write is not checked.

    Args:
        path: the output file. A device, a pipe, or an open file such as `/dev/stdout` is a stream.
        overwrite: whether an existing file may be replaced; does not matter for a stream.
        takes_streams: whether the bytes are written in order, so that a stream can receive them.

    Returns:
        The destination, see `Target`.

    Raises:
        CliError: the folder of the file does not exist, the path is a folder, a disk or a socket, the path cannot be
            resolved (such as a loop of links), the file exists and `overwrite` is false, or the path is a stream and
            `takes_streams` is false.
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
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager that yields a new file, which replaces `path` if the block ends without an exception.

    The new file is synced to disk before that. While the block runs, the file has no name, so nothing remains if the
    process is killed. Without unnamed files (NFS, macOS), a killed process leaves `.NAME-….part`. If `path` is a link,
    the file behind the link is replaced. A device, a pipe, or an open file such as `/dev/stdout` is not replaced, but
    written to directly.

    Raises:
        CliError: the path is a folder, a disk or a socket, or cannot be resolved; the file cannot be written; or the
            block raises an OSError.
    """
    target = _target(path)
    try:
        with target.path.open("wb") if target.is_stream else _replacing(target.path) as file:
            yield file
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror or error}") from error


def _target(path: Path) -> Target:
    """Return the destination for an output path.

    Raises CliError for a folder, a disk or a socket, or if the path cannot be resolved, such as a loop of links.
    """
    try:
        return target_of(path, "--output")
    except InputError as error:
        raise CliError(str(error)) from error
    except OSError as error:
        raise CliError(f"--output: {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Context manager that replaces `path` as `atomic_file` does; `path` is no stream and has no links.

    Raises OSError, not CliError.
    """
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        file, named = _opened(part)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                # The source is a link to the open file. link() would link the link itself. With any `src_dir_fd`,
                # Python calls linkat(), which follows the link and so gives the file the name `part`.
                os.link(_OPEN_FILES / str(file.fileno()), part, src_dir_fd=file.fileno())
        part.replace(path)
        _synchronise(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _opened(part: Path) -> tuple[BinaryIO, bool]:
    """Open a new file in the folder of `part`. Return the file, and whether its name is `part`; else it has no name.

    Raises OSError if no file can be created.
    """
    if hasattr(os, "O_TMPFILE") and _OPEN_FILES.is_dir():
        # An error means that the file system has no unnamed files, or that no file can be created here. In the second
        # case `part.open` below fails too, and raises the error.
        with suppress(OSError):
            return os.fdopen(os.open(part.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb"), False
    return part.open("xb"), True


def _synchronise(folder: Path) -> None:
    """Sync the entries of a folder to disk, so that a renamed file keeps its new name after a crash of the host.

    A folder that may be written but not read cannot be synced. The file is there all the same.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
