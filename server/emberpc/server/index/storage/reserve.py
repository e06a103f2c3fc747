"""Reserved disk space for deletions, and for opening the databases that deletions change.

A deletion writes to the write-ahead log before it frees space, and SQLite creates files when it opens a database. On a
full disk, both work only with the reserve.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.storage.files import disk_is_full

log = logging.getLogger(__name__)

#: Maximum number of bytes of the reserve (16 MiB): enough for the pages that a deletion of some thousand records
#: writes.
_SIZE = 16 * 2**20
#: `reason` of the error of a call for which the disk has no space.
DISK_FULL = "DISK_FULL"
#: Reasons of errors whose cause may be a full disk or something else; `Reserve.run` then reads the free space.
_FAILURES = frozenset({"DATABASE_FAILED", "DATA_DIRECTORY"})
#: Divisor: the reserve takes at most 1/8 of the file system's size.
_SHARE = 8

Result = TypeVar("Result")


class Reserve:
    """A file that takes up disk space until a deletion finds the disk full. Safe to use from several threads.

    The deletion then removes the file to get its space. Until the disk has space for the file again, `check` refuses
    writes other than deletions: they would use the space that the next deletion needs. If the file cannot be allocated
    for another reason than a full disk, there is no reserve, and no write is refused.

    Args:
        path: the file; the constructor allocates it if there is space.

    Raises:
        OSError: the size of the file system cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._size = min(_SIZE, shutil.disk_usage(path.parent).total // _SHARE)
        #: Whether writes other than deletions are refused: a deletion needed the file's space, or the disk has no
        #: space.
        self._missing = False
        with self._lock:
            self._allocate()

    def check(self, consequence: str) -> None:
        """Call `refill`, and raise an error if writes other than deletions are refused. Such a write calls this first.

        Args:
            consequence: the effect of the refusal, for the message, such as "nothing was written".

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the file is missing because the disk has no space for it.
        """
        if self.refill():
            return
        raise ServiceError(
            Code.RESOURCE_EXHAUSTED,
            f"the disk is full; {consequence}, delete collections or free some space, and try again",
            reason=DISK_FULL,
        )

    def refill(self) -> bool:
        """Allocate the file again if it is missing because the disk was full, and the disk has space now.

        Returns:
            Whether writes other than deletions are allowed. They are refused while the disk has no space for the file.
        """
        if self._missing:
            with self._lock:
                self._allocate()
        return not self._missing

    def run(self, action: Callable[[], Result]) -> Result:
        """Run a deletion, or a step that must precede a deletion, and return its result.

        If `action` fails because the disk is full, remove the file and run `action` once more. The file stays missing
        until `refill` or `check` is called while there is space.

        Raises:
            ServiceError: an error of `action`; that of a full disk if the file is missing or too small.
        """
        try:
            return action()
        except ServiceError as error:
            full = error.reason == DISK_FULL or (error.reason in _FAILURES and disk_is_full(self._path.parent))
            if not full or not self._release():
                raise
        return action()

    @contextmanager
    def for_deletion(self) -> Iterator[None]:
        """Allow `run_for_deletion` to use the reserve, in the calling thread during the block."""
        self._thread.deletes = True
        try:
            yield
        finally:
            self._thread.deletes = False

    def run_for_deletion(self, action: Callable[[], Result]) -> Result:
        """Run an action and return its result: by `run` if this thread is in a block of `for_deletion`, else directly.

        Raises:
            ServiceError: an error of `action`.
        """
        return self.run(action) if getattr(self._thread, "deletes", False) else action()

    def _release(self) -> bool:
        """Remove the file, and refuse writes other than deletions until `_allocate` allows them.

        Returns:
            Whether this removed the file. If not, as when the file is missing, writes are refused nevertheless.
        """
        with self._lock:
            self._missing = True
            try:
                self._path.unlink()
            except OSError:
                return False
        log.warning(
            "the disk is full: %s was removed for a deletion; other writes are refused until there is space", self._path
        )
        return True

    def _allocate(self) -> None:
        """Allocate the file, and allow all writes; if the disk has no space for the file, refuse all but deletions.

        If the file cannot be allocated for another reason, all writes are allowed. The caller holds the lock.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._missing = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return
        try:
            # An existing file is allocated too, since a crash may have left it smaller.
            os.posix_fallocate(descriptor, 0, self._size)
            self._missing = False
        except OSError as error:
            self._path.unlink(missing_ok=True)
            self._missing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not self._missing:
                log.warning("no space can be reserved for deletions on a full disk: %s cannot be allocated", self._path)
        finally:
            os.close(descriptor)
