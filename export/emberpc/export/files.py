"""Write files atomically, see `emberpc.bundle.atomic_files`; follow links, and refuse devices and pipes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.bundle.atomic_files import atomic_path
from emberpc.export.errors import ExportError


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which the block must write; it then replaces `path`: `atomic_path`.

    The folder of `path` must exist. If `path` is a symbolic link, the link stays, and the file that it leads to is
    replaced.

    Raises:
        ExportError: `path` is a device, a pipe or a folder, or leads to one.
        OSError: the new file cannot be created, synced to disk or renamed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ExportError(f"{path} is not a file but a device, a pipe or a folder; move it, or choose another place")
    with atomic_path(target) as beside:
        yield beside


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically as UTF-8 in an existing folder; return `path`.

    Raises:
        ExportError: `path` is a device, a pipe or a folder.
        OSError: the file cannot be written.
    """
    with staged(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path
