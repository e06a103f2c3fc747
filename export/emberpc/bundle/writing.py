"""Write a bundle so that it is whole or not there."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emberpc.bundle.errors import BundleError
from emberpc.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from emberpc.bundle.reading import sha256_of


@contextmanager
def staged_folder(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` if the block ends without an exception.

    On an exception, Ctrl-C included, the temporary folder is removed and
    `target` is as it was.

    Raises:
        BundleError: `target` is there and not an empty folder, and `overwrite` is
            not set; or it holds something that is not a bundle.
    """
    target = Path(target).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BundleError(f"{target} is there and is no folder; choose another place")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST_NAME).exists():
            raise BundleError(f"{target} holds something that is not a bundle; choose an empty or a new folder")
        if not overwrite:
            raise BundleError(f"{target} holds a bundle already; choose another folder, or replace it with --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    # mkdtemp makes folders for their owner alone; a bundle is as readable as what is beside it.
    staging.chmod(0o755)
    try:
        yield staging
        _replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def finish_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, with the size and hash of every file that is in the folder now, and sync all to disk.

    Returns:
        The manifest as written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            files[path.relative_to(folder).as_posix()] = FileEntry(sha256_of(path), path.stat().st_size)
            _sync(path)
    manifest = dataclasses.replace(manifest, files=files)
    path = folder / MANIFEST_NAME
    path.write_text(manifest.to_json(), encoding="utf-8")
    _sync(path)
    _sync(folder)
    return manifest


def _replace(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / "bundle")
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
