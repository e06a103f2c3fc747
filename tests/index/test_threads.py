"""Concurrent callers: each sees only whole writes, and none waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.collections.types import StoredRecord
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph.grouped_graph_reader import _graphs_of
from emberpc.server.index.graph.read_write_lock import ReadWriteLock
from emberpc.server.index.jobs.graph_maintenance import MaintenanceLimits
from emberpc.server.index.storage.store import Store
from index.support import gaussian, numbered
from waiting import Changes


def together(*calls: Callable[[], None]) -> None:
    """Run each call on another thread, and raise the first error."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # raised below, on the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = Deadline(500)
    for thread in threads:
        deadline.join(thread)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("versions", [130, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", [1000, 8], ids=["buffer", "graph"])
def test_a_record_is_found_during_its_updates(index: Index, limit: int, versions: int) -> None:
    """There must be no moment at which the old version is removed and the new one is not visible yet."""
    collection = index.create(CollectionSpec("c", 8))
    collection._graph_maintenance._limits = MaintenanceLimits(limit)
    query = gaussian(1, 8)
    collection.upsert([*numbered(200), NewRecord("wanted")], gaussian(201, 8, seed=1))
    collection.upsert([NewRecord("wanted", "0")], query)
    collection.maintain()
    done = threading.Event()

    def update() -> None:
        try:
            for version in range(1, versions):
                collection.upsert([NewRecord("wanted", str(version))], query)
        finally:
            done.set()

    def search() -> None:
        latest = 0
        while not done.is_set():
            (hit, score), *_ = collection.search(query, 3)[0].hits
            assert hit.id == "wanted"
            assert score > 0.999
            assert int(hit.text) >= latest
            latest = int(hit.text)

    together(update, search, search)


@pytest.mark.parametrize("versions", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_a_batch_of_records_is_visible_whole_or_not_at_all(index: Index, versions: int) -> None:
    """This holds although a batch takes more than one statement to read."""
    collection = index.create(CollectionSpec("c", 4))
    ids, vectors = [f"r{i:04}" for i in range(1000)], gaussian(1000, 4)
    done = threading.Event()

    def write() -> None:
        try:
            for version in range(versions):
                collection.upsert([NewRecord(record_id, str(version)) for record_id in ids], vectors)
                if version % 3 == 0:
                    collection.delete(ids)
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            found = collection.get(ids)
            assert len(found) in (0, 1000)
            assert len({record.text for record in found}) <= 1
            assert len(collection.page(1000, "")[0]) in (0, 1000)

    together(write, read, read)


def test_a_search_finds_the_writes_of_its_thread(index: Index) -> None:
    """This holds while the buffer is moved to the graph, and during rebuilds and snapshots."""
    collection = index.create(CollectionSpec("c", 16))
    collection._graph_maintenance._limits = MaintenanceLimits(8, snapshot_every=100)

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            vectors = gaussian(80, 16, seed=number)
            for i in range(80):
                collection.upsert([NewRecord(f"{number}-{i % 40}", str(i))], vectors[i : i + 1])
                hit, _ = collection.search(vectors[i : i + 1], 1)[0].hits[0]
                assert (hit.id, hit.text) == (f"{number}-{i % 40}", str(i))
                if i % 10 == 9:
                    collection.delete([f"{number}-{i % 40}"])
                    assert collection.search(vectors[i : i + 1], 1)[0].hits[0][0].text != str(i)

        return run

    together(*(work(number) for number in range(4)), *([collection.maintain] * 2))


def test_a_collection_can_be_deleted_and_created_again_during_searches(index: Index) -> None:
    done = threading.Event()

    def refill() -> None:
        try:
            for _ in range(4):
                made = index.create(CollectionSpec("c", 8))
                made.upsert(numbered(60), gaussian(60, 8))
                index.delete("c")
        finally:
            done.set()

    def search() -> None:
        while not done.is_set():
            try:
                hits = index.get("c").search(gaussian(1, 8), 5)[0].hits
                assert len(hits) in (0, 5)
            except ServiceError as error:
                if error.code not in (Code.NOT_FOUND, Code.UNAVAILABLE):
                    raise

    together(refill, search, search)


def test_close_waits_for_calls_and_ends_maintenance(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 128))
    started = threading.Event()

    def call(work: Callable[[Collection], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                while True:
                    work(collection)
                    started.set()
            except ServiceError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise

        return run

    def close() -> None:
        assert started.wait(300)
        index.close()

    works: Sequence[Callable[[Collection], object]] = (
        lambda each: each.upsert(numbered(300), gaussian(300, 128)),
        lambda each: each.search(gaussian(5, 128), 10),
        lambda each: each.maintain(),
    )
    together(*(call(work) for work in works), close)


def test_a_search_repeated_because_of_a_write_does_not_wait_for_the_next_write(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next write may be large, and block other writes for seconds."""
    collection = index.create(CollectionSpec("c", 8))
    collection.upsert(numbered(50), gaussian(50, 8))
    gone: list[dict[int, StoredRecord]] = [{}]
    by_label = Store.by_label

    def gone_at_first(store: Store, labels: Sequence[int], *, with_vectors: bool) -> dict[int, StoredRecord]:
        return gone.pop() if gone else by_label(store, labels, with_vectors=with_vectors)

    monkeypatch.setattr(Store, "by_label", gone_at_first)

    def search() -> None:
        assert len(collection.search(gaussian(1, 8), 5)[0].hits) == 5

    with collection.frozen():
        together(search)
    assert not gone


class WatchedLock(ReadWriteLock):
    """A lock that notifies `changes` when a thread begins to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = Changes()
        self._changed = _WatchedCondition(self._mutex, self.changes)


class _WatchedCondition(threading.Condition):
    def __init__(self, mutex: threading.Lock, changes: Changes) -> None:
        super().__init__(mutex)
        self._changes = changes

    def wait(self, timeout: float | None = None) -> bool:
        self._changes.notify()
        return super().wait(timeout)


def test_a_waiting_reader_gets_the_lock_before_the_next_writer() -> None:
    """The thread that fills the graph takes the lock again for each slice; a search must get the lock in between."""
    lock = WatchedLock()
    order: list[str] = []

    def enter(how: Callable[[], AbstractContextManager[None]], name: str) -> None:
        with how():
            order.append(name)

    with lock.write():
        reader = threading.Thread(target=enter, args=(lock.read, "reader"))
        writer = threading.Thread(target=enter, args=(lock.write, "writer"))
        for thread in (reader, writer):
            thread.start()
        lock.changes.wait_for(lambda: lock.waiting_readers and lock.waiting_writers)
        assert not order
    for thread in (reader, writer):
        thread.join(300)
    assert order == ["reader", "writer"]


def test_a_waiting_writer_gets_the_lock_before_the_last_writer_again() -> None:
    """In an earlier version, a write waited for all slices of the thread that fills the graph, which took seconds."""
    lock = WatchedLock()
    order: list[str] = []

    def again(name: str) -> None:
        for _ in range(3):
            with lock.write():
                order.append(name)
                if len(order) == 1:
                    other.start()
                    lock.changes.wait_for(lambda: lock.waiting_writers == 1)

    other = threading.Thread(target=again, args=("other",))
    again("first")
    other.join(300)
    assert order[:2] == ["first", "other"]
    assert sorted(order) == ["first"] * 3 + ["other"] * 3


def test_overlapping_readers_let_a_writer_get_the_lock() -> None:
    lock, readers = WatchedLock(), 3
    stop = threading.Event()
    entries: list[None] = []
    counting = threading.Lock()

    def read() -> None:
        while not stop.is_set():
            with lock.read():
                with counting:
                    entries.append(None)
                    own = len(entries)
                lock.changes.notify()
                # A reader leaves only after another one entered, or if no other reader can enter.
                lock.changes.wait_for(
                    lambda own=own: len(entries) > own or lock.waiting_readers == readers - 1 or stop.is_set()  # type: ignore[misc]
                )

    def write() -> None:
        lock.changes.wait_for(lambda: entries)
        for _ in range(20):
            with lock.write():
                pass
        stop.set()
        lock.changes.notify()

    together(*[read] * readers, write)


def test_the_lock_excludes_readers_during_a_write() -> None:
    lock = ReadWriteLock()
    state = {"writers": 0, "value": 0}

    def write() -> None:
        for _ in range(300):
            with lock.write():
                state["writers"] += 1
                assert state["writers"] == 1
                state["value"] += 1
                state["writers"] -= 1

    def read() -> None:
        for _ in range(300):
            with lock.read():
                before = state["value"]
                assert state["writers"] == 0
                assert state["value"] == before

    together(write, write, read, read)
    assert state["value"] == 600


def test_groups_can_be_added_while_strays_are_counted() -> None:
    """A search counts strays without the graph's lock; in an earlier version, a concurrent new group made it fail."""
    groups: dict[int, Any] = {}

    class Group:
        """Adds another group when its type is read, as a write on another thread may."""

        @property  # type: ignore[misc]
        def __class__(self) -> type:
            groups[len(groups)] = None
            return object

    groups.update({0: Group(), 1: Group()})
    assert _graphs_of(groups.values()) == []
    assert len(groups) == 4
