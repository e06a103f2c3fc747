"""Write files atomically: under another name first; a complete file is renamed to its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.export.errors import ExportError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, to which the block must write a new file; the new file then replaces `path`.

    The folder of `path` must exist. If the block raises an exception, the new file is removed, and `path` stays
    unchanged. If `path` is a symbolic link, the link stays, and the file that it leads to is replaced. Two blocks must
    not write to the same `path` at the same time: their new files would have the same name.

    Raises:
        ExportError: `path` is a device, a pipe or a folder, or leads to one.
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
