"""The processor: how many of its cores this process may use, as in a container, and which instructions it has."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path

from emberpc.bundle.control_groups import GROUP_FILES, GroupFiles, group_folders

_CPUINFO = Path("/proc/cpuinfo")
#: Names in /proc/cpuinfo of instructions for int8 dot products: three of x86-64, and one of ARM.
_INT8_FEATURES = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    This is the number of cores in its CPU affinity or, if less, the quota of its control groups, rounded up. If the
    system has no CPU affinity (macOS), all cores of the host count.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, quota())))


def quota(files: GroupFiles = GROUP_FILES) -> float:
    """Return the CPU quota of this process in cores: what its control groups and all groups above them allow.

    Args:
        files: where Linux has the files about control groups.

    Returns:
        The lowest limit of these groups, which may be a fraction; infinity if none has a limit that can be read.
    """
    limits = [math.inf]
    for folder, version in group_folders("cpu", files):
        # A file that is missing, or whose content is not a limit, is skipped.
        with suppress(OSError, ValueError, ZeroDivisionError):
            limits.append(_limit(folder, version_2=version == 2))
    return min(limits)


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


def processor_names() -> dict[str, str]:
    """Return `model name`, `flags` (features on x86-64) and `Features` (on ARM) of /proc/cpuinfo; empty if missing."""
    names = {"model name": "", "flags": "", "Features": ""}
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {**names, "model name": platform.processor()}
    for line in lines:
        name, _, value = line.partition(":")
        if names.get(name.strip()) == "":
            names[name.strip()] = value.strip()
    return names


def multiplies_int8() -> bool:
    """Return whether the processor has instructions for int8 dot products; True if its features are unknown.

    Without them, the variant `int8-static` is slower than fp32 in OpenVINO, and sums that overflow change its vectors.
    """
    names = processor_names()
    features = f"{names['flags']} {names['Features']}".split()
    return not features or not _INT8_FEATURES.isdisjoint(features)
