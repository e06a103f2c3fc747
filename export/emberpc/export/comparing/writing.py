"""Write files of a comparison so that each is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a name to write to that becomes `path` if the block ends without an exception, and else is removed."""
    beside = path.with_name(f"{path.name}.new")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> Path:
    """Write a text file; return its path."""
    with staged(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path
