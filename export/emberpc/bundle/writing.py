"""Write a bundle atomically: the folder with the bundle's name never holds a part of a bundle."""

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

#: Suffix of the names of temporary folders; no other folder has it.
_SUFFIX = ".emberpc-partial"


@contextmanager
def staged_folder(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` if the block ends without an exception.

    The block writes all files of the bundle, the manifest last with `finish_bundle`. On an exception in the block,
    Ctrl-C included, the temporary folder and the parent folders that were created are removed, and `target` does not
    change. A process that is killed leaves its temporary folder behind; the next process that writes to the same
    `target` removes it.

    Args:
        target: the bundle's folder. If the folder exists, it must be empty, or hold a bundle with `overwrite` set.
        overwrite: whether to replace an existing bundle.

    Raises:
        BundleError: `target` holds a bundle and `overwrite` is not set; or it holds something else or is not a folder;
            or no folder can be created there.
        OSError: the temporary folder cannot be renamed to `target`; or its parent cannot be synced to disk, and then
            `target` is the new bundle already.
    """
    target = check_target(target, overwrite=overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging, lock = _make(target, "new")
    except OSError as error:
        raise BundleError(f"{target} cannot be created; choose a place where this user may write") from error
    # mkdtemp creates folders that only their owner can read, but other users, such as a server's, must read a bundle.
    staging.chmod(0o755)
    try:
        yield staging
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # another process may have put something there meanwhile
            for parent in made:
                parent.rmdir()
        raise
    finally:
        os.close(lock)


def check_target(target: Path | str, *, overwrite: bool = False) -> Path:
    """Check that a bundle may be written to a folder; remove the temporary folders of killed processes beside it.

    Args:
        target: the bundle's folder; it need not exist, and is not created.
        overwrite: whether to replace an existing bundle.

    Returns:
        The absolute path of the folder.

    Raises:
        BundleError: `target` holds a bundle and `overwrite` is not set; or it holds something else, is not a folder, or
            is a symbolic link.
    """
    target = Path(target).absolute()
    remove_abandoned(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BundleError(f"{target} exists and is not a folder; choose another place")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST_NAME).exists():
            raise BundleError(f"{target} holds something that is not a bundle; choose an empty or a new folder")
        if not overwrite:
            raise BundleError(f"{target} holds a bundle already; choose another folder, or replace it with --overwrite")
    return target


def remove_abandoned(target: Path) -> None:
    """Remove temporary folders that killed processes left beside `target`.

    If a process was killed between moving the old bundle away and renaming the new one, the old bundle is moved back to
    `target`. A process locks its temporary folders as long as it lives. On a file system without locks, nothing is
    removed.
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
    """Create and lock a temporary folder beside `target`.

    Args:
        target: the bundle's folder.
        kind: part of the temporary folder's name: `new`, or `old` for a bundle that is replaced.

    Returns:
        The folder, and the descriptor that holds the lock; closing it releases the lock.

    Raises:
        OSError: the folder cannot be created.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            # Until the new folder is locked, this lock keeps other processes from removing it as abandoned.
            stack.enter_context(_locked(target.parent))
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-{kind}-", suffix=_SUFFIX, dir=target.parent))
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder against other processes inside the block.

    If another process has locked it, wait; without `wait`, raise BlockingIOError.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def finish_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the size and hash of every file now in the folder, and sync all files to disk.

    Args:
        folder: the bundle's folder, with all its files except the manifest.
        manifest: the manifest; its `files` are ignored.

    Returns:
        The manifest as written.

    Raises:
        BundleError: a file cannot be read, there are more than 10,000 files, or a path has more than 1,024 characters.
        OSError: a file cannot be written or synced.
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
    """Rename `staging` to `target`, and delete the bundle that was there.

    On an exception `target` does not change, except if only the last step fails, the sync of its parent.
    """
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
    """Sync a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
