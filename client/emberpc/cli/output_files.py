"""Check the paths of output files, and write output files atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from emberpc.cli.errors import CliError
from emberpc.client import InputError
from emberpc.client._core.files import NewFile, Target, target_of


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

    See `NewFile`. If `path` is a link, the file behind the link is replaced. A device, a pipe, or an open file such as
    `/dev/stdout` is not replaced, but written to directly.

    Raises:
        CliError: the path is a folder, a disk or a socket, or cannot be resolved; the file cannot be written; or the
            block raises an OSError.
    """
    target = _target(path)
    try:
        if target.is_stream:
            with target.path.open("wb") as file:
                yield file
        else:
            with NewFile(target.path) as new:
                yield new.file
                new.commit()
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
