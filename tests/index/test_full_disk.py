"""A disk that is really full: what was acknowledged before stays, and the collection goes on once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, CollectionSpec, Index, NewRecord
from emberpc.server.index.types import Matrix, StoredRecord
from index.support import gaussian, recall

WIDTH, BATCH = 64, 20
MEGABYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
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
    """Some records, half of which take the place of the batch before."""
    ids = [f"r{i:05}" for i in range(number * BATCH // 2, number * BATCH // 2 + BATCH)]
    records = [NewRecord(each, f"{number} " + "word " * 100, {"batch": number}) for each in ids]
    return records, gaussian(BATCH, WIDTH, seed=number)


def fill(collection: Collection, first: int) -> tuple[dict[str, tuple[int, Matrix]], int]:
    """Write batches until the disk is full; return what was acknowledged, and the number of the batch that was not."""
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
    """Check that just what was acknowledged is there, and that search finds it."""
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


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_acknowledged(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * MEGABYTE))
    data = small_disk / "data"
    with closing(Index(data, buffer_limit=8, snapshot_every=50)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        written, refused = fill(collection, 0)
        check(collection, written)
        collection._upkeep.snapshot()
        assert "no snapshot" in caplog.text
        check(collection, written)
    for room in (False, True):
        if room:
            ballast.unlink()
        with closing(Index(data, buffer_limit=8, snapshot_every=50)) as index:
            collection = index.get("c")
            check(collection, written)
            collection.maintain()
            check(collection, written)
            more, refused = fill(collection, refused)
            assert bool(more) >= room
            written |= more
            check(collection, written)
