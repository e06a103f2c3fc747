"""Searches return the right hits from buffer, graph and store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance, SearchStrategy
from emberpc.server.collections.types import Labels, Matrix
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs import maintenance_thread
from emberpc.server.index.jobs.maintenance_thread import Maintained, MaintenanceThread
from index.support import gaussian, numbered, recall, refused
from waiting import Changes


@pytest.fixture
def collection(index: Index) -> Collection:
    return index.create(CollectionSpec("c", 8))


def filled(collection: Collection, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    vectors = gaussian(count, 8, seed)
    new = numbered(count)
    collection.upsert(new, vectors)
    collection.maintain()
    return {record.id: vector for record, vector in zip(new, vectors, strict=True)}


def test_a_small_collection_is_searched_exactly(collection: Collection) -> None:
    truth = filled(collection, 20)
    outcome = collection.search(gaussian(1, 8, seed=5), 10)[0]
    assert outcome.plan.strategy is SearchStrategy.EXACT
    assert (outcome.plan.ef, outcome.plan.compared_count, outcome.plan.shortfall_reason) == (0, 20, "")
    assert recall(collection, truth, gaussian(20, 8, seed=5), 10) == 1


def test_a_larger_collection_is_searched_in_the_graph_and_the_buffer(collection: Collection) -> None:
    truth = filled(collection, 300)
    query = gaussian(1, 8, seed=5)
    assert collection.search(query, 3)[0].plan.strategy is SearchStrategy.HNSW
    collection.upsert(numbered(1, first=900), query)
    outcome = collection.search(query, 3)[0]
    assert (outcome.plan.strategy, outcome.plan.compared_count) == (SearchStrategy.HNSW, 1)
    assert outcome.hits[0][0].id == "r00900"
    truth["r00900"] = query[0]
    assert recall(collection, truth, gaussian(50, 8, seed=6), 10) >= 0.98


def test_ef_is_used_as_stated_or_chosen_by_top_k(collection: Collection) -> None:
    filled(collection, 1200)
    query = gaussian(1, 8, seed=5)
    assert collection.search(query, 10, ef=37)[0].plan.ef == 37
    assert collection.search(query, 10, ef=12)[0].plan.ef == 12
    # There are never fewer candidates than hits.
    assert collection.search(query, 50, ef=12)[0].plan.ef >= 50
    few, many = collection.search(query, 1)[0].plan.ef, collection.search(query, 500)[0].plan.ef
    assert 1 < few < many


@pytest.mark.parametrize("count", [10, 200], ids=["buffer", "graph"])
def test_the_excluded_record_is_replaced_by_the_next_hit(collection: Collection, count: int) -> None:
    truth = filled(collection, count)
    queries = np.stack([truth["r00003"], truth["r00003"], truth["r00004"]])
    own, without, other = collection.search(queries, [5, 5, 4], exclude_ids=[None, "r00003", "nobody"])
    assert own.hits[0][0].id == "r00003"
    assert [record.id for record, _ in without.hits[:4]] == [record.id for record, _ in own.hits[1:]]
    assert len(without.hits) == 5
    assert [len(other.hits), other.hits[0][0].id] == [4, "r00004"]
    everything = collection.search(queries[:1], 10_000, exclude_ids=["r00003"])[0]
    assert len(everything.hits) == count - 1
    assert "left out" in everything.plan.shortfall_reason


def test_each_query_has_its_own_top_k(collection: Collection) -> None:
    filled(collection, 300)
    outcomes = collection.search(gaussian(100, 8, seed=5), [1 + i % 7 for i in range(100)])
    assert [len(outcome.hits) for outcome in outcomes] == [1 + i % 7 for i in range(100)]


@pytest.mark.parametrize(
    ("top_k", "ef", "excluded", "field"),
    [
        (0, 0, [], "queries[0].top_k"),
        (10_001, 0, [], "queries[0].top_k"),
        ([5, -1], 0, [], "queries[1].top_k"),
        ([5], 0, [], "top_k"),
        (5, -1, [], "ef"),
        (5, 10**12, [], "ef"),
        (5, 0, ["a"], "exclude_ids"),
    ],
)
def test_options_out_of_bounds_are_refused(
    collection: Collection, top_k: int | list[int], ef: int, excluded: list[str | None], field: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, field=field):
        collection.search(gaussian(2, 8), top_k, ef=ef, exclude_ids=excluded)


def test_a_graph_with_many_deleted_nodes_is_rebuilt(collection: Collection) -> None:
    truth = filled(collection, 400)
    neighbours = collection._neighbours
    collection.delete(list(truth)[:90])
    collection.maintain()
    assert neighbours.dead_share == pytest.approx(90 / 400)
    collection.delete(list(truth)[90:120])
    collection.maintain()
    assert neighbours.dead_share == 0
    assert recall(collection, dict(list(truth.items())[120:]), gaussian(50, 8, seed=6), 10) >= 0.98


def test_an_emptied_collection_can_be_filled_again(collection: Collection) -> None:
    truth = filled(collection, 100)
    collection.delete(list(truth))
    assert collection.search(gaussian(1, 8), 5)[0].hits == []
    collection.maintain()
    assert collection.search(gaussian(1, 8), 5)[0].hits == []
    assert recall(collection, filled(collection, 100, seed=3), gaussian(50, 8, seed=6), 10) >= 0.98


def test_records_that_the_graph_does_not_reach_are_found_by_exact_search(collection: Collection) -> None:
    """Nodes are removed directly in hnswlib, which then finds too few and raises an error."""
    truth = filled(collection, 200)
    graph = collection._neighbours._graph
    for label in sorted(graph.labels())[5:]:
        graph._hnsw._index.mark_deleted(label)
    for outcome in collection.search(gaussian(3, 8, seed=5), 10):
        assert outcome.plan.strategy is SearchStrategy.EXACT
        assert outcome.plan.compared_count == 200
    assert recall(collection, truth, gaussian(40, 8, seed=5), 10) == 1


def test_a_top_k_above_half_of_the_graph_is_searched_exactly(collection: Collection) -> None:
    truth = filled(collection, 200)
    assert collection.search(gaussian(1, 8), 120)[0].plan.strategy is SearchStrategy.EXACT
    assert recall(collection, truth, gaussian(5, 8, seed=5), 120) == 1


def test_all_hits_of_tight_and_distant_clusters_are_found(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 8, distance=Distance.EUCLIDEAN, m=4, ef_construction=16))
    near = gaussian(60, 8) * np.float32(1e-3)
    far = gaussian(600, 8, seed=1) * np.float32(1e-3) + np.float32(1000)
    collection.upsert(numbered(60), near)
    collection.maintain()
    collection.upsert(numbered(600, first=100), far)
    collection.maintain()
    truth = dict(zip([r.id for r in numbered(60) + numbered(600, first=100)], np.concatenate([near, far]), strict=True))
    queries = np.concatenate([near[:5], far[:5]])
    for k in (10, 100, 300):
        for outcome in collection.search(queries, k):
            assert len(outcome.hits) == k
        assert recall(collection, truth, queries, k) >= 0.98


def test_many_copies_of_one_vector_are_all_found(collection: Collection) -> None:
    collection.upsert(numbered(500), np.ones((500, 8), dtype=np.float32))
    collection.maintain()
    outcome = collection.search(np.ones((1, 8), dtype=np.float32), 100)[0]
    assert len({record.id for record, _ in outcome.hits}) == 100
    assert len(collection.search(np.ones((1, 8), dtype=np.float32), 500)[0].hits) == 500


def test_records_deleted_during_a_rebuild_stay_deleted(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    truth = filled(collection, 200)

    def read(labels: list[int]) -> tuple[Labels, Matrix]:
        found = collection._read_vectors(labels)
        collection.delete(["r00007", "r00008"])
        collection.upsert(numbered(1, first=9), -truth["r00009"][None])
        return found

    assert collection._neighbours.rebuild(read, lambda: False)
    truth["r00009"] = -truth["r00009"]
    del truth["r00007"], truth["r00008"]
    assert recall(collection, truth, gaussian(50, 8, seed=6), 10) >= 0.98
    assert {record.id for record, _ in collection.search(gaussian(1, 8), 1000)[0].hits} == set(truth)
    assert "disagree" not in caplog.text


def test_a_rebuilt_graph_has_the_records_added_during_the_rebuild(collection: Collection) -> None:
    """Writes continue during a rebuild; the old graph takes their vectors, so that the buffer does not keep growing."""
    truth = filled(collection, 200)
    neighbours = collection._neighbours
    collection._wake = lambda: None  # otherwise the maintenance thread would fill the graph, too
    late = gaussian(60, 8, seed=9)

    def read(labels: list[int]) -> tuple[Labels, Matrix]:
        if collection.count() == 200:
            collection.upsert(numbered(60, first=500), late)
        return collection._read_vectors(labels)

    assert neighbours.rebuild(read, lambda: False, 10)
    assert neighbours.waiting <= 10
    assert neighbours.graph_size >= 250
    truth |= {record.id: vector for record, vector in zip(numbered(60, first=500), late, strict=True)}
    assert recall(collection, truth, gaussian(50, 8, seed=6), 10) >= 0.98


def test_the_graph_takes_the_whole_buffer_when_writes_pause(tmp_path: Path) -> None:
    """Otherwise every search would compare up to thousands of vectors of the buffer until the next write."""
    with closing(Index(tmp_path, buffer_limit=100)) as index:
        collection = index.create(CollectionSpec("c", 8))
        collection.upsert(numbered(90), gaussian(90, 8))
        assert collection._graph_maintenance.due_at_rest is None  # few vectors stay in the buffer
        collection.upsert(numbered(90, first=90), gaussian(90, 8, seed=1))
        collection.maintain()
        collection.upsert(numbered(50, first=500), gaussian(50, 8, seed=2))
        assert collection._graph_maintenance.due_at_rest is not None
        collection._graph_maintenance._last_write -= 1000
        collection._graph_maintenance._next_check = 0  # the last check of the graph was long ago, too
        collection.maintain()
        assert (collection._neighbours.waiting, collection._neighbours.graph_size) == (0, 230)
        assert collection._graph_maintenance.due_at_rest is None


def test_maintenance_runs_once_after_the_last_write(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    rests = 0
    maintained: list[float] = []
    changes = Changes()

    class Resting:
        def maintain(self) -> None:
            maintained.append(now)

    class Thread(MaintenanceThread):
        def _take(self) -> Maintained | float | None:
            nonlocal rests
            taken = super()._take()
            rests += taken is None or isinstance(taken, float)
            return taken

    def look(thread: Thread, time: float) -> None:
        """Have the thread look at a time, and wait until it has done what is due."""
        nonlocal now
        with thread._changed:
            now, before = time, rests
            thread._changed.notify()
        changes.wait_for(lambda: rests > before)

    changes.watch(monkeypatch, Thread, "_take")
    monkeypatch.setattr(maintenance_thread, "time", SimpleNamespace(monotonic=lambda: now))
    resting: Any = Resting()
    with closing(Thread()) as thread:
        for time in (0.0, 1.0, 2.0, 3.0):
            if time:
                look(thread, time)
            thread.wake_at_rest(resting, 1.5)
        for time in (4.4, 4.6, 10.0):
            look(thread, time)
    assert maintained == [4.6]
