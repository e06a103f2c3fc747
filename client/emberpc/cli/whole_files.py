"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from emberpc.cli.errors import CliError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file that becomes `path`, and is on disk, if the block ends without an exception.

    Until then it has no name, so that nothing is left of it even if the process
    is killed. Only where the file system has no files without a name (NFS), a
    killed process leaves `.NAME-….part`.

    Raises:
        CliError: it cannot be written.
    """
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    try:
        file, named = _opened(part)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                # By way of linkat(), which follows the link in /proc; Python takes it if a directory is given.
                os.link(f"/proc/self/fd/{file.fileno()}", part, src_dir_fd=file.fileno())
        part.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _opened(part: Path) -> tuple[BinaryIO, bool]:
    """Open a new file beside a target, and say whether it has a name."""
    try:
        return os.fdopen(os.open(part.parent, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb"), False
    except OSError:
        # This file system has none without a name; or it cannot be written to, which the next attempt tells.
        return part.open("xb"), True


def _synchronise(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
