"""A full disk: acknowledged writes stay, deletions work, and writes work again when there is space."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle.atomic_files import write_text_atomically
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.collections.filters import Comparison, Operator
from emberpc.server.collections.types import Matrix, StoredRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage import reserve as reserve_module
from emberpc.server.index.storage.reserve import Reserve
from index.support import gaussian, recall, refused

WIDTH, BATCH = 64, 20
MEGABYTE = 2**20
#: The size of the reserve in production; `conftest.py` gives other tests a smaller one.
RESERVE_SIZE = reserve_module._SIZE


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 8 MiB."""
    monkeypatch.setattr(reserve_module, "_SIZE", RESERVE_SIZE)
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def batch(number: int) -> tuple[list[NewRecord], Matrix]:
    """Return a batch of records, of which half replace records of the batch before."""
    ids = [f"r{i:05}" for i in range(number * BATCH // 2, number * BATCH // 2 + BATCH)]
    records = [NewRecord(each, f"{number} " + "word " * 100, {"batch": number}) for each in ids]
    return records, gaussian(BATCH, WIDTH, seed=number)


def fill(collection: Collection, first: int) -> tuple[dict[str, tuple[int, Matrix]], int]:
    """Write batches until the disk is full; return the acknowledged records, and the number of the refused batch."""
    written: dict[str, tuple[int, Matrix]] = {}
    for number in range(first, first + 10_000):
        records, vectors = batch(number)
        try:
            collection.upsert(records, vectors)
        except ServiceError as error:
            assert error.code is Code.RESOURCE_EXHAUSTED, error.message
            return written, number
        written |= {record.id: (number, vector) for record, vector in zip(records, vectors, strict=True)}
        if number % 8 == 0:
            collection.maintain()
    raise AssertionError("the disk never filled up")


def check(collection: Collection, written: dict[str, tuple[int, Matrix]]) -> None:
    """Check that exactly the acknowledged records are stored, and that searches find them."""
    found: list[StoredRecord] = []
    token = ""
    while not found or token:
        page, token = collection.page(1000, token, with_vectors=True)
        found += page
    assert {record.id: record.metadata["batch"] for record in found} == {key: each[0] for key, each in written.items()}
    for record in found:
        assert record.vector is not None
        assert np.array_equal(record.vector, written[record.id][1])
    truth = {key: vector for key, (_, vector) in written.items()}
    assert recall(collection, truth, gaussian(20, WIDTH, seed=10**6), 10) >= 0.98
    assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_file_that_the_disk_has_no_space_for_leaves_the_old_one(small_disk: Path) -> None:
    path = small_disk / "file"
    write_text_atomically(path, "old")
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new" * 4 * MEGABYTE)
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.slow
def test_a_full_disk_loses_no_acknowledged_write(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * MEGABYTE))
    data = small_disk / "data"
    with closing(Index(data, buffer_limit=8, snapshot_every=50)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        written, number = fill(collection, 0)
        check(collection, written)
        collection._graph_maintenance.snapshot()
        assert "no snapshot" in caplog.text
        check(collection, written)
    for space in (False, True):
        if space:
            ballast.unlink()
        with closing(Index(data, buffer_limit=8, snapshot_every=50)) as index:
            collection = index.get("c")
            check(collection, written)
            collection.maintain()
            check(collection, written)
            more, number = fill(collection, number)
            assert bool(more) >= space
            written |= more
            check(collection, written)


def fill_to_the_last_byte(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_records_and_collections_can_be_deleted_on_a_full_disk(small_disk: Path) -> None:
    data = small_disk / "data"
    with closing(Index(data, buffer_limit=8, snapshot_every=10**6)) as index:
        # The first collection is larger than the reserve for deletions. Snapshots are switched off, since maintenance
        # could write them at any time.
        for name, batches in (("c", 80), ("d", 8)):
            collection = index.create(CollectionSpec(name, WIDTH))
            for number in range(batches):
                collection.upsert(*batch(number))
        assert index.get("c").info().size_bytes > MEGABYTE
        fill_to_the_last_byte(small_disk / "ballast")
        # Writes find space in the write-ahead log until it is full.
        _, number = fill(collection, 8)
        count = collection.count()
        for i in range(0, count, 5):
            (gone, *_), _ = collection.page(1, "")
            deleted = collection.delete([gone.id, "none"])
            assert deleted.deleted == 1, i
        ids = [record.id for record in collection.page(1000, "")[0]]
        assert len(ids) == collection.count() < count
        assert collection.delete_matching(Comparison("batch", Operator.LESS, 4)).deleted > 0
        # Other writes do not get the space that deletions need.
        while True:
            try:
                collection.upsert(*batch(number))
            except ServiceError as error:
                assert error.reason == "DISK_FULL"
                break
        assert collection.delete(ids[-3:]).deleted == 3
        index.delete("c")
        assert [spec.name for spec in index.page(10, "")[0]] == ["d"]
        # The space of the collection is free again.
        assert collection.upsert(*batch(0)).sequence
        assert [problem for step in collection.verify() for problem in step.problems] == []
    with closing(Index(data)) as index:
        assert [spec.name for spec in index.page(10, "")[0]] == ["d"]


def test_a_deletion_empties_the_log_that_a_reader_kept_full_before(small_disk: Path) -> None:
    """If maintenance reads the database while a deletion uses the reserve, the log keeps the space."""
    with closing(Index(small_disk / "data")) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        for number in range(60):
            collection.upsert(*batch(number))
    with closing(Index(small_disk / "data", buffer_limit=10**6, snapshot_every=10**6)) as index:
        collection = index.get("c")
        fill_to_the_last_byte(small_disk / "ballast")
        (database,) = (small_disk / "data").rglob("records.db")
        with closing(sqlite3.connect(database, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM records").fetchone()
            with refused(Code.RESOURCE_EXHAUSTED):
                while collection.delete([collection.page(1, "")[0][0].id]).deleted:
                    pass
        left = collection.count()
        assert collection.delete([collection.page(1, "")[0][0].id]).deleted == 1
        assert collection.count() == left - 1


def test_a_server_started_on_a_full_disk_can_delete(small_disk: Path) -> None:
    data = small_disk / "data"
    with closing(Index(data)) as index:
        for name in ("c", "d"):
            index.create(CollectionSpec(name, WIDTH)).upsert(*batch(0))
    fill_to_the_last_byte(small_disk / "ballast")
    with closing(Index(data)) as index:
        assert index.get("c").delete(["r00001", "r00002"]).deleted == 2
        assert index.get("c").count() == BATCH - 2
        index.delete("d")
        assert [spec.name for spec in index.page(10, "")[0]] == ["c"]
    (small_disk / "ballast").unlink()
    with closing(Index(data)) as index:
        assert index.get("c").count() == BATCH - 2
        assert index.get("c").upsert(*batch(0)).inserted == 2
        assert (data / "reserve").stat().st_size == 1 * MEGABYTE


def test_a_closed_collection_on_a_full_disk_is_opened_for_deletions_only(small_disk: Path) -> None:
    """In an earlier version, reads removed the reserve, and failed with INTERNAL without it."""
    data = small_disk / "data"
    names = ("c", "d", "e")
    with closing(Index(data)) as index:
        for name in names:
            index.create(CollectionSpec(name, WIDTH)).upsert(*batch(0))
        assert all(index.get(name).close_idle() for name in names)
        fill_to_the_last_byte(small_disk / "ballast")
        check_closed(index, data)
    fill_to_the_last_byte(small_disk / "more")
    with closing(Index(data)) as index:
        check_closed(index, data)
        assert index.get("c").delete(["r00001"]).deleted == 1
        assert not (data / "reserve").exists()
        fill_to_the_last_byte(small_disk / "still more")
        # No space of the reserve is left.
        for call in calls_of(index.get("d")):
            with refused(Code.RESOURCE_EXHAUSTED, "the disk is full", "free some space"):
                call()
    for name in ("ballast", "more", "still more"):
        (small_disk / name).unlink()
    with closing(Index(data)) as index:
        for name in names:
            assert index.get(name).count() == BATCH - (name == "c")
            assert [problem for step in index.get(name).verify() for problem in step.problems] == []


def calls_of(collection: Collection) -> list[Callable[[], object]]:
    return [
        lambda: collection.get(["r00001"]),
        lambda: collection.search(gaussian(1, WIDTH), 3),
        lambda: collection.search_lexical(["word"], [3]),
        lambda: collection.page(10, ""),
        collection.count,
        lambda: list(collection.verify()),
        lambda: collection.upsert(*batch(0)),
    ]


def check_closed(index: Index, data: Path) -> None:
    for call in calls_of(index.get("d")):
        with refused(Code.RESOURCE_EXHAUSTED, "the disk is full", "free some space"):
            call()
    assert (data / "reserve").exists()


@pytest.mark.parametrize("free", [0, 16, 32, 48, 64, 80, 96, 128])
def test_creating_a_collection_on_a_nearly_full_disk_is_refused_as_disk_full(small_disk: Path, free: int) -> None:
    """SQLite reports "disk I/O error" here, which an earlier version returned as INTERNAL."""
    with closing(Index(small_disk / "data")) as index:
        fill_to_the_last_byte(small_disk / "ballast")
        os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - free * 1024)
        try:
            index.create(CollectionSpec("c", WIDTH))
        except ServiceError as error:
            assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, "DISK_FULL")
        (small_disk / "ballast").unlink()
        index.create(CollectionSpec("d", WIDTH))


def test_the_reserve_for_deletions_is_allocated_again_when_there_is_space(small_disk: Path) -> None:
    data = small_disk / "data"
    with closing(Index(data)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        collection.upsert(*batch(0))
        collection.delete(["r00000"])
        assert (data / "reserve").exists()
        index.close()
    (data / "reserve").unlink()
    fill_to_the_last_byte(small_disk / "ballast")
    reserve = Reserve(data / "reserve")
    with refused(Code.RESOURCE_EXHAUSTED, "nothing was done", "free some space"):
        reserve.check("nothing was done")
    assert not (data / "reserve").exists()
    (small_disk / "ballast").unlink()
    reserve.check("nothing was done")
    assert (data / "reserve").stat().st_blocks * 512 >= 1 * MEGABYTE
