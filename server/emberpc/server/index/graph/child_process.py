"""Running of work that holds the GIL for long, on Linux in a forked child process, which has a copy of the memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

import numpy as np  # noqa: F401 - threadpool_limits finds only libraries that are loaded
from threadpoolctl import threadpool_limits

# Before a fork, OpenBLAS ends its threads, even if a call in another thread waits for one of them: that call and the
# fork then hang forever. With a limit of one thread, OpenBLAS starts no threads. The server uses several cores all the
# same, since it runs calls in parallel.
threadpool_limits(1, user_api="blas")

_PR_SET_PDEATHSIG = 1
#: Whether work runs in a child process. On other systems, such as macOS, a process with several threads cannot be
#: forked safely.
_FORKS = sys.platform == "linux"
# The C library, for `prctl`. It is loaded here and not in the child, which must do as little as possible.
_LIBRARY = ctypes.CDLL(None) if _FORKS else None
#: The child closes its file descriptors from 3 to below this number.
_MAX_FILES = 1 << 20


class ChildKilledError(OSError):
    """A signal ended the child process; another attempt may succeed."""


def in_child(work: Callable[[], object]) -> Callable[[], None]:
    """Start `work`, one call into a library that writes files, in a child process; if not on Linux, run it here.

    The child has only the calling thread. So `work` must take no lock that another thread may hold: it must not log,
    and must use only data whose lock the caller holds. The C library handles its own locks at a fork, and BLAS has no
    threads in this process.

    Returns:
        A function to be called once, by the same thread: if that thread ends before, the child is killed. The function
        waits for the child, and raises ChildKilledError if a signal ended the child, OSError if `work` failed in the
        child. If `work` ran here, the function does nothing.

    Raises:
        OSError: the child cannot be started. If `work` runs here, its errors are raised too.
    """
    if _LIBRARY is None:
        work()
        return lambda: None
    child = os.fork()
    if not child:
        _work_and_exit(work)

    def wait() -> None:
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            raise ChildKilledError(f"signal {os.WTERMSIG(status)} ended the process that wrote it")
        if status:
            raise OSError(f"the process that wrote it ended with {os.waitstatus_to_exitcode(status)}")

    return wait


def _work_and_exit(work: Callable[[], object]) -> None:
    code = 1
    try:
        # The child must not outlive this server, and must not keep open the port and the lock of the data directory,
        # which the next server needs.
        if _LIBRARY is not None:
            _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, _MAX_FILES)
        work()
        code = 0
    finally:
        os._exit(code)
