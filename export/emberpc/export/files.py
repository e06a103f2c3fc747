"""Write files atomically: a file with its final name is always complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.export.errors import ExportError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a new file, which replaces `path` at the end of the block.

    The block must write the file; its folder must exist. If the block raises an exception, the new file is removed, and
    `path` stays unchanged. If `path` is a symbolic link, the file that the link leads to is replaced, and the link
    stays.

    Raises:
        ExportError: `path` is a device, a pipe or a folder, which is never replaced.
        OSError: the new file cannot be moved to `path`, or the block wrote no file.
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
    """Write a text file atomically as UTF-8 in an existing folder; return `path`.

    Raises:
        ExportError: `path` is a device, a pipe or a folder.
        OSError: the file cannot be written.
    """
    with staged(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path
