"""The control groups of this process, which limit its processor time and memory, as in a container (Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class GroupFiles:
    """Where Linux has the files about control groups.

    Attributes:
        own: the file that lists the control groups of this process: a line for each hierarchy, with number, controllers
            and path.
        v2: mount point of control groups version 2.
        v1: folder with a mount point for each controller of version 1.
    """

    own: Path = Path("/proc/self/cgroup")
    v2: Path = Path("/sys/fs/cgroup")
    v1: Path = Path("/sys/fs/cgroup")


#: The usual places.
GROUP_FILES = GroupFiles()


def group_folders(controller: str, files: GroupFiles = GROUP_FILES) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's control groups of a controller and of all groups above them.

    In a container, the path of the group may be that on the host. Then only the folder of the root group exists, so a
    caller must skip folders without the files that it needs.

    Args:
        controller: `cpu` or `memory`.
        files: where the files are.

    Yields:
        A folder, and the version of control groups that it belongs to, 1 or 2. If the groups cannot be read, these are
        the two mount points.
    """
    try:
        lines = files.own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    paths = {
        2: next((path for number, _, path in found if number == "0"), "/"),
        1: next((path for _, names, path in found if controller in names.split(",")), "/"),
    }
    for version, root in ((2, files.v2), (1, files.v1 / controller)):
        path = PurePosixPath(paths[version].lstrip("/"))
        for folder in (path, *path.parents):
            yield root / folder, version
