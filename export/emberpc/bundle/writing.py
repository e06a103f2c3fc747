"""Write a bundle atomically: the bundle's folder never holds a part of a bundle.

While a bundle is replaced, its folder is missing for a moment.
"""

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

from emberpc.bundle.atomic_files import sync_to_disk
from emberpc.bundle.errors import BundleError
from emberpc.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from emberpc.bundle.reading import sha256_of

#: Suffix of the names of temporary folders. Names of other folders should not have it, since `remove_abandoned` deletes
#: folders by their names.
_SUFFIX = ".emberpc-partial"


@contextmanager
def staged_folder(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` if the block ends without an exception.

    The block writes all files of the bundle, the manifest last with `finish_bundle`. On an exception in the block,
    Ctrl-C included, the temporary folder is removed, and so are parent folders of `target` that this function created
    and that are empty; `target` does not change. A process that is killed leaves its temporary folder behind;
    `remove_abandoned` removes it when a process writes to the same `target` again.

    Args:
        target: the bundle's folder. It may be missing, an empty folder or, with `overwrite`, a bundle.
        overwrite: whether to replace an existing bundle.

    Raises:
        BundleError: `target` may not be written (see `check_target`), or no folder can be created beside it.
        OSError: `target` cannot be examined; the temporary folder cannot be renamed to `target`; or the parent of
            `target` cannot be synced to disk, and then `target` is the new bundle already.
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
    """Call `remove_abandoned`, and check that a bundle may be written to a folder.

    A folder with a file `emberpc.json` counts as a bundle. Whether this user may write there is not checked.

    Args:
        target: the bundle's folder; it need not exist.
        overwrite: whether to replace an existing bundle.

    Returns:
        The absolute path of the folder.

    Raises:
        BundleError: `target` is a bundle and `overwrite` is False; or it is a folder with other content, is not a
            folder, is a symbolic link, or cannot be examined, for example because its name is too long.
    """
    target = Path(target).absolute()
    try:
        return _checked_target(target, overwrite=overwrite)
    except OSError as error:
        raise BundleError(f"{target} cannot be used ({error.strerror}); choose another place") from error


def _checked_target(target: Path, *, overwrite: bool) -> Path:
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
    """Remove the temporary folders for `target` that killed processes left beside it.

    If a process was killed between moving the old bundle away and renaming the new one, the old bundle is moved back to
    `target`. A process locks each of its temporary folders until the work on it ends; the lock ends with the process,
    too. Locked folders are kept. An OSError, such as on a file system without locks, ends this function silently.
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
    """Create and lock a temporary folder beside `target`. On a file system without locks it is not locked.

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
    """Hold the lock of a folder inside the block. Only code that takes this lock, too, is kept out.

    If the folder is locked already, wait until it is not.

    Raises:
        BlockingIOError: the folder is locked already, and `wait` is False.
        OSError: the folder cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def finish_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with the size and hash of every other file in the folder, and sync files and folders to disk.

    Args:
        folder: the bundle's folder, with all its files except the manifest.
        manifest: the manifest; its `files` are ignored.

    Returns:
        The manifest as written.

    Raises:
        BundleError: a file cannot be read, there are more than 10,000 other files, or a path has more than 1,024
            characters or is no valid Unicode. No manifest is written.
        OSError: the manifest cannot be written, or a file or folder cannot be synced.
    """
    manifest_path = folder / MANIFEST_NAME
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != manifest_path:
            files[path.relative_to(folder).as_posix()] = FileEntry(sha256_of(path), path.stat().st_size)
        sync_to_disk(path)
    manifest = dataclasses.replace(manifest, files=files)
    manifest_path.write_text(manifest.to_json(), encoding="utf-8")
    sync_to_disk(manifest_path)
    sync_to_disk(folder)
    return manifest


def _replace(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`, delete the folder that was there, and sync the parent folder to disk.

    If `staging` cannot be renamed, the old folder is moved back to `target`. If only the sync fails, `target` is
    already the new bundle.
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
    sync_to_disk(target.parent)
