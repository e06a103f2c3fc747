"""Follow symbolic links, also where they form a loop. `Path.resolve` raises RuntimeError for a loop."""

from __future__ import annotations

import os
from pathlib import Path, PurePath


def real_path(path: Path) -> Path:
    """Return the absolute path without symbolic links; of a loop of links, the path up to the loop is followed."""
    return Path(os.path.realpath(path))


def is_inside(folder: Path, name: str | PurePath) -> bool:
    """Return whether the file or folder `name` of a folder lies inside the folder once symbolic links are followed."""
    return real_path(folder / name).is_relative_to(real_path(folder))
