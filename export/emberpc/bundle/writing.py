"""Write a bundle so that it is whole or not there."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from emberpc.bundle.errors import BundleError
from emberpc.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from emberpc.bundle.reading import sha256_of

#: How the names of temporary folders end, so that none is taken for one that holds something else.
_SUFFIX = ".emberpc-partial"


@contextmanager
def staged_folder(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` if the block ends without an exception.

    On an exception, Ctrl-C included, the temporary folder is removed and
    `target` is as it was. A process that is killed leaves it there; whoever
    writes to the same `target` next removes it.

    Raises:
        BundleError: `target` is there and not an empty folder, and `overwrite` is
            not set; or it holds something that is not a bundle; or no folder can be made there.
    """
    target = check_target(target, overwrite=overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging, lock = _make(target, "new")
    except OSError as error:
        raise BundleError(f"{target} cannot be made; choose a place where this user may write") from error
    # mkdtemp makes folders for their owner alone; a bundle is as readable as what is beside it.
    staging.chmod(0o755)
    try:
        yield staging
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there by now
            for parent in made:
                parent.rmdir()
        raise
    finally:
        os.close(lock)


def check_target(target: Path | str, *, overwrite: bool = False) -> Path:
    """See that a bundle may be written to a folder, as `staged_folder` does; what a killed process left is removed.

    Returns:
        The folder, with its whole path.

    Raises:
        BundleError: as for `staged_folder`, but that it cannot be made.
    """
    target = Path(target).absolute()
    remove_abandoned(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BundleError(f"{target} is there and is no folder; choose another place")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST_NAME).exists():
            raise BundleError(f"{target} holds something that is not a bundle; choose an empty or a new folder")
        if not overwrite:
            raise BundleError(f"{target} holds a bundle already; choose another folder, or replace it with --overwrite")
    return target


def remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of a target whose process is gone; put back a bundle that it had moved away.

    Each is locked by the process that made it for as long as that lives; on
    a file system without locks, all stay.
    """
    own = re.compile(rf"\.{re.escape(target.name)}-(new|old)-[^/]*{re.escape(_SUFFIX)}")
    with suppress(OSError), _locked(target.parent):
        for path in sorted(target.parent.iterdir()):
            if not own.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            with suppress(BlockingIOError), _locked(path, wait=False):
                if (path / "bundle").is_dir() and not target.exists():
                    (path / "bundle").rename(target)
                shutil.rmtree(path, ignore_errors=True)


def _make(target: Path, kind: str) -> tuple[Path, int]:
    """Make a temporary folder beside a target, and lock it until the descriptor that is returned is closed."""
    with ExitStack() as stack:
        with suppress(OSError):
            # Nobody may take it for abandoned before it is locked.
            stack.enter_context(_locked(target.parent))
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-{kind}-", suffix=_SUFFIX, dir=target.parent))
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder against other processes; if not to wait, raise BlockingIOError where one has locked it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def finish_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, with the size and hash of every file that is in the folder now, and sync all to disk.

    Returns:
        The manifest as written.
    """
    manifest_path = folder / MANIFEST_NAME
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != manifest_path:
            files[path.relative_to(folder).as_posix()] = FileEntry(sha256_of(path), path.stat().st_size)
        _sync(path)
    manifest = dataclasses.replace(manifest, files=files)
    manifest_path.write_text(manifest.to_json(), encoding="utf-8")
    _sync(manifest_path)
    _sync(folder)
    return manifest


def _replace(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; on an exception `target` is what it was."""
    if target.exists():
        old, lock = _make(target, "old")
        try:
            target.rename(old / "bundle")
            staging.rename(target)
        finally:
            if not target.exists():
                (old / "bundle").rename(target)
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
    else:
        staging.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Write a file, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
