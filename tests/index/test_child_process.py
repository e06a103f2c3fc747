"""Work in a child process uses a copy of the parent's memory, and a failure raises an error in the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph.child_process import ChildKilledError, in_child
from index.support import gaussian, numbered
from index_helpers import DIMENSIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a child on Linux only")


def test_a_child_process_works_with_a_copy_of_the_memory(tmp_path: Path) -> None:
    here = {"seen": "this"}

    def work() -> None:
        (tmp_path / "file").write_text(f"{os.getpid()} {here['seen']}")
        here["seen"] = "that"

    in_child(work)()
    pid, seen = (tmp_path / "file").read_text().split()
    assert int(pid) != os.getpid()
    assert seen == here["seen"] == "this"


def test_a_child_process_has_no_open_files_of_its_parent(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as file:
        with pytest.raises(OSError, match="ended with 1"):
            in_child(lambda: os.fstat(file.fileno()))()
        os.fstat(file.fileno())


# In another process, since a failure of this test blocks the process for ever.
MULTIPLYING = """
import threading
import numpy as np
from emberpc.server.index.graph.child_process import in_child
matrix, vector = np.ones((4000, 384), dtype=np.float32), np.ones(384, dtype=np.float32)
over, turn = threading.Event(), threading.Event()

def multiply():
    while not over.is_set():
        matrix @ vector
        turn.set()

thread = threading.Thread(target=multiply)
thread.start()
for _ in range(30):
    in_child(lambda: None)()
    turn.clear()
    turn.wait()
over.set()
thread.join()
print("all came back")
"""


def test_threads_that_multiply_matrices_continue_after_a_fork() -> None:
    found = subprocess.run(
        [sys.executable, "-c", MULTIPLYING], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    assert found.stdout == "all came back\n"


def test_a_killed_child_process_raises_an_error() -> None:
    with pytest.raises(ChildKilledError, match=f"signal {int(signal.SIGKILL)} "):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))()


def test_a_snapshot_whose_process_was_killed_is_written_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    def killed_at_first(work: Callable[[], object]) -> Callable[[], None]:
        children.append(work)
        return in_child(work if len(children) > 1 else lambda: os.kill(os.getpid(), signal.SIGKILL))

    monkeypatch.setattr("emberpc.server.index.graph.persistent_graph.in_child", killed_at_first)
    with closing(Index(tmp_path, buffer_limit=10, snapshot_every=50)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(numbered(60), gaussian(60, DIMENSIONS))
        collection.maintain()
        assert len(children) == 2
        assert len(list(tmp_path.rglob("graph-*.bin"))) == 1


def test_writing_a_snapshot_blocks_neither_writes_nor_searches(collection: Collection, tmp_path: Path) -> None:
    """A waiting write blocks every later search, so a write must not wait for a disk."""
    vectors = gaussian(101, DIMENSIONS)
    collection.upsert(numbered(100), vectors[:100])
    collection.maintain()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The child is blocked until the pipe is read.
    saving = collection._neighbours.save(pipe)
    collection.upsert(numbered(1, first=100), vectors[100:])
    (outcome,) = collection.search(vectors[100:], 1)
    assert outcome.hits[0][0].id == "r00100"
    assert len(pipe.read_bytes()) == saving.size
    saving.wait()
    assert saving.live + len(saving.contents.dead) <= 100
