"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # only glibc has it
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    found: Callable[[int], int] = trim
    return found


_trim = _find_trim()


def return_memory() -> None:
    """Give the system back what is free in the heap; without glibc, nothing happens.

    glibc keeps freed memory for the next call that needs some. The weights of a
    model that is served no more are too much to keep.
    """
    if _trim is not None:
        _trim(0)
