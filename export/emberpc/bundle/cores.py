"""Count the CPU cores that this process may use. They may be fewer than the host has, for example in a container."""

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
    """Return the number of cores that this process may use, at least 1.

    This is the number of cores in its CPU affinity or, if less, the quota of its control groups, rounded up. If the
    system has no CPU affinity (macOS), all cores of the host count.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, quota())))


def quota(own: Path = _OWN, v2: Path = _V2, v1: Path = _V1) -> float:
    """Return the CPU quota of this process in cores: what its control groups and all groups above them allow.

    Args:
        own: the file that lists the control groups of this process: a line for each hierarchy, with number, controllers
            and path.
        v2: mount point of control groups version 2.
        v1: mount point of the `cpu` controller of version 1.

    Returns:
        The lowest limit of these groups, which may be a fraction; infinity if none has a limit that can be read.
    """
    limits = [math.inf]
    for root, path in _groups(own, v2, v1):
        for folder in (path, *path.parents):
            # In a container, `path` may be that of the group on the host. Then only the root of the hierarchy exists,
            # and the other folders are skipped. A file whose content is not a limit is skipped, too.
            with suppress(OSError, ValueError, ZeroDivisionError):
                limits.append(_limit(root / folder.relative_to("/"), version_2=root == v2))
    return min(limits)


def _groups(own: Path, v2: Path, v1: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield, for versions 2 and 1 of control groups, the mount point and the path of this process's group.

    The path starts with `/`, which stands for the mount point. It is `/` if the file `own` cannot be read or does not
    list a group of the version; for version 1, a group of the controller `cpu`.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    yield v2, PurePosixPath(next((path for number, _, path in found if number == "0"), "/"))
    yield v1, PurePosixPath(next((path for _, names, path in found if "cpu" in names.split(",")), "/"))


def _limit(folder: Path, *, version_2: bool) -> float:
    """Return the number of cores that one control group allows; infinity if it has no limit.

    Args:
        folder: the folder of the group.
        version_2: whether the group is of version 2; otherwise of version 1.

    Raises:
        OSError: the file with the limit does not exist or cannot be read.
        ValueError, ZeroDivisionError: the content of the file is not a limit.
    """
    if version_2:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
    return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
