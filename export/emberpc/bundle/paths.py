"""Follow symbolic links, also where they form a loop. Before Python 3.13, `Path.resolve` raises an error for a loop."""

from __future__ import annotations

import os
from pathlib import Path, PurePath


def real_path(path: Path) -> Path:
    """Return the absolute path with symbolic links followed, except links that form a loop: these stay in the path.

    Raises:
        ValueError: the path has a NUL.
    """
    return Path(os.path.realpath(path))


def is_inside(folder: Path, name: str | PurePath) -> bool:
    """Return whether `name`, a path relative to a folder, leads into the folder or to the folder itself.

    Symbolic links are followed. The file or folder `name` need not exist. False for a name with a NUL, which no file
    has.
    """
    return "\0" not in str(name) and real_path(folder / name).is_relative_to(real_path(folder))
