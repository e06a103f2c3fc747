"""Write files so that each is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.export.errors import ExportError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a name to write to that becomes `path` if the block ends without an exception, and else is removed.

    A link is followed: the file that it leads to is replaced, and the link stays.

    Raises:
        ExportError: `path` is a device, a pipe or a folder, which is never replaced.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ExportError(f"{path} is not a file but a device, a pipe or a folder; move it, or choose another place")
    beside = target.with_name(f"{target.name}.new")
    try:
        yield beside
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> Path:
    """Write a text file as `staged` does; return its path."""
    with staged(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path
