"""Which file is written where a caller names one: a link is followed, and a device or a pipe is never replaced."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from emberpc.client.exceptions import InputError

#: Names in these folders stand for files that this process has open, such as the ends of pipes.
_OPEN_FILES = (Path("/proc"), Path("/dev/fd"))


@dataclass(frozen=True)
class Target:
    """Where the bytes of a new file go.

    Attributes:
        path: the file, after all links were followed.
        is_stream: whether it is a device, a pipe or an open file, such as `/dev/stdout`. Such a target is written into.
            Any other target is replaced when the new file is whole.
    """

    path: Path
    is_stream: bool


def target_of(path: Path | str, name: str) -> Target:
    """Decide how the file that a caller names is written.

    Args:
        path: what the caller gave. There may be no file of that name yet.
        name: what messages call it.

    Raises:
        InputError: it is a folder, a disk or a socket.
        OSError: it cannot be looked at, such as links that lead in a circle.
    """
    given = Path(path)
    try:
        mode = given.stat().st_mode
    except FileNotFoundError:
        # A link that leads to no file names the file that is to be made.
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
    """Tell whether a name stands for a file that this process has open, as `/dev/stdout` does."""
    while True:
        folder = Path(os.path.realpath(path.parent))
        if any(folder.is_relative_to(known) for known in _OPEN_FILES):
            return True
        if not path.is_symlink():
            return False
        path = folder / path.readlink()
