"""Open collections are limited in number; unused ones are closed, and reopened by their next call without loss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index, open_collections
from emberpc.server.index.jobs.expiry import ExpiryThread
from emberpc.server.index.jobs.maintenance_thread import MaintenanceThread
from emberpc.server.index.open_collections import OpenCollections, derived_limit
from emberpc.server.index.storage.readers import MAX_DESCRIPTORS
from index.backups import restored, taken
from index.support import gaussian, numbered, refused
from index.test_threads import together
from waiting import Changes

WIDTH = 8
LIMIT = 3


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(tmp_path, buffer_limit=8, max_open=LIMIT)) as opened:
        yield opened


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Notified when a thread of the index has maintained a collection, closed one, or deleted expired records."""
    found = Changes()
    found.watch(monkeypatch, MaintenanceThread, "_handle")
    found.watch(monkeypatch, ExpiryThread, "_handle")
    found.watch(monkeypatch, open_collections, "_close")
    return found


def made(index: Index, i: int, count: int = 1) -> Collection:
    collection = index.create(CollectionSpec(f"c{i}", WIDTH))
    collection.upsert(numbered(count, first=i), gaussian(count, WIDTH, seed=i))
    return collection


def is_open(collection: Collection) -> bool:
    return collection in collection._open_collections._open


def found(collection: Collection, i: int) -> list[str]:
    return [record.id for record, _ in collection.search(gaussian(1, WIDTH, seed=i), 1)[0].hits]


def descriptors_of(collection: Collection) -> list[str]:
    names = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the collection was closed meanwhile
            link = path.readlink()
            if link.parent == collection._folder.absolute():
                names.append(link.name)
    return names


def test_least_recently_used_collections_are_closed_and_reopened_by_calls(index: Index) -> None:
    collections = [made(index, i) for i in range(8)]
    assert [is_open(each) for each in collections] == [False] * 5 + [True] * 3
    assert found(collections[5], 5) == ["r00005"]
    assert found(collections[0], 0) == ["r00000"]
    assert [i for i, each in enumerate(collections) if is_open(each)] == [0, 5, 7]
    assert all(bool(descriptors_of(each)) == is_open(each) for each in collections)
    for i, each in enumerate(collections):
        assert index.get(f"c{i}") is each
        assert found(each, i) == [f"r{i:05}"]
        each.upsert([NewRecord("another")], gaussian(1, WIDTH))
        assert each.count() == 2
        assert len(index._open_collections) == LIMIT


def test_a_closed_collection_is_described_and_deleted_without_opening_it(index: Index) -> None:
    collection = made(index, 0, count=5)
    before = collection.info()
    assert collection.close_idle()
    assert not collection.close_idle()
    # SQLite merges its log into the database when it is closed.
    assert replace(collection.info(), size_bytes=0) == replace(before, size_bytes=0)
    collection.maintain()
    assert not is_open(collection)
    index.delete("c0")
    assert not collection._folder.exists()
    with refused(Code.UNAVAILABLE):
        collection.info()
    with refused(Code.UNAVAILABLE):
        collection.count()


def test_a_call_in_progress_keeps_its_collection_open(index: Index) -> None:
    collection = made(index, 0)
    with collection.frozen():
        for i in range(1, 6):
            made(index, i)
        assert is_open(collection)
        assert not collection.close_idle()
    assert found(collection, 0) == ["r00000"]


def test_a_snapshot_is_saved_only_if_the_graph_changed(index: Index, changes: Changes) -> None:
    collection = made(index, 0, count=40)
    collection.maintain()
    changes.wait_for(collection.close_idle)
    (saved,) = collection._folder.glob("graph-*.json")
    assert found(collection, 0) == ["r00000"]
    assert collection._neighbours.graph_size
    changes.wait_for(collection.close_idle)
    assert [*collection._folder.glob("graph-*.json")] == [saved]


def test_a_collection_whose_snapshot_cannot_be_written_stays_open(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the graph would have to be rebuilt."""
    collection = made(index, 0, count=40)
    collection.maintain()
    monkeypatch.setattr(collection._graph_maintenance, "snapshot", lambda: None)
    assert not collection.close_idle()
    assert is_open(collection)
    for i in range(1, 6):
        made(index, i)
    assert is_open(collection)


def test_a_collection_with_an_unsaved_graph_is_closed_in_the_background(index: Index, changes: Changes) -> None:
    first = made(index, 0, count=40)
    first.maintain()
    others = [made(index, i) for i in range(1, 4)]
    assert not is_open(others[0])
    changes.wait_for(lambda: not is_open(first))
    assert list(first._folder.glob("graph-*.json"))


def test_records_of_a_closed_collection_expire(index: Index, changes: Changes) -> None:
    collection = index.create(CollectionSpec("c", WIDTH))
    collection.upsert([NewRecord("goes", time_to_live=0.5), NewRecord("stays")], gaussian(2, WIDTH))
    assert collection.close_idle()
    changes.wait_for(lambda: collection.info().record_count == 1)


def test_a_verification_continues_after_the_collection_was_closed(index: Index, changes: Changes) -> None:
    collection = made(index, 0, count=40)
    steps = collection.verify()
    checked = []
    for step in steps:
        assert not step.problems
        checked.append(step.checked)
        changes.wait_for(collection.close_idle)
    assert checked[-1] == 40


def test_reembedding_continues_after_its_collections_were_closed(index: Index) -> None:
    source = index.create(CollectionSpec("c", WIDTH))
    source.upsert([NewRecord(f"r{i}", "text") for i in range(3)], gaussian(3, WIDTH))
    reembedding = index.reembed(index.get("c"), model="other", fingerprint="", dimensions=4)
    target = reembedding.target
    for each in (source, target):
        assert each.close_idle()
    records = reembedding.next(10)
    assert source.close_idle()
    reembedding.take(records, gaussian(3, 4))
    assert target.close_idle()
    assert index.switch(reembedding)
    assert index.get("c").search(gaussian(1, 4), 1)[0].hits
    assert not descriptors_of(source)
    assert not is_open(source)


def test_collections_without_calls_are_closed_after_the_idle_time(tmp_path: Path, changes: Changes) -> None:
    with closing(Index(tmp_path, idle_seconds=0.01)) as index:
        collection = made(index, 0)
        changes.wait_for(lambda: not len(index._open_collections))
        assert found(collection, 0) == ["r00000"]
        changes.wait_for(lambda: not descriptors_of(collection))


def test_calls_succeed_while_their_collections_are_closed(index: Index) -> None:
    """Every call succeeds, though collections are closed before, during and after it."""
    collections = [index.create(CollectionSpec(f"c{i}", WIDTH)) for i in range(5)]
    left = [*range(4)]

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            vectors = gaussian(9, WIDTH, seed=number)
            try:
                for i in range(9):
                    collection = collections[(number + i) % 5]
                    collection.upsert([NewRecord(f"{number}-{i}", "word")], vectors[i : i + 1])
                    assert collection.search(vectors[i : i + 1], 1)[0].hits[0][0].id == f"{number}-{i}"
                    assert f"{number}-{i}" in {
                        each.id for each, _ in collection.search_lexical(["word"], [200])[0].hits
                    }
                    if i % 4 == 0:
                        collection.maintain()
            finally:
                left.remove(number)

        return run

    def close() -> None:
        while left:
            for each in collections:
                each.close_idle()

    together(*(work(number) for number in range(4)), close)
    assert sum(each.count() for each in collections) == 36


def test_threads_share_the_connections_of_a_collection(index: Index) -> None:
    """In an earlier version, each thread that read had its own connection."""
    collection = made(index, 0)
    inside = threading.Barrier(12)

    def read() -> None:
        with collection._calls.enter(), collection._store.snapshot():
            inside.wait(300)
        for _ in range(3):
            assert found(collection, 0) == ["r00000"]

    for _ in range(3):
        together(*[read] * 12)
        inside.reset()
    open_files = descriptors_of(collection)
    # SQLite keeps the descriptors of the database for the next connections.
    assert open_files.count("records.db") <= 13
    assert len(open_files) - open_files.count("records.db") <= (MAX_DESCRIPTORS + 1) // 2


def test_more_collections_than_the_limit_are_refused(tmp_path: Path) -> None:
    with closing(Index(tmp_path, max_collections=2)) as index:
        for i in range(2):
            made(index, i)
        backup = taken(index.get("c0"))
        with refused(Code.RESOURCE_EXHAUSTED, "2", "--max-collections"):
            made(index, 2)
        with refused(Code.ALREADY_EXISTS):
            made(index, 1)
        with refused(Code.RESOURCE_EXHAUSTED, "2", "--max-collections"):
            restored(index, "c2", backup)
        index.delete("c1")
        assert restored(index, "c2", backup).count() == 1


@pytest.mark.parametrize(("limit", "maximum"), [(16, 4), (1024, 69), (2**20, 500)])
def test_the_limit_of_open_collections_depends_on_the_limit_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, limit: int, maximum: int
) -> None:
    monkeypatch.setattr("emberpc.server.descriptors.limit", lambda: limit)
    assert derived_limit() == maximum


class Stubborn:
    """A collection that raises an error when it is closed."""

    last_used = 0.0
    is_saved = True

    def close_idle(self) -> bool:
        raise OSError


def test_a_collection_that_cannot_be_closed_does_not_prevent_opening_others() -> None:
    limited = OpenCollections(1, 0)
    for each in (Stubborn(), Stubborn()):
        limited.admit(each)
    assert len(limited) == 2
    limited.close(Deadline())
