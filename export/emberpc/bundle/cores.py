"""Count the CPU cores that this process may use. In a container these may be fewer than the host has."""

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
    """Return the number of cores of this process's CPU affinity, or the control groups' limit (rounded up) if lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, quota())))


def quota(own: Path = _OWN, v2: Path = _V2, v1: Path = _V1) -> float:
    """Return the number of cores that this process's control group and all groups above it allow.

    Args:
        own: the file that lists this process's groups: a line per hierarchy, with its number, controllers and path.
        v2: mount point of control groups version 2.
        v1: mount point of the `cpu` controller of version 1.

    Returns:
        The lowest limit of these groups; infinity if none has a limit.
    """
    limits = [math.inf]
    for root, path in _groups(own, v2, v1):
        for folder in (path, *path.parents):
            # In a container, the path may be the one on the host. Only its root exists inside the container.
            with suppress(OSError, ValueError, ZeroDivisionError):
                limits.append(_limit(root / folder.relative_to("/"), version_2=root == v2))
    return min(limits)


def _groups(own: Path, v2: Path, v1: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield, for each version of control groups, its mount point and the path of this process's group below it."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    yield v2, PurePosixPath(next((path for number, _, path in found if number == "0"), "/"))
    yield v1, PurePosixPath(next((path for _, names, path in found if "cpu" in names.split(",")), "/"))


def _limit(folder: Path, *, version_2: bool) -> float:
    """Return the number of cores that one control group allows; infinity if it has no limit.

    Raises:
        OSError: the group or its file does not exist.
        ValueError, ZeroDivisionError: the file has an unknown content.
    """
    if version_2:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
