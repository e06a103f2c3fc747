"""No data is lost by a mistake: neither files of other programs, nor collections of which a file is missing."""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, SearchStrategy
from emberpc.server.collections.types import Matrix
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from index.backups import restored, taken
from index.support import gaussian, numbered, refused


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit files to `size` bytes; writes beyond the limit fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def folder_of(data_dir: Path) -> Path:
    (folder,) = (data_dir / "collections").iterdir()
    return folder


def make(data_dir: Path, count: int) -> None:
    index = Index(data_dir, buffer_limit=8)
    collection = index.create(CollectionSpec("c", 8))
    collection.upsert(numbered(count), gaussian(count, 8))
    collection.maintain()
    index.close()


def test_folders_of_other_programs_in_the_data_directory_are_kept(tmp_path: Path) -> None:
    """A user may choose a data directory that has other folders in it."""
    strangers = [tmp_path / "photos", tmp_path / ("0" * 32), tmp_path / "collections" / "notes"]
    for path in strangers:
        path.mkdir(parents=True)
        (path / "file").write_text("precious")
    make(tmp_path, 3)
    Index(tmp_path).close()
    assert [(path / "file").read_text() for path in strangers] == ["precious"] * 3


def test_a_start_without_the_catalogue_is_refused_and_keeps_collections(tmp_path: Path) -> None:
    make(tmp_path, 3)
    catalogue = tmp_path / "catalogue.db"
    copy = tmp_path / "copy"
    catalogue.rename(copy)
    with refused(Code.FAILED_PRECONDITION, "no catalogue.db", str(tmp_path)):
        Index(tmp_path)
    for leftover in tmp_path.glob("catalogue.db*"):
        leftover.unlink()
    copy.rename(catalogue)
    index = Index(tmp_path)
    assert index.get("c").count() == 3
    index.close()


def test_opening_a_collection_without_its_database_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, 3)
    folder = folder_of(tmp_path)
    for path in folder.glob("records.db*"):
        path.unlink()
    index = Index(tmp_path)
    with refused(Code.INTERNAL, "'c'"):
        index.get("c")
    assert not list(folder.glob("records.db*"))
    # The collection can be deleted and created again.
    index.delete("c")
    assert not folder.exists()
    assert index.create(CollectionSpec("c", 8)).count() == 0
    index.close()


def test_the_error_for_a_damaged_database_hides_the_text_of_sqlite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 3)
    (folder_of(tmp_path) / "records.db").write_bytes(b"no database at all" * 1000)
    index = Index(tmp_path)
    with refused(Code.INTERNAL, "damaged"):
        index.get("c")
    assert "file is not a database" in caplog.text
    index.close()


_DAMAGED_SCHEMAS = {
    "a column": (b"class_label TEXT", b"clbss_label TEXT"),
    "no UTF-8": (b"class_label TEXT", b"cl\xffss_label TEXT"),
    "no SQL": (b"CREATE TABLE records", b"CREATE UABLE records"),
    "a table": (b"CREATE TABLE records", b"CREATE TABLE recoses"),
    "a trigger": (b"CREATE TRIGGER words_of_old AFTER DELETE", b"CREATE TRIGGER words_of_old AFTER UPDATE"),
    "a condition": (b"WHEN old.text <> ''", b"WHEN old.text =  ''"),
    "the tokenizer": (b"categories 'L* M* N* Co'", b"categories 'L* M* L* Co'"),
}


@pytest.mark.parametrize(("before", "after"), _DAMAGED_SCHEMAS.values(), ids=_DAMAGED_SCHEMAS)
def test_a_damaged_schema_affects_only_its_collection(tmp_path: Path, before: bytes, after: bytes) -> None:
    with closing(Index(tmp_path)) as index:
        for name in "cd":
            index.create(CollectionSpec(name, 8)).upsert(numbered(3), gaussian(3, 8))
        path = index.get("c")._folder / "records.db"
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    with closing(Index(tmp_path)) as index:
        with refused(Code.INTERNAL, "'c'", "damaged", "restore a backup"):
            index.get("c")
        assert index.get("d").count() == 3
        assert [spec.name for spec in index.page(10, "")[0]] == ["c", "d"]
        index.delete("c")
        assert [spec.name for spec in index.page(10, "")[0]] == ["d"]


@pytest.mark.parametrize("version", [0, 2, 5, -1])
def test_a_database_with_an_impossible_version_is_reported_as_damaged(tmp_path: Path, version: int) -> None:
    make(tmp_path, 3)
    with closing(sqlite3.connect(folder_of(tmp_path) / "records.db")) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with closing(Index(tmp_path)) as index, refused(Code.INTERNAL, "'c'", "damaged", "restore a backup"):
        index.get("c")


def test_a_snapshot_cut_off_by_a_full_disk_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """hnswlib reports success, and the incomplete file would be read as a graph."""
    index = Index(tmp_path, buffer_limit=8)
    collection = index.create(CollectionSpec("c", 64))
    vectors = gaussian(1000, 64)
    collection.upsert(numbered(1000), vectors)
    collection.maintain()
    with largest_file(100_000):
        collection._graph_maintenance.snapshot()
    assert "no snapshot" in caplog.text
    assert not list(folder_of(tmp_path).glob("graph-*"))
    collection._graph_maintenance.snapshot()
    assert len(list(folder_of(tmp_path).glob("graph-*"))) == 2
    index.close()


def test_a_failed_disk_write_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    index = Index(tmp_path, buffer_limit=8)
    collection = index.create(CollectionSpec("c", 64))
    collection.upsert(numbered(5), gaussian(5, 64))
    with largest_file(100_000), refused(Code.INTERNAL, "'c'"):
        collection.upsert(numbered(2000), gaussian(2000, 64))
    assert collection.count() == 5
    assert len(collection.search(gaussian(1, 64), 100)[0].hits) == 5
    assert collection.upsert(numbered(1, first=10), gaussian(1, 64)).sequence == 2
    index.close()


def test_a_loaded_snapshot_leaves_no_vectors_in_the_buffer(tmp_path: Path) -> None:
    make(tmp_path, 200)
    index = Index(tmp_path, buffer_limit=8)
    collection = index.get("c")
    assert collection._neighbours.waiting == 0
    assert collection.search(gaussian(1, 8), 3)[0].plan.strategy is SearchStrategy.HNSW
    index.close()


def test_snapshots_are_saved_during_writes_and_two_are_kept(tmp_path: Path) -> None:
    index = Index(tmp_path, buffer_limit=8, snapshot_every=50)
    collection = index.create(CollectionSpec("c", 8))
    for first in range(0, 400, 100):
        collection.upsert(numbered(100, first), gaussian(100, 8))
        collection.maintain()
    assert len(list(folder_of(tmp_path).glob("graph-*.json"))) == 2
    assert len(list(folder_of(tmp_path).glob("graph-*.bin"))) == 2
    index.close()


def test_larger_graphs_are_saved_less_often(tmp_path: Path) -> None:
    """Each snapshot has the whole graph: at a fixed interval, a million vectors would give 50 files of up to 1.7 GB."""
    index = Index(tmp_path, buffer_limit=8, snapshot_every=10)
    collection = index.create(CollectionSpec("c", 8))
    newest = set()
    for first in range(0, 1000, 20):
        collection.upsert(numbered(20, first), gaussian(20, 8))
        collection.maintain()
        newest.add(max(folder_of(tmp_path).glob("graph-*.json"), default=None))
    index.close()
    assert 10 <= len(newest) <= 25


def test_a_snapshot_of_another_collection_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """hnswlib would load a graph of the same dimensions; only the sidecar file names its collection."""
    index = Index(tmp_path, buffer_limit=8)
    mine = index.create(CollectionSpec("mine", 8, m=8))
    other = index.create(CollectionSpec("other", 8, m=32))
    for collection in (mine, other):
        collection.upsert(numbered(100), gaussian(100, 8, seed=len(collection.spec.name)))
        collection.maintain()
    target, source = mine._folder, other._folder
    index.close()
    for path in target.glob("graph-*"):
        path.unlink()
    for path in source.glob("graph-*"):
        shutil.copy(path, target)
    index = Index(tmp_path, buffer_limit=1000)
    assert index.get("mine").search(gaussian(1, 8), 3)[0].plan.strategy is SearchStrategy.EXACT
    assert "of another collection" in caplog.text
    index.close()


def graph_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("graph-*")}


def put(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def check_found(collection: Collection, vectors: Matrix) -> None:
    """Check that each vector finds its own record, and that memory and store agree."""
    for i, outcome in enumerate(collection.search(vectors, 1)):
        assert outcome.hits[0][0].id == f"r{i:05}"
    assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_snapshot_of_a_collection_with_equal_settings_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dimensions, parameters and labels are equal; only the identity of the database differs."""
    index = Index(tmp_path, buffer_limit=8)
    vectors = {name: gaussian(100, 8, seed=seed) for seed, name in enumerate(("mine", "other"))}
    for name, matrix in vectors.items():
        index.create(CollectionSpec(name, 8)).upsert(numbered(100), matrix)
        index.get(name).maintain()
    target, source = index.get("mine")._folder, index.get("other")._folder
    index.close()
    put(graph_files(source), target)
    index = Index(tmp_path, buffer_limit=1000)
    check_found(index.get("mine"), vectors["mine"])
    assert "another collection" in caplog.text
    index.close()


def test_a_restored_collection_uses_no_snapshot_of_the_first_one(tmp_path: Path) -> None:
    """The backup has the records of the first collection; later records get the same labels in both collections."""
    index = Index(tmp_path, buffer_limit=8)
    first = index.create(CollectionSpec("c", 8))
    first.upsert(numbered(50), gaussian(50, 8))
    whole = taken(first)
    first.upsert(numbered(50, first=50), gaussian(50, 8, seed=1))
    first.maintain()
    second = restored(index, "d", whole)
    later = gaussian(50, 8, seed=2)
    second.upsert(numbered(50, first=50), later)
    source, target = first._folder, second._folder
    index.close()
    for path in target.glob("graph-*"):
        path.unlink()
    put(graph_files(source), target)
    index = Index(tmp_path, buffer_limit=8)
    check_found(index.get("d"), np.vstack([gaussian(50, 8), later]))
    index.close()


def test_an_older_database_overrides_a_newer_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """This happens if an older copy replaces only the database: labels of the graph then belong to other records."""
    make(tmp_path, 50)
    folder = folder_of(tmp_path)
    older = (folder / "records.db").read_bytes()
    index = Index(tmp_path, buffer_limit=8)
    index.get("c").upsert(numbered(50, first=50), gaussian(50, 8, seed=1))
    index.get("c").maintain()
    index.close()
    newer = graph_files(folder)
    (folder / "records.db").write_bytes(older)
    index = Index(tmp_path, buffer_limit=1000)
    check_found(index.get("c"), gaussian(50, 8))
    assert "its database is older than its graph" in caplog.text
    # The labels are those of the graph, but all vectors differ.
    later = gaussian(60, 8, seed=2)
    index.get("c").upsert(numbered(60, first=50), later)
    index.close()
    for path in folder.glob("graph-*"):
        path.unlink()
    put(newer, folder)
    index = Index(tmp_path, buffer_limit=1000)
    check_found(index.get("c"), np.vstack([gaussian(50, 8), later]))
    index.close()


def test_a_call_after_close_is_unavailable(tmp_path: Path) -> None:
    index = Index(tmp_path)
    collection: Collection = index.create(CollectionSpec("c", 8))
    index.close()
    index.close()
    for call in (
        lambda: index.get("c"),
        lambda: index.get("nobody"),
        lambda: index.create(CollectionSpec("d", 8)),
        lambda: index.page(10, ""),
        lambda: index.delete("c"),
        lambda: collection.search(gaussian(1, 8), 1),
        collection.info,
    ):
        with refused(Code.UNAVAILABLE, "closed"):
            call()


def test_a_refused_data_directory_is_not_locked_for_the_next_try(tmp_path: Path) -> None:
    make(tmp_path, 3)
    catalogue = tmp_path / "catalogue.db"
    kept = catalogue.read_bytes()
    catalogue.write_bytes(b"damage" * 1000)
    with refused(Code.FAILED_PRECONDITION, "damaged"):
        Index(tmp_path)
    catalogue.write_bytes(kept)
    Index(tmp_path).close()
