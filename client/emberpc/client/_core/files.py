"""Resolve the path of a file to write, and decide whether the file is replaced, or written into like a device."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from emberpc.client._core import checks
from emberpc.client.exceptions import InputError

#: Folders whose paths, such as `/proc/self/fd/1`, name files that a process has open, for example pipes. Such a file is
#: written into and not replaced, even if it is a regular file. On macOS the folder is `/dev/fd`.
_OPEN_FILES = (Path("/proc"), Path("/dev/fd"))


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
