"""Settings of the allocator are set with glibc, unless the environment sets them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
