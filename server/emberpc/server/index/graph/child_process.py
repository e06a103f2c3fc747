"""Work that would hold the interpreter for long, in a child process that has this one's memory as it stands."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

import numpy as np  # noqa: F401 - its BLAS must be there to be limited
from threadpoolctl import threadpool_limits

# Before a fork OpenBLAS ends its threads, also those that a call of another thread waits for: that one then hangs for
# ever, and so does the fork. With one thread it has none; callers are what there are several of.
threadpool_limits(1, user_api="blas")

_PR_SET_PDEATHSIG = 1
#: Elsewhere a process of several threads had better not be copied.
_FORKS = sys.platform == "linux"
# Not in the child: it shall do as little as it can.
_LIBRARY = ctypes.CDLL(None) if _FORKS else None
_MAX_FILES = 1 << 20


class ChildKilledError(OSError):
    """A signal ended the child; another one may fare better."""


def in_child(work: Callable[[], object]) -> Callable[[], None]:
    """Begin work that is one call into a library and writes files; where there is no child for it, do it here.

    Only this thread is copied. So the work may take no lock that another one
    might hold: no logging, and nothing that the index's own lock does not keep
    still. The C library takes care of its own, and BLAS has no threads here.

    Returns:
        A function to be called once, by the same thread: it waits for the child, and raises OSError if that failed,
        ChildKilledError if a signal ended it.

    Raises:
        OSError: there can be no child.
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
        # It must not outlive this server, nor keep its port or its data directory from the next one.
        if _LIBRARY is not None:
            _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, _MAX_FILES)
        work()
        code = 0
    finally:
        os._exit(code)
