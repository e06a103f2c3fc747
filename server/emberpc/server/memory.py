"""How the C library's allocator keeps memory: measured, since it decides a quarter of the throughput."""

from __future__ import annotations

import ctypes
import platform

#: Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

#: The most that glibc takes. A micro-batch's largest tensors have some megabytes: got from the system for each
#: operator and given back after it, they cost 10,000 page faults a batch, and a batch of 512 tokens 25 % more time.
_MMAP_THRESHOLD = 32 * 2**20
#: What may stay free at the end of a heap: about what the activations of a long text take.
_TRIM_THRESHOLD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc keep what a micro-batch frees for the next one; return whether there is a glibc to tell."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
