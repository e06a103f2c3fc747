"""Work that would hold the GIL for long, in a forked child process with a copy of this process's memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

import numpy as np  # noqa: F401 - threadpool_limits finds only libraries that are loaded
from threadpoolctl import threadpool_limits

# Before a fork OpenBLAS ends its threads, also those that another thread's call waits for: that call then hangs for
# ever, and so does the fork. Limited to one thread OpenBLAS has none; the server's callers run in parallel instead.
threadpool_limits(1, user_api="blas")

_PR_SET_PDEATHSIG = 1
#: On other systems a process with several threads should not be forked.
_FORKS = sys.platform == "linux"
# Loaded here and not in the child, which should do as little as possible.
_LIBRARY = ctypes.CDLL(None) if _FORKS else None
_MAX_FILES = 1 << 20


class ChildKilledError(OSError):
    """A signal ended the child; another attempt may succeed."""


def in_child(work: Callable[[], object]) -> Callable[[], None]:
    """Start work that is one call into a library and writes files, in a child process; without fork, run it here.

    The child has only this thread. So the work may take no lock that another thread might hold: it must not log, and
    must use only data that the index's own lock protects. The C library handles its own locks at a fork, and BLAS has
    no threads here.

    Returns:
        A function to be called once, by the same thread. It waits for the child, and raises OSError if the child
        failed, ChildKilledError if a signal ended it.

    Raises:
        OSError: the child cannot be started.
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
        # The child must not outlive this server, nor keep its port or its data directory from the next server.
        if _LIBRARY is not None:
            _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, _MAX_FILES)
        work()
        code = 0
    finally:
        os._exit(code)
