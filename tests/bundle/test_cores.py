"""Numbers of cores that control groups allow, read from the files that Linux provides."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from emberpc.bundle.control_groups import GroupFiles
from emberpc.bundle.cores import quota, usable_cores


def groups(root: Path, own: str, files: dict[str, str]) -> float:
    (root / "own").write_text(own)
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return quota(GroupFiles(root / "own", root / "v2", root / "v1"))


def test_the_least_limit_of_a_group_and_its_parents_applies(tmp_path: Path) -> None:
    files = {
        "v2/cpu.max": "max 100000",
        "v2/a/cpu.max": "150000 100000",
        "v2/a/b/cpu.max": "400000 100000",
        "v2/other/cpu.max": "1000 100000",
    }
    assert groups(tmp_path, "0::/a/b\n", files) == 1.5


def test_the_root_group_is_read_in_a_container(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/\n", {"v2/cpu.max": "50000 100000"}) == 0.5
    # Without a namespace, the path is that of the host, and the container has no folder of that path.
    assert groups(tmp_path, "0::/system.slice/docker-1.scope\n", {"v2/cpu.max": "50000 100000"}) == 0.5


def test_limits_of_cgroup_version_1_are_read_at_the_path_of_the_cpu_controller(tmp_path: Path) -> None:
    files = {"v1/cpu/cpu.cfs_quota_us": "-1", "v1/cpu/cpu.cfs_period_us": "100000"}
    assert groups(tmp_path, "4:cpu,cpuacct:/c\n0::/\n", files) == inf
    files |= {"v1/cpu/c/cpu.cfs_quota_us": "250000", "v1/cpu/c/cpu.cfs_period_us": "100000"}
    assert groups(tmp_path, "4:cpu,cpuacct:/c\n0::/\n", files) == 2.5


@pytest.mark.parametrize("text", ["", "max", "nonsense 100000", "1000 0"])
def test_an_invalid_cpu_max_sets_no_limit(tmp_path: Path, text: str) -> None:
    assert groups(tmp_path, "0::/\n", {"v2/cpu.max": text}) == inf


def test_usable_cores_are_at_least_1() -> None:
    assert usable_cores() >= 1


@pytest.mark.parametrize("own", ["0::\n", "0::a\n", "4:cpu:c\n", "0::/\udcff\n", "nonsense"])
def test_a_malformed_list_of_groups_leaves_the_limits_of_the_mount_point(tmp_path: Path, own: str) -> None:
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "cpu.max").write_text("50000 100000")
    (tmp_path / "own").write_bytes(own.encode(errors="surrogateescape"))
    assert quota(GroupFiles(tmp_path / "own", tmp_path / "v2", tmp_path / "v1")) == 0.5
