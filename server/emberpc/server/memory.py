"""Control how much freed memory glibc's allocator keeps, and return free memory to the system."""

from __future__ import annotations

import ctypes
import os
import platform

#: Parameters of `mallopt`, with their names and numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

#: Bytes from which glibc requests a block from the system and returns it when it is freed; this is the highest value
#: that glibc accepts. The largest tensors of a micro-batch have a few megabytes. With glibc's default, each operator
#: would request and return them: 10,000 page faults per batch, and 25 % more time for a batch of 512 tokens.
_MMAP_THRESHOLD = 32 * 2**20
#: Most free bytes at the end of a heap that glibc keeps: about the size of a long text's activations.
_TRIM_THRESHOLD = 64 * 2**20

#: Bytes of a block whose `free` makes glibc trim the end of the heap. glibc does so for blocks of more than 64 KB.
_LOOKED_AT = 2**20

#: None without glibc: other C libraries do not have these parameters.
_LIBRARY = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
if _LIBRARY is not None:
    _LIBRARY.malloc.restype = ctypes.c_void_p


def limit_heaps(count: int) -> bool:
    """Limit the number of glibc's heaps, which all threads share, to `count`. Call this before threads are started.

    By default glibc creates up to eight heaps per core, and each keeps its own freed memory. Under hostile requests,
    the server then used 927 MB more than when idle, and 532 MB more with two heaps (`benchmarks/server/hostile.py`, two
    cores). If the environment variable MALLOC_ARENA_MAX of glibc is set, it has precedence and this does nothing.

    Returns:
        Whether the limit was set; False without glibc or with MALLOC_ARENA_MAX.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    return _LIBRARY is not None and bool(_LIBRARY.mallopt(_M_ARENA_MAX, count))


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that a micro-batch frees for the next micro-batch.

    Returns:
        Whether the parameters were set; False without glibc.
    """
    if _LIBRARY is None:
        return False
    mmap = _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    return bool(mmap and _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def return_memory() -> None:
    """Return the free memory of all heaps to the system. Without glibc, nothing happens.

    For use after a model was unloaded: its weights are too large to keep. `malloc_trim`
    does not return the free end of a thread's own heap. Only a `free` in that thread
    does, so this function also frees a block in the calling thread.
    """
    if _LIBRARY is None:
        return
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, 0)
    _LIBRARY.free(ctypes.c_void_p(_LIBRARY.malloc(ctypes.c_size_t(_LOOKED_AT))))
    _LIBRARY.malloc_trim(ctypes.c_size_t(0))
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
