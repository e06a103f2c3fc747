"""How many cores this process may use, which in a container is not how many the host has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_OWN = Path("/proc/self/cgroup")
_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/cpu")


def usable_cores() -> int:
    """Return the cores in this process's affinity, or its control groups' limit (rounded up) if that is lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, quota())))


def quota(own: Path = _OWN, v2: Path = _V2, v1: Path = _V1) -> float:
    """Return the cores that the control groups allow: that of this process, and all above it.

    Args:
        own: says which groups this process is in, a line for each hierarchy: its number, controllers and path.
        v2: where version 2 is mounted.
        v1: where version 1's controller `cpu` is.

    Returns:
        The least limit; infinity if none sets one.
    """
    limits = [math.inf]
    for root, path in _groups(own, v2, v1):
        for folder in (path, *path.parents):
            # In a container the path may be that of the host, of which only the root is to be seen.
            with suppress(OSError, ValueError, ZeroDivisionError):
                limits.append(_limit(root / folder.relative_to("/"), version_2=root == v2))
    return min(limits)


def _groups(own: Path, v2: Path, v1: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Give where a hierarchy that limits cores is mounted, and this process's group in it."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    yield v2, PurePosixPath(next((path for number, _, path in found if number == "0"), "/"))
    yield v1, PurePosixPath(next((path for _, names, path in found if "cpu" in names.split(",")), "/"))


def _limit(folder: Path, *, version_2: bool) -> float:
    """Return the cores that one group allows; infinity if it sets no limit."""
    if version_2:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
