"""Acknowledged writes survive crashes and damaged files, and other writes are stored whole or not at all."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from index.support import copy_made
from index_helpers import DIMENSIONS, records, true_scores, vectors

# Writes batches of a known size, so that partial ones are found, and prints a line before and after each batch.
WRITER = """
import sys, numpy as np
from pathlib import Path
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Index
index = Index(Path(sys.argv[1]), buffer_limit=16, snapshot_every=40)
rng = np.random.default_rng(int(sys.argv[2]))
try:
    collection = index.create(CollectionSpec("c", 16))
except Exception:
    collection = index.get("c")
start = collection.info().sequence
for number in range(start + 1, start + 100_000):
    if number % 7 == 0:
        # A collection that comes and goes.
        if any(spec.name == "d" for spec in index.page(10, "")[0]):
            print("drop", flush=True)
            index.delete("d")
        print("make", number, flush=True)
        passing = [NewRecord(str(i), str(number)) for i in range(20)]
        index.create(CollectionSpec("d", 16)).upsert(passing, rng.normal(size=(20, 16)).astype("f4"))
        print("made", number, flush=True)
    if number % 5 == 0:
        group = int(rng.integers(0, 12))
        print("try", number, "delete", group, flush=True)
        collection.delete([f"{group}-{i}" for i in range(5)])
    else:
        group = int(rng.integers(0, 12))
        print("try", number, "upsert", group, flush=True)
        new = [NewRecord(f"{group}-{i}", str(number)) for i in range(5)]
        matrix = rng.normal(size=(5, 16)).astype(np.float32)
        matrix[:, 0] = number
        collection.upsert(new, matrix)
    print("done", number, flush=True)
"""


#: Greatest delay in seconds between a line of the writer and its kill: a few operations, each with a commit and an
#: fsync.
LATEST = 0.02


def crash(folder: Path, seed: int, lines: int, delay: float) -> list[str]:
    """Run the writer, kill it with SIGKILL `delay` seconds after `lines` lines, and return all printed lines."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(seed)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [writer.stdout.readline() for _ in range(lines)]
    # The delay synchronises nothing: without it, the writer would always be killed at the beginning of an operation,
    # and hardly ever during a commit.
    time.sleep(delay)
    writer.kill()
    said += writer.stdout.readlines()
    writer.wait(300)
    writer.stdout.close()
    return said


def replay(said: list[str], state: dict[int, str]) -> list[dict[int, str]]:
    """Return the states that may be on disk: that of all acknowledged writes, and that with the write in progress."""
    pending: tuple[str, int, str] | None = None
    for line in said:
        words = line.split()
        if words[:1] == ["try"] and len(words) == 4:
            pending = (words[2], int(words[3]), words[1])
        elif words[:1] == ["done"] and len(words) == 2 and pending and line.endswith("\n"):
            apply(state, *pending)
            pending = None
    possible = [dict(state)]
    if pending:
        apply(state, *pending)
        possible.append(dict(state))
    return possible


def apply(state: dict[int, str], action: str, group: int, number: str) -> None:
    if action == "upsert":
        state[group] = number
    else:
        state.pop(group, None)


def check(collection: Collection, possible: list[dict[int, str]]) -> dict[int, str]:
    """Check that the store has one whole state of the possible ones, and that searches find it; return the state."""
    page, token = collection.page(1000, "", with_vectors=True)
    assert token == ""
    groups: dict[int, set[str]] = {}
    for record in page:
        groups.setdefault(int(record.id.partition("-")[0]), set()).add(record.text)
        assert record.vector is not None
        assert record.vector[0] == float(record.text)
    assert all(len(texts) == 1 for texts in groups.values()), "a batch is half there"
    state = {group: texts.pop() for group, texts in groups.items()}
    assert len(page) == 5 * len(state)
    assert state in possible
    if page:
        matrix = np.stack([record.vector for record in page if record.vector is not None])
        queries = vectors(20, seed=1)
        found = 0.0
        for query, outcome in zip(queries, collection.search(queries, [10] * 20), strict=True):
            best = {page[i].id for i in np.argsort(-true_scores(query, matrix, Distance.COSINE))[:10]}
            found += len(best & {record.id for record, _ in outcome.hits}) / len(best)
        assert found / 20 >= 0.98
    assert [problem for step in collection.verify() for problem in step.problems] == []
    return state


def passing_states(said: list[str], state: str | None) -> set[str | None]:
    """Return the possible states of the collection `d`: None if it is missing, "" if it is empty, or its number."""
    possible = {state}
    for line in said:
        words = line.split() if line.endswith("\n") else []
        if words[:1] == ["drop"]:
            possible |= {None}
        elif words[:1] == ["make"]:
            possible = {None, "", words[1]}
        elif words[:1] == ["made"]:
            possible = {words[1]}
    return possible


def check_passing(index: Index, possible: set[str | None]) -> str | None:
    """Check that the collection `d` is missing, empty or whole, with records of one number only."""
    try:
        collection = index.get("d")
    except ServiceError as error:
        assert error.code is Code.NOT_FOUND
        assert None in possible, "the collection was acknowledged and is gone"
        return None
    hits = collection.search(vectors(1), [100])[0].hits
    texts = {record.text for record, _ in hits}
    assert len(hits) in (0, 20)
    assert len(texts) <= 1
    state = "".join(texts)
    assert state in possible
    return state


def crash_repeatedly(folder: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    state: dict[int, str] = {}
    passing: str | None = None
    for number in range(rounds):
        said = crash(folder, seed * 1000 + number, chance.randint(1, 120), chance.uniform(0, LATEST))
        possible = replay(said, state)
        index = Index(folder, buffer_limit=16)
        passing = check_passing(index, passing_states(said, passing))
        try:
            collection = index.get("c")
        except ServiceError:
            assert possible[0] == {}, "the collection was acknowledged and is gone"
            state = {}
        else:
            collection.maintain()
            state = check(collection, possible)
        index.close()


def test_four_crashes_lose_no_acknowledged_write(tmp_path: Path) -> None:
    crash_repeatedly(tmp_path, rounds=4, seed=1)


@pytest.mark.slow
def test_two_hundred_crashes_lose_no_acknowledged_write(tmp_path: Path) -> None:
    crash_repeatedly(tmp_path, rounds=200, seed=2)


# A process that kills itself at a moment that another process could hardly hit.
KILLED = """
import os, pathlib, signal, sys
from emberpc.server.index import Index
from emberpc.server.index.graph import neighbours, persistent_graph, snapshots
from emberpc.server.index.jobs import maintenance_thread
from index_helpers import records, vectors
folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
maintenance_thread.MaintenanceThread.wake = lambda *_: None  # not before all is written

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "half of a rebuilt graph":
    add, calls = persistent_graph.PersistentGraph.add, []
    def add_or_kill(*arguments):
        calls.append(arguments) if len(calls) < 5 else kill()
        add(*arguments)
    persistent_graph.PersistentGraph.add, neighbours._SLICE = add_or_kill, 10
elif moment == "half of a file":
    in_child = persistent_graph.in_child
    def torn(work):
        def write_half():
            work()
            (path,) = folder.rglob("graph-*.bin.*.tmp")
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getppid(), signal.SIGKILL)
        return in_child(write_half)
    persistent_graph.in_child = torn
elif moment == "no sidecar":
    snapshots.write_text_atomically = kill
else:
    replace = pathlib.Path.replace
    pathlib.Path.replace = lambda path, target: kill() if target.suffix == ".json" else replace(path, target)
collection = Index(folder, buffer_limit=8, snapshot_every=8).get("c")
collection.delete([str(i) for i in range(80)])
collection.upsert(records(*(str(i) for i in range(60, 100)), text="changed"), vectors(40, seed=9))
print("written", flush=True)
collection.maintain()
print("still here", flush=True)
"""


@pytest.mark.parametrize(
    "moment", ["half of a rebuilt graph", "half of a file", "no sidecar", "sidecar under another name"]
)
def test_a_crash_during_maintenance_loses_no_write(tmp_path: Path, moment: str) -> None:
    matrix = filled(tmp_path)
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    assert (found.returncode, found.stdout) == (-signal.SIGKILL, "written\n")
    index = Index(tmp_path, buffer_limit=8)
    collection = index.get("c")
    matrix[60:100] = vectors(40, seed=9)
    for maintained in (False, True):
        if maintained:
            collection.maintain()
        assert collection.count() == 140
        for i, outcome in enumerate(collection.search(matrix[60:], [1] * 140), 60):
            assert outcome.hits[0][0].id == str(i)
            assert outcome.hits[0][0].text == f"{'changed' if i < 100 else 'text'} of {i}"
        assert [problem for step in collection.verify() for problem in step.problems] == []
    index.close()
    names = {path.name for path in tmp_path.rglob("graph-*")}
    assert len(names) == 4, f"two snapshots of two files each, and nothing else: {names}"


def filled(folder: Path) -> np.ndarray:
    """Make an index of 200 records whose graph has been saved twice; return the vectors."""
    copy_made(folder, make_filled)
    return vectors(200)


def make_filled(folder: Path) -> None:
    matrix = vectors(200)
    for half in (range(100), range(100, 200)):
        index = Index(folder, buffer_limit=8)
        try:
            collection = index.get("c")
        except ServiceError:
            collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(records(*(str(i) for i in half)), matrix[half.start : half.stop])
        collection.maintain()
        index.close()


@pytest.mark.parametrize("which", ["newest", "both"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "missing graph", "missing sidecar", "other sidecar"])
def test_a_damaged_snapshot_is_not_used(
    tmp_path: Path, harm: str, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = filled(tmp_path)
    snapshots = sorted(tmp_path.rglob("graph-*.bin"))
    assert len(snapshots) == 2
    for path in snapshots[-1:] if which == "newest" else snapshots:
        data = path.read_bytes()
        sidecar = path.with_suffix(".json")
        if harm == "cut":
            path.write_bytes(data[:-7])
        elif harm == "flipped":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "missing graph":
            path.unlink()
        elif harm == "missing sidecar":
            sidecar.unlink()
        else:
            sidecar.write_text(sidecar.read_text().replace('"dimensions": 16', '"dimensions": 17'))
    index = Index(tmp_path, buffer_limit=8)
    collection = index.get("c")
    assert collection.count() == 200
    for maintained in (False, True):
        if maintained:
            collection.maintain()
        for i, outcome in enumerate(collection.search(matrix, [1] * 200)):
            assert outcome.hits[0][0].id == str(i)
    if harm != "missing sidecar":
        assert "left aside" in caplog.text
    index.close()


def test_an_upsert_on_a_full_disk_is_refused_and_changes_nothing(collection: Collection) -> None:
    collection.upsert(records("a"), vectors(1))
    pages = collection._store._writer.execute("PRAGMA page_count").fetchone()[0]
    # SQLite reports the same as on a disk without space once a database may not grow.
    collection._store._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ServiceError) as refused:
        collection.upsert(records(*(str(i) for i in range(500)), text="x" * 100), vectors(500))
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert "disk is full" in refused.value.message
    assert collection.count() == 1
    assert [record.id for record, _ in collection.search(vectors(1), [10])[0].hits] == ["a"]
    collection._store._writer.execute("PRAGMA max_page_count = 1000000")
    assert collection.upsert(records("b"), vectors(1)).inserted == 1
