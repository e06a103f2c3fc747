"""Free memory: how much the system has, how much glibc's allocator keeps, and returning memory to the system."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from contextlib import suppress
from pathlib import Path

from emberpc.bundle.control_groups import GROUP_FILES, GroupFiles, group_folders

#: Numbers of the parameters of glibc's function `mallopt`, with their names in malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

#: Minimum number of bytes of a block that glibc requests from the system by itself and returns when it is freed: 32
#: MiB, the highest value that glibc accepts. The largest tensors of a micro-batch have a few megabytes. With glibc's
#: default, each operator of the model would request and return its tensors: 10,000 page faults per micro-batch, and 25
#: % more time for a micro-batch of 512 tokens.
_MMAP_THRESHOLD = 32 * 2**20
#: Maximum number of free bytes that glibc keeps at the end of a heap: 64 MiB, about the size of the model's
#: intermediate results for a long text.
_TRIM_THRESHOLD = 64 * 2**20

#: Bytes of a block that `return_memory` allocates and frees: 1 MiB. Freeing a block of 64 KiB or more makes glibc trim
#: the end of the block's heap.
_LOOKED_AT = 2**20

_MEMINFO = Path("/proc/meminfo")
#: Files of a control group's limit and use of memory in bytes, and fields of its file `memory.stat` with the bytes of
#: cached files, which Linux frees if other memory is needed; by the version of control groups.
_GROUP_MEMORY = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}

#: The C library of this process; None if it is not glibc, since other C libraries do not have these parameters.
_LIBRARY = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
if _LIBRARY is not None:
    _LIBRARY.malloc.restype = ctypes.c_void_p


def limit_heaps(count: int) -> bool:
    """Limit the number of glibc's heaps to `count`; all threads share them. Call this before threads are started.

    By default glibc creates at most eight heaps per core, and each keeps its own freed memory. Under hostile requests,
    the server used 927 MB more than when idle with this default, and 532 MB more with two heaps
    (`benchmarks/server/hostile.py`, two cores). If glibc's environment variable MALLOC_ARENA_MAX is set, this function
    does nothing.

    Returns:
        Whether the limit was set; False without glibc, with MALLOC_ARENA_MAX, or if glibc refuses the limit.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    return _LIBRARY is not None and bool(_LIBRARY.mallopt(_M_ARENA_MAX, count))


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that a micro-batch frees, for the next micro-batch: set its two thresholds.

    Returns:
        Whether glibc accepted both thresholds; False without glibc.
    """
    if _LIBRARY is None:
        return False
    mmap = _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    return bool(mmap and _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))


def return_memory() -> None:
    """Return free memory to the system, except the ends of heaps other than the main heap and the calling thread's.

    Call this when much memory was freed, such as the weights of a model, which are too much to keep. Without glibc,
    nothing happens. Afterwards glibc keeps up to 64 MiB at the end of a heap again, as after `keep_freed_memory`.

    `malloc_trim` returns free memory inside all heaps, but the free end of the main heap only. A `free` in a thread
    returns the free end of the thread's heap, so this function also frees a block.
    """
    if _LIBRARY is None:
        return
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, 0)
    _LIBRARY.free(ctypes.c_void_p(_LIBRARY.malloc(ctypes.c_size_t(_LOOKED_AT))))
    _LIBRARY.malloc_trim(ctypes.c_size_t(0))
    _LIBRARY.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def free_memory(meminfo: Path = _MEMINFO, groups: GroupFiles = GROUP_FILES) -> float:
    """Return how many bytes this process can still allocate, as in a container; infinity if that cannot be read.

    This is the memory that the system has for new work or, if less, the memory that is left in a control group of this
    process or a group above it. Cached files count as free, since Linux frees them if other memory is needed.

    Args:
        meminfo: the file in which Linux states its memory.
        groups: where Linux has the files about control groups.
    """
    left = [math.inf]
    with suppress(OSError, KeyError, ValueError):
        left.append(1024 * _numbers(meminfo)["MemAvailable:"])
    for folder, version in group_folders("memory", groups):
        limit, used, cached = _GROUP_MEMORY[version]
        # A file that is missing, or whose content is not a number, is skipped; `max` means no limit.
        with suppress(OSError, KeyError, ValueError):
            files = _numbers(folder / "memory.stat")
            left.append(_number(folder / limit) - _number(folder / used) + sum(files[name] for name in cached))
    return max(0, min(left))


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers in a file with a name and a number at the start of each line."""
    rows = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
