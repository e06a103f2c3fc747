"""Many small collections: their memory and file descriptors, which closing and deleting returns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

#: Functions for the scripts below: memory and descriptors of the process, and calls on collections.
_PRELUDE = f"""
import os, resource, sys, tempfile
sys.path[:0] = {sys.path!r}
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
import numpy as np
from emberpc.server.errors import ServiceError
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Index
from emberpc.server.memory import keep_freed_memory
from waiting import wait_until

VECTOR = np.ones((1, 384), dtype=np.float32)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def take_all_descriptors():
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return taken

def fill(index, i):
    made = index.create(CollectionSpec(f"c{{i}}", 384))
    made.upsert([NewRecord(f"r{{i}}", f"text {{i}}")], VECTOR)
    find(index, i)

def find(index, i):
    made = index.get(f"c{{i}}")
    assert [record.id for record, _ in made.search(VECTOR, 2)[0].hits] == [f"r{{i}}"]
    assert [record.id for record, _ in made.search_lexical(["text"], [2])[0].hits] == [f"r{{i}}"]
    assert made.info().record_count == 1

def on_threads(work, count):
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(count)))
"""


def run(script: str, folder: Path) -> None:
    """Run a script in another process, with its temporary files in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_small_collection_uses_little_memory_and_returns_it(tmp_path: Path) -> None:
    """In an earlier version, each took 3.2 MB, mostly for a graph that a collection of few records does not use."""
    run(
        """
        keep_freed_memory()
        with tempfile.TemporaryDirectory() as folder, closing(Index(Path(folder))) as index:
            fill(index, -1)
            before = resident()
            on_threads(lambda i: fill(index, i), 100)
            full = resident()
            assert full - before < 130, (before, full)
            on_threads(lambda i: index.delete(f"c{i}"), 100)
            wait_until(lambda: resident() <= before + 25)
        """,
        tmp_path,
    )


def test_50_collections_fit_in_100_descriptors(tmp_path: Path) -> None:
    """In an earlier version, each took 6 or 7: with 1024 descriptors, calls failed at about 150 collections."""
    run(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with tempfile.TemporaryDirectory() as folder:
            with closing(Index(Path(folder))) as index:
                on_threads(lambda i: fill(index, i), 50)
                on_threads(lambda i: find(index, i), 30)
                assert descriptors() < 85, descriptors()
            with closing(Index(Path(folder))) as index:
                specs, token = index.page(1000, "")
                assert len(specs) == 50 and not token
                on_threads(lambda i: find(index, i), 50)
                assert descriptors() < 85, descriptors()
                on_threads(lambda i: index.delete(f"c{i}"), 50)
                assert not list((Path(folder) / "collections").iterdir())
        """,
        tmp_path,
    )


def test_calls_fail_with_files_exhausted_only_during_a_shortage_of_descriptors(tmp_path: Path) -> None:
    """An earlier version returned INTERNAL."""
    run(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        def refused(call):
            try:
                call()
            except ServiceError as error:
                assert error.code.name == "RESOURCE_EXHAUSTED", error
                assert error.reason == "FILES_EXHAUSTED", error
                assert "64" in error.message and "ulimit -n" in error.message, error
            else:
                raise AssertionError("not refused")

        with tempfile.TemporaryDirectory() as folder, closing(Index(Path(folder), max_open=1)) as index:
            for i in range(3):
                fill(index, i)
            taken = take_all_descriptors()
            refused(lambda: index.create(CollectionSpec("another", 384)))
            os.close(taken.pop())
            taken.append(os.open(os.devnull, os.O_RDONLY))
            refused(lambda: find(index, 0))
            refused(lambda: index.restore("another", 0, lambda spec: None))
            for each in taken:
                os.close(each)
            for i in range(3):
                find(index, i)
            fill(index, 3)
        """,
        tmp_path,
    )


def test_the_error_of_a_start_without_free_descriptors_names_the_limit(tmp_path: Path) -> None:
    """The error of an earlier version advised another data directory."""
    run(
        """
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with tempfile.TemporaryDirectory() as folder:
            taken = take_all_descriptors()
            messages = []
            while taken:
                try:
                    Index(Path(folder)).close()
                    break
                except ServiceError as error:
                    messages.append(error.message)
                os.close(taken.pop())
            assert len(messages) > 2, messages
            for message in messages:
                assert "64 open files" in message and "ulimit -n" in message, messages
                assert "--data-dir" not in message, messages
        """,
        tmp_path,
    )
