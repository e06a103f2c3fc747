"""Settings of the allocator, and the memory that is free in a system and its control groups."""

from __future__ import annotations

import platform
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from emberpc.bundle.control_groups import GroupFiles
from emberpc.server.memory import free_memory

GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize(("environment", "taken"), [({}, GLIBC), ({"MALLOC_ARENA_MAX": "4"}, False)])
def test_malloc_heaps_are_limited_unless_the_environment_sets_a_limit(environment: dict[str, str], taken: bool) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from emberpc.server.memory import limit_heaps; print(limit_heaps(2))"],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == f"{taken}\n"


MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 2000 kB\nHugePages_Total: 0\n"
#: A container of version 2 with a limit of 1,000,000 bytes, 900,000 used, of which 300,000 are cached files.
LIMITED = {
    "v2/memory.max": "1000000\n",
    "v2/memory.current": "900000\n",
    "v2/memory.stat": "anon 600000\nactive_file 100000\ninactive_file 200000\n",
}


def free(root: Path, files: dict[str, str], own: str = "0::/\n") -> float:
    """Return the free memory that `free_memory` finds in these files."""
    for name, text in {"own": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return free_memory(root / "meminfo", GroupFiles(root / "own", root / "v2", root / "v1"))


def test_the_memory_of_the_system_is_free_without_a_limit(tmp_path: Path) -> None:
    assert free(tmp_path, {"meminfo": MEMINFO, **LIMITED, "v2/memory.max": "max\n"}) == 2000 * 1024


def test_a_limit_of_a_control_group_leaves_less_memory_and_cached_files_count_as_free(tmp_path: Path) -> None:
    assert free(tmp_path, {"meminfo": MEMINFO, **LIMITED}) == 400_000


def test_a_group_that_uses_more_than_its_limit_has_no_free_memory(tmp_path: Path) -> None:
    assert free(tmp_path, {"meminfo": MEMINFO, **LIMITED, "v2/memory.current": "1500000\n"}) == 0


def test_the_memory_limit_of_version_1_is_read_at_the_path_of_its_controller(tmp_path: Path) -> None:
    files = {
        "v1/memory/a/memory.limit_in_bytes": "500000\n",
        "v1/memory/a/memory.usage_in_bytes": "450000\n",
        "v1/memory/a/memory.stat": "cache 3\ntotal_active_file 1000\ntotal_inactive_file 2000\n",
    }
    assert free(tmp_path, {"meminfo": MEMINFO, **files}, "5:memory:/a/b\n4:cpu:/c\n") == 53_000


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "MemAvailable: many kB\n"])
def test_a_system_that_states_no_free_memory_sets_no_limit(tmp_path: Path, text: str) -> None:
    assert free(tmp_path, {"meminfo": text}) == inf


def test_this_system_has_free_memory() -> None:
    assert free_memory() > 0
