"""What the C library's allocator keeps of freed memory, and gives back."""

from __future__ import annotations

import ctypes
import os
import platform

#: Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

#: The most that glibc takes. A micro-batch's largest tensors have some megabytes: got from the system for each
#: operator and given back after it, they cost 10,000 page faults a batch, and a batch of 512 tokens 25 % more time.
_MMAP_THRESHOLD = 32 * 2**20
#: What may stay free at the end of a heap: about what the activations of a long text take.
_TRIM_THRESHOLD = 64 * 2**20

#: A block so large that freeing it has glibc look at the end of the heap: its bound for that is 64 KB.
_LOOKED_AT = 2**20

#: Other C libraries have no such knobs.
_LIBRARY = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
if _LIBRARY is not None:
    _LIBRARY.malloc.restype = ctypes.c_void_p


def limit_heaps(count: int) -> bool:
    """Let all threads share `count` heaps; to be called before they are started. Return whether there is a glibc.

    glibc makes up to eight heaps for each core, and each keeps its own freed memory. With them, hostile requests took
    the server to 927 MB above its idle memory, and with two to 532 (`benchmarks/server/hostile.py`, two cores). glibc's
    own variable MALLOC_ARENA_MAX goes before this.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    return _LIBRARY is not None and bool(_LIBRARY.mallopt(_M_ARENA_MAX, count))


def keep_freed_memory() -> bool:
    """Have what a micro-batch frees kept for the next one; return whether there is a glibc to tell."""
    if _LIBRARY is None:
        return False
    mmap = _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    return bool(mmap and _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def return_memory() -> None:
    """Give the system back what is free in the heaps; without glibc, nothing happens.

    The weights of a model that is served no more are too much to keep. At the
    end of a thread's own heap `malloc_trim` leaves everything: only a `free` in
    that thread looks there, so that is done for the thread that calls this.
    """
    if _LIBRARY is None:
        return
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, 0)
    _LIBRARY.free(ctypes.c_void_p(_LIBRARY.malloc(ctypes.c_size_t(_LOOKED_AT))))
    _LIBRARY.malloc_trim(ctypes.c_size_t(0))
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
