"""Work in a child process: done with this process's memory, apart from it, and told of if it fails."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from emberpc.server.index.children import in_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a child on Linux only")


def test_the_work_is_done_elsewhere_on_what_is_here(tmp_path: Path) -> None:
    here = {"seen": "this"}

    def work() -> None:
        (tmp_path / "file").write_text(f"{os.getpid()} {here['seen']}")
        here["seen"] = "that"

    in_child(work)
    pid, seen = (tmp_path / "file").read_text().split()
    assert int(pid) != os.getpid()
    assert seen == here["seen"] == "this"


def test_it_has_none_of_the_files_that_are_open_here(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as file:
        with pytest.raises(OSError, match="ended with 1"):
            in_child(lambda: os.fstat(file.fileno()))
        os.fstat(file.fileno())


def test_one_that_is_killed_is_told_of() -> None:
    with pytest.raises(OSError, match=f"ended with -{int(signal.SIGKILL)}"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
