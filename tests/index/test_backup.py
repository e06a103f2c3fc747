"""A backup has one consistent state of a whole collection, despite concurrent writes and searches."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance, NewRecord, StoredRecord
from emberpc.server.collections.filters import Comparison, Operator
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs.backup import pieces
from index.backups import folders, restored, taken
from index.support import Clock, gaussian, numbered, refused
from index_helpers import DIMENSIONS, records, vectors


def everything(collection: Collection) -> list[tuple[object, ...]]:
    """Return all values of all records of a collection."""
    found: list[StoredRecord] = []
    token = ""
    while not found or token:
        page, token = collection.page(1000, token, with_vectors=True)
        found += page
    return [tuple(each.tobytes() if isinstance(each, np.ndarray) else each for each in record) for record in found]


def test_a_restored_collection_equals_the_backed_up_one_except_for_its_name(tmp_path: Path) -> None:
    spec = CollectionSpec("c", 8, distance=Distance.EUCLIDEAN, m=8, ef_construction=50, indexed_fields=("kind", "a.b"))
    with closing(Index(tmp_path, buffer_limit=8)) as index:
        collection = index.create(spec)
        matrix = gaussian(300, 8)
        new = [NewRecord(f"r{i}", f"bees and {i}" if i % 3 else "", {"kind": i % 5}, f"l{i % 2}") for i in range(300)]
        for start in range(0, 300, 50):
            collection.upsert(new[start : start + 50], matrix[start : start + 50])
        collection.upsert(new[:20], matrix[20:40])
        collection.delete(["r7", "r8"])
        collection.maintain()
        copy = restored(index, "copy", taken(collection))
        assert copy.spec == replace(spec, name="copy")
        assert everything(copy) == everything(collection)
        assert replace(copy.info(), size_bytes=0) == replace(collection.info(), size_bytes=0)
        copy.maintain()
        searched = [each.search(matrix[:20], 5, min_recall=1) for each in (collection, copy)]
        assert [o.hits for o in searched[0]] == [o.hits for o in searched[1]]
        kind = Comparison("kind", Operator.EQUAL, 3)
        worded = [each.search_lexical(["bees"], [300], conditions=[kind])[0].hits for each in (collection, copy)]
        assert worded[0] == worded[1]
        assert len(worded[0]) == 39
        assert [problem for step in copy.verify() for problem in step.problems] == []
        # The sequence of the copy continues that of the backed-up collection.
        assert copy.upsert(new[:1], matrix[:1], [copy.get(["r0"])[0].revision]).sequence == 9
    with closing(Index(tmp_path)) as index:
        assert index.get("copy").count() == 298
        assert index.get("c").count() == 298


def test_a_collection_with_a_damaged_record_is_not_backed_up_until_it_is_repaired(collection: Collection) -> None:
    collection.upsert(records("a", "b"), vectors(2))
    collection._store._writer.execute("UPDATE records SET text = 'another' WHERE id = 'b'")
    with refused(Code.DATA_LOSS, "'b' is damaged"):
        taken(collection)
    collection.delete(["b"])
    assert taken(collection)


def test_a_restore_keeps_the_expire_times_of_records(index: Index, collection: Collection, clock: Clock) -> None:
    """The expire time is that of the backed-up record. A record that has expired before the restore is left out."""
    collection.upsert([NewRecord("long", time_to_live=3600), NewRecord("short", time_to_live=2)], vectors(2))
    whole = taken(collection)
    clock.move_on(index, 2, lambda: collection.count() == 1)
    copy = restored(index, "copy", whole)
    assert [record.id for record in copy.get(["long", "short"])] == ["long"]
    assert copy.get(["long"]) == collection.get(["long"])


def test_an_empty_collection_and_one_of_vectors_only_are_restored(index: Index, collection: Collection) -> None:
    assert restored(index, "empty", taken(collection)).count() == 0
    collection.upsert([NewRecord("v")], gaussian(1, DIMENSIONS))
    collection.delete(["v"])
    copy = restored(index, "emptied", taken(collection))
    assert copy.info().sequence == 2
    assert copy.upsert([NewRecord("w")], gaussian(1, DIMENSIONS)).sequence == 3


def test_a_backup_is_one_consistent_state_despite_concurrent_writes_and_searches(tmp_path: Path) -> None:
    """Each write replaces a pair of records with a number. A backup with half a pair or two numbers is inconsistent."""
    stop, written = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def repeat(work: Callable[[int], object]) -> threading.Thread:
        def run() -> None:
            try:
                number = 0
                while not stop.is_set():
                    work(number := number + 1)
            except BaseException as error:  # reported at the end of the test
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with closing(Index(tmp_path, buffer_limit=50)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(numbered(200), gaussian(200, DIMENSIONS))

        def write(number: int) -> None:
            pair = [NewRecord(f"{side}{number % 40}", f"number {number}") for side in "ab"]
            if number % 5:
                collection.upsert(pair, gaussian(2, DIMENSIONS, number))
            else:
                collection.delete([record.id for record in pair])
            written.set()

        def maintain(_: int) -> None:
            collection.maintain()
            stop.wait(0.01)

        write(1)
        threads = [
            repeat(write),
            repeat(lambda _: collection.search(gaussian(4, DIMENSIONS), 5)),
            repeat(lambda _: collection.search_lexical(["number"], [5])),
            repeat(maintain),
        ]
        try:
            sequences = []
            for i in range(3):
                # Also on a slow host, there is a write between two backups.
                written.clear()
                assert written.wait(600)
                before = collection.info().sequence
                whole = taken(collection)
                copy = restored(index, f"copy{i}", whole)
                assert copy.info().sequence >= before
                sequences.append(copy.info().sequence)
                found, _ = copy.page(1000, "")
                pairs = {record.id: record for record in found if not record.id.startswith("r")}
                assert pairs
                for record in pairs.values():
                    twin = pairs[{"a": "b", "b": "a"}[record.id[0]] + record.id[1:]]
                    assert (twin.text, twin.revision) == (record.text, record.revision)
                assert [problem for step in copy.verify() for problem in step.problems] == []
                index.delete(f"copy{i}")
            assert sequences == sorted(set(sequences))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []


def test_a_cancelled_backup_leaves_no_files(collection: Collection, tmp_path: Path) -> None:
    collection.upsert(numbered(5000), gaussian(5000, DIMENSIONS))
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        assert folders(tmp_path) == 2  # the copy has begun
        return True

    assert list(collection.backup(stop)) == []
    assert asked
    assert folders(tmp_path) == 1


def test_a_backup_outlives_its_collection_and_leaves_no_file(
    index: Index, collection: Collection, tmp_path: Path
) -> None:
    collection.upsert(records("a", "b"), vectors(2))
    backup = collection.backup(lambda: False)
    first = next(backup)
    assert folders(tmp_path) == 1
    index.delete("c")
    whole = first.data + b"".join(piece.data for piece in backup)
    assert restored(index, "again", whole).count() == 2
    with refused(Code.UNAVAILABLE, "deleted"):
        next(collection.backup(lambda: False))


def test_closing_a_backup_closes_its_file(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"x" * 3_000_000)
    with (tmp_path / "copy").open("rb") as copy:
        backup = pieces(copy)
        assert len(next(backup).data) == 2**20
        backup.close()
        assert copy.closed


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_backup_without_space_on_the_disk_is_refused_with_the_needed_bytes(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.upsert(numbered(100), gaussian(100, DIMENSIONS))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with refused(Code.RESOURCE_EXHAUSTED, " bytes", "1000 are free", "free some space") as reported:
        next(collection.backup(lambda: False))
    assert int(reported.value.metadata["needed_bytes"]) > 100 * DIMENSIONS * 4
    assert folders(tmp_path) == 1
    assert collection.upsert(records("a"), vectors(1)).sequence == 2


# Backs up and restores endlessly, and prints each step.
LOOP = """
import sys, hashlib
from pathlib import Path
from emberpc.server.index import Index
index = Index(Path(sys.argv[1]))
collection = index.get("c")
number = 0
while True:
    number += 1
    print("backup", number, flush=True)
    whole = b"".join(piece.data for piece in collection.backup(lambda: False))
    print("restore", number, flush=True)
    restoration = index.restore(f"copy{number}", len(whole), lambda spec: None)
    for start in range(0, len(whole), 200_000):
        restoration.write(whole[start : start + 200_000])
        print("piece", number, flush=True)
    restoration.finish(hashlib.sha256(whole).hexdigest())
    print("done", number, flush=True)
"""


def crash(folder: Path, lines: int) -> list[str]:
    """Run the loop, kill it with SIGKILL after `lines` lines, and return all lines that it printed."""
    child = subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(lines)]
    child.kill()
    said += child.stdout.readlines()
    child.wait(300)
    child.stdout.close()
    return said


def crash_repeatedly(folder: Path, rounds: Sequence[int]) -> None:
    """Crash after each of these numbers of lines, and check that only whole collections are left."""
    with closing(Index(folder)) as index:
        collection = index.create(CollectionSpec("c", 64))
        collection.upsert(numbered(2000), gaussian(2000, 64))
        wanted = everything(collection)
    for lines in rounds:
        said = crash(folder, lines)
        done = {f"copy{line.split()[1]}" for line in said if line.startswith("done") and line.endswith("\n")}
        with closing(Index(folder)) as index:
            names = {spec.name for spec in index.page(1000, "")[0]} - {"c"}
            assert folders(folder) == 1 + len(names), "something was left behind"
            assert done <= names, "a collection was acknowledged and is gone"
            assert len(names) <= len(done) + 1
            for name in names:
                assert everything(index.get(name)) == wanted
                assert [problem for step in index.get(name).verify() for problem in step.problems] == []
                index.delete(name)


def test_two_crashes_in_backup_and_restore_leave_only_whole_collections(tmp_path: Path) -> None:
    # In the first backup; between the last piece of the second restore and its end (7 lines are one round).
    crash_repeatedly(tmp_path, [1, 13])


@pytest.mark.slow
def test_sixty_crashes_in_backup_and_restore_leave_only_whole_collections(tmp_path: Path) -> None:
    crash_repeatedly(tmp_path, range(1, 61))
