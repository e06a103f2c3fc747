"""Reserved disk space for deletions, and for opening the databases that they change.

A deletion writes to a log before it frees space, and SQLite creates files when it opens a database. Neither works on a
full disk without the reserve.
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

#: Bytes of the reserve (16 MiB): the pages that a deletion of some thousand records writes.
_SIZE = 16 * 2**20
#: `reason` of the error of a call for which the disk has no room.
DISK_FULL = "DISK_FULL"
#: Error reasons by which SQLite may report a full disk; they have other causes too.
_FAILURES = frozenset({"DATABASE_FAILED", "DATA_DIRECTORY"})
#: Divisor: the reserve takes at most 1/8 of the file system's size.
_SHARE = 8

Result = TypeVar("Result")


class Reserve:
    """A file of allocated blocks that is removed when a deletion finds the disk full. Safe to use from several threads.

    While the file is missing because the disk is full, writes other than deletions are refused: they would use the
    space that the next deletion needs.

    Args:
        path: the file; created at once if there is room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._size = min(_SIZE, shutil.disk_usage(path.parent).total // _SHARE)
        #: Whether writes other than deletions are refused, since the disk has no room for the file.
        self._missing = False
        with self._lock:
            self._allocate()

    def check(self, consequence: str) -> None:
        """Check that writes other than deletions are allowed; first allocate a removed file again if there is room.

        Args:
            consequence: the effect of a missing reserve, for the message, such as "nothing was written".

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk has no room for the file.
        """
        if self.refill():
            return
        raise ServiceError(
            Code.RESOURCE_EXHAUSTED,
            f"the disk is full; {consequence}, delete collections or make room, and try again",
            reason=DISK_FULL,
        )

    def refill(self) -> bool:
        """Allocate a removed file again if there is room; return whether writes other than deletions are allowed."""
        if self._missing:
            with self._lock:
                self._allocate()
        return not self._missing

    def run(self, action: Callable[[], Result]) -> Result:
        """Run a deletion, or a step that must precede a deletion, and return its result.

        If `action` fails because the disk is full, remove the file of the reserve and run `action` once more.

        Raises:
            ServiceError: errors of `action`; RESOURCE_EXHAUSTED if the reserve is used up or not large enough.
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
        """Run an action and return its result; in a block of `for_deletion` it may use the reserve, as in `run`.

        Raises:
            ServiceError: errors of `action`.
        """
        return self.run(action) if getattr(self._thread, "deletes", False) else action()

    def _release(self) -> bool:
        """Remove the file, and refuse writes other than deletions from now on; return whether the file was removed."""
        with self._lock:
            self._missing = True
            try:
                self._path.unlink()
            except OSError:
                return False
        log.warning(
            "the disk is full: %s was removed for a deletion; other writes are refused until there is room", self._path
        )
        return True

    def _allocate(self) -> None:
        """Allocate the file, and refuse other writes if the disk has no room for it. The caller holds the lock.

        If the file cannot be allocated for another reason, no writes are refused.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            self._missing = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return
        try:
            # Also needed for an existing file, which a crash may have left smaller.
            os.posix_fallocate(descriptor, 0, self._size)
            self._missing = False
        except OSError as error:
            self._path.unlink(missing_ok=True)
            self._missing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not self._missing:
                log.warning("no space can be reserved for deletions on a full disk: %s cannot be allocated", self._path)
        finally:
            os.close(descriptor)
