"""Nearly equal vectors hide no other record, and searches also find records without links to their nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Labels, Matrix
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.grouped_graph import GroupedGraph
from emberpc.server.index.graph.hnsw import Hnsw
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.graph.persistent_graph import PersistentGraph
from index.support import gaussian, numbered

WIDTH = 32
DEFAULT_EF = 100
SPEC = CollectionSpec("c", WIDTH)
#: Parameters with which many nodes get no links to them.
POOR = CollectionSpec("c", WIDTH, m=4, ef_construction=16)
#: With Euclidean distances, a twentieth of 600 random nodes get no links. With fewer than 1000 records, no recall is
#: measured.
POOR_EUCLIDEAN = replace(POOR, distance=Distance.EUCLIDEAN)


def crowd(others: int, near: int, noise: float) -> tuple[Matrix, Labels]:
    """Return shuffled vectors, and the rows of those that are not near one mean."""
    order = np.random.default_rng(0).permutation(others + near)
    mean = gaussian(1, WIDTH, seed=1)
    vectors = np.vstack([gaussian(others, WIDTH), mean + noise * gaussian(near, WIDTH, seed=2)])[order]
    return vectors, np.flatnonzero(order < others)


def built(vectors: Matrix, spec: CollectionSpec = SPEC) -> PersistentGraph:
    """Return a graph of prepared vectors; the label of row i is i + 1."""
    graph = PersistentGraph(spec)
    labels = np.arange(1, len(vectors) + 1, dtype=np.int64)
    for start in range(0, len(vectors), 16):
        graph.add(labels[start : start + 16], vectors[start : start + 16])
    graph.set_ef(DEFAULT_EF)
    return graph


def recalls(
    graph: PersistentGraph, vectors: Matrix, queries: Matrix, distance: Distance = Distance.COSINE
) -> tuple[float, float]:
    """Return self-recall and recall@10; an equal score counts."""
    _, scores = graph.search(queries, 10)
    _, truth = nearest(queries, vectors, 10, distance)
    bounds = truth - 1e-5 * np.maximum(1, np.abs(truth))
    return float(np.mean(scores[:, 0] >= bounds[:, 0])), float(np.mean(scores >= bounds[:, 9:]))


@pytest.mark.parametrize("distance", [Distance.COSINE, Distance.EUCLIDEAN])
@pytest.mark.parametrize("noise", [0.0, 0.001, 0.01])
def test_nearly_equal_vectors_hide_neither_others_nor_each_other(distance: Distance, noise: float) -> None:
    vectors, others = crowd(500, 1000, noise)
    vectors = prepare(vectors, distance)
    graph = built(vectors, CollectionSpec("c", WIDTH, distance=distance))
    for queries in (vectors[others], vectors[np.setdiff1d(np.arange(1500), others)[::4]]):
        own, at_ten = recalls(graph, vectors, queries, distance)
        assert own >= 0.99
        assert at_ten >= 0.95


@pytest.mark.parametrize("near", [60, 400], ids=["group without a graph", "group with a graph"])
def test_scores_within_a_group_are_exact(near: int) -> None:
    vectors, _ = crowd(300, near, 0.01)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors)
    assert graph.nodes < 310, "nothing is grouped"
    queries = prepare(gaussian(20, WIDTH, seed=7) + 3 * gaussian(1, WIDTH, seed=1), Distance.COSINE)
    labels, scores = graph.search(queries, 20)
    assert all(len(set(row)) == 20 for row in labels.tolist())
    own = np.einsum("qkd,qd->qk", vectors[labels - 1], queries)
    assert np.allclose(scores, own, atol=1e-5)
    assert np.mean(scores >= nearest(queries, vectors, 20, Distance.COSINE)[1][:, 19:] - 1e-6) >= 0.99


@pytest.mark.parametrize("near", [60, 400], ids=["group without a graph", "group with a graph"])
def test_a_group_survives_its_leader_and_is_removed_with_its_last_record(near: int) -> None:
    vectors, others = crowd(300, near, 0.001)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors)
    group = sorted(set(range(1, len(vectors) + 1)) - set((others + 1).tolist()))
    leader, last = group[0], group[-1]
    query = vectors[last - 1][None]
    graph.remove({leader})
    labels, _ = graph.search(query, 10)
    assert labels[0, 0] == last
    assert leader not in labels
    assert graph.dead_share == 0
    # The vector of the leader is added again.
    graph.add(np.array([9000], dtype=np.int64), vectors[leader - 1][None])
    assert graph.search(vectors[leader - 1][None], 1)[0][0, 0] == 9000
    graph.remove({9000, *group[:-1]})
    assert graph.search(query, 1)[0][0, 0] == last
    assert np.array_equal(graph.held([last])[last], query[0])
    graph.remove({last})
    assert graph.dead_share > 0
    assert graph.labels() == set((others + 1).tolist())
    assert not set(graph.search(query, 10)[0][0].tolist()) & set(group)


def unchecked(monkeypatch: pytest.MonkeyPatch, build: Callable[[], object]) -> None:
    """Build without the check that searches find each node."""
    with monkeypatch.context() as patch:
        patch.setattr(Hnsw, "missed", lambda self, nodes, vectors: nodes[:0])
        build()


def missed(graph: PersistentGraph, vectors: Matrix) -> list[int]:
    labels, _ = graph.search(vectors, 1)
    return [row for row, label in enumerate(labels[:, 0].tolist()) if label != row + 1]


def test_a_node_that_later_nodes_cut_off_becomes_a_stray() -> None:
    vectors = prepare(gaussian(1500, WIDTH), Distance.COSINE)
    graph = built(vectors, POOR)
    lost = missed(graph, vectors)
    assert lost, "the graph is too good to show anything"
    graph.check(graph.begin_check())
    assert missed(graph, vectors) == []
    assert 0 < graph.stray_share < 0.1
    labels = {row + 1 for row in lost}
    assert graph.held(sorted(labels)).keys() == labels
    graph.remove(labels)
    assert not labels & set(graph.search(vectors[lost], 10)[0].ravel().tolist())
    assert graph.stray_share == 0


def test_a_node_of_a_group_that_is_cut_off_becomes_a_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = prepare(gaussian(1, WIDTH, seed=1) + 0.01 * gaussian(400, WIDTH), Distance.COSINE)
    graph = built(vectors)
    assert graph.nodes == 1
    monkeypatch.setattr(Hnsw, "missed", lambda self, nodes, vectors: nodes[nodes == 100])
    graph.check(graph.begin_check())
    (group,) = graph._groups.values()
    assert isinstance(group, GroupedGraph)
    assert group.stray_share > 0
    assert graph.search(vectors[99][None], 1)[0].tolist() == [[100]]


def test_a_group_is_found_through_a_leader_that_is_a_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, others = crowd(300, 100, 0.001)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors)
    group = sorted(set(range(1, 401)) - set((others + 1).tolist()))
    monkeypatch.setattr(Hnsw, "missed", lambda self, nodes, vectors: nodes[nodes == group[0]])
    graph.check(graph.begin_check())
    rows = np.array(group) - 1
    assert graph.search(vectors[rows], 1)[0][:, 0].tolist() == group
    graph.remove(set(group))
    assert graph.labels() == set((others + 1).tolist())
    assert graph.stray_share == 0


def test_a_snapshot_keeps_groups_and_strays(tmp_path: Path) -> None:
    vectors, others = crowd(1500, 100, 0.001)
    vectors = prepare(np.vstack([vectors, vectors[:50]]), Distance.COSINE)
    graph = built(vectors, POOR)
    graph.check(graph.begin_check())
    group = sorted(set(range(1, 1601)) - set((others + 1).tolist()))
    graph.remove({group[0]})
    kept = graph.labels()
    assert graph.stray_share > 0
    snapshots.save(graph.save, POOR, "identity", tmp_path)
    loaded = snapshots.load(POOR, "identity", 2000, tmp_path)
    assert loaded is not None
    # A record of the group was deleted since, and one added.
    stored = np.array([*sorted(kept - {group[1]}), 1999], dtype=np.int64)
    neighbours = Neighbours(POOR, loaded)
    rows = dict(enumerate(vectors, start=1)) | {1999: vectors[0]}
    neighbours.catch_up(
        stored, lambda labels: (np.array(labels, dtype=np.int64), np.stack([rows[label] for label in labels]))
    )
    assert neighbours.waiting == 1
    assert loaded.labels() == kept - {group[1]}
    assert loaded.nodes == graph.nodes
    assert loaded.stray_share == graph.stray_share
    graph.remove({group[1]})
    loaded.set_ef(DEFAULT_EF)
    assert np.array_equal(loaded.search(vectors, 3)[1], graph.search(vectors, 3)[1])


def test_a_leader_without_records_is_removed_with_its_deleted_group(tmp_path: Path) -> None:
    vectors, others = crowd(300, 100, 0.001)
    graph = built(prepare(vectors, Distance.COSINE))
    group = set(range(1, 401)) - set((others + 1).tolist())
    graph.remove({min(group)})
    snapshots.save(graph.save, SPEC, "identity", tmp_path)
    loaded = snapshots.load(SPEC, "identity", 2000, tmp_path)
    assert loaded is not None
    neighbours = Neighbours(SPEC, loaded)
    neighbours.catch_up(others + 1, lambda labels: (np.empty(0, dtype=np.int64), np.empty((0, WIDTH), np.float32)))
    assert (neighbours.count, loaded.nodes) == (300, 300)


def problems(collection: Collection) -> list[str]:
    """Return the records that verify reports; it makes them strays, which every later search covers."""
    return [problem.id for step in collection.verify(full=True) for problem in step.problems]


def not_found(collection: Collection) -> int:
    """Return the number of records that a search for their own vectors does not find."""
    labels = collection._store.labels()
    vectors = collection._read_vectors(labels.tolist())[1]
    found = collection._neighbours.search(vectors, 1, 800)
    return sum(each is not None and each.labels[0] != label for each, label in zip(found, labels.tolist(), strict=True))


def test_a_record_that_verify_reports_is_found_after_an_upsert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.vstack([gaussian(600, WIDTH), gaussian(600, WIDTH)[:160]])  # some with a copy, which shares the node
    index = Index(tmp_path, buffer_limit=8)
    collection = index.create(POOR_EUCLIDEAN)
    monkeypatch.setattr(collection, "_wake", lambda: None)
    collection.upsert(numbered(760), vectors)
    unchecked(monkeypatch, collection.maintain)
    named = problems(collection)
    assert named, "the graph is too good to show anything"
    for name in named:
        collection.upsert(numbered(1, first=int(name[1:])), vectors[int(name[1:])][None])
    collection.maintain()
    assert problems(collection) == []
    index.close()
    index = Index(tmp_path, buffer_limit=8)
    assert problems(index.get("c")) == []
    index.close()


def test_all_nodes_are_checked_after_the_graph_grew_by_half(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = index.create(POOR_EUCLIDEAN)
    monkeypatch.setattr(collection, "_wake", lambda: None)
    vectors = gaussian(960, WIDTH)
    collection.upsert(numbered(600), vectors[:600])
    unchecked(monkeypatch, collection.maintain)
    assert not_found(collection)
    collection.upsert(numbered(360, first=600), vectors[600:])
    collection.maintain()
    assert not_found(collection) == 0


def test_the_default_ef_depends_on_distinct_vectors(index: Index) -> None:
    """Nearly equal records are found easily; they must not hide that searches for the others need more candidates."""
    collection = index.create(CollectionSpec("c", WIDTH, m=8, ef_construction=60))
    vectors, others = crowd(1100, 2200, 0.001)
    collection.upsert(numbered(len(vectors)), vectors)
    collection.maintain()
    assert len(collection._neighbours.node_labels()) < 1200
    alone = index.create(CollectionSpec("d", WIDTH, m=8, ef_construction=60))
    alone.upsert(numbered(1100), vectors[others])
    alone.maintain()
    ours, theirs = (each._graph_maintenance.ef_chooser.ef(10, 0, 0.95) for each in (collection, alone))
    assert ours is not None
    assert theirs is not None
    assert ours >= theirs / 2


def read_of(vectors: Matrix) -> Callable[[list[int]], tuple[Labels, Matrix]]:
    """Return a function that reads prepared vectors by labels; row i has the label i + 1."""

    def read(labels: list[int]) -> tuple[Labels, Matrix]:
        found = np.array(labels, dtype=np.int64)
        return found, vectors[found - 1]

    return read


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_rebuilt_graph_finds_every_vector(shuffled: bool) -> None:
    vectors, _ = crowd(1000, 1000, 0.1)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors, POOR)
    assert missed(graph, vectors), "the graph is too good to show anything"
    neighbours = Neighbours(POOR, graph)
    assert neighbours.rebuild(read_of(vectors), lambda: False, shuffled=shuffled)
    found = neighbours.search(vectors, 1, DEFAULT_EF)
    assert [each.labels[0] for each in found if each] == list(range(1, len(vectors) + 1))


def test_the_node_of_equal_vectors_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = prepare(gaussian(40, WIDTH), Distance.COSINE)
    graph = built(vectors)
    looked_up: list[int] = []
    vectors_of = GroupedGraph._vectors

    def watched(self: GroupedGraph, names: list[int]) -> Matrix:
        looked_up.extend(names)
        return vectors_of(self, names)

    monkeypatch.setattr(GroupedGraph, "_vectors", watched)
    graph.add(np.arange(100, 116, dtype=np.int64), vectors[[7] * 8 + [9] * 8])
    assert looked_up == [8, 10]
    assert graph.nodes == 40


@pytest.fixture
def cut_off(index: Index, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """A collection that grew by less than half since its last check; the growth cut off some nodes."""
    collection = index.create(POOR_EUCLIDEAN)
    monkeypatch.setattr(collection, "_wake", lambda: None)
    monkeypatch.setattr(collection, "_wake_at_rest", lambda seconds: None)
    vectors = gaussian(640, WIDTH)
    collection.upsert(numbered(600), vectors[:600])
    unchecked(monkeypatch, collection.maintain)
    collection.upsert(numbered(40, first=600), vectors[600:])
    collection._graph_maintenance._last_write += 1000
    collection.maintain()
    assert not_found(collection), "the graph is too good to show anything"
    return collection


def test_a_graph_without_recent_writes_is_checked_after_little_growth(cut_off: Collection) -> None:
    cut_off._graph_maintenance._next_check = 0
    assert cut_off._graph_maintenance.due_at_rest is not None
    cut_off._graph_maintenance._last_write -= 5000
    cut_off.maintain()
    assert not_found(cut_off) == 0
    assert cut_off._graph_maintenance.due_at_rest is None


def test_checks_of_a_graph_without_recent_writes_are_delayed(cut_off: Collection) -> None:
    maintenance = cut_off._graph_maintenance
    maintenance._last_write -= 5000
    maintenance._next_check += 1000
    seconds = maintenance.due_at_rest
    assert seconds is not None
    assert seconds > maintenance._limits.rest_seconds
    cut_off.maintain()
    assert not_found(cut_off), "it was checked before the time"


def test_a_loaded_graph_is_checked_for_nodes_added_before_the_snapshot(cut_off: Collection, tmp_path: Path) -> None:
    graph = cut_off._neighbours._graph
    snapshots.save(graph.save, POOR_EUCLIDEAN, "identity", tmp_path)
    loaded = snapshots.load(POOR_EUCLIDEAN, "identity", 2000, tmp_path)
    assert loaded is not None
    neighbours = Neighbours(POOR_EUCLIDEAN, loaded)
    neighbours.catch_up(cut_off._store.labels(), cut_off._read_vectors)
    assert loaded.added == graph.added == 40
    neighbours.check(lambda: False, at_rest=True)
    assert not neighbours.needs_check


def test_members_of_a_group_missing_in_a_snapshot_are_found_and_grouped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberpc.server.index.graph.persistent_graph._MAX_SAVED_GROUP", 150)
    vectors, _ = crowd(300, 200, 0.001)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors)
    snapshots.save(graph.save, SPEC, "identity", tmp_path)
    loaded = snapshots.load(SPEC, "identity", 2000, tmp_path)
    assert loaded is not None
    neighbours = Neighbours(SPEC, loaded)
    neighbours.catch_up(np.arange(1, 501), read_of(vectors))
    assert neighbours.waiting == 199
    for _ in range(2):
        found = neighbours.search(vectors, 1, DEFAULT_EF)
        scores = np.array([each.scores[0] for each in found if each])
        assert np.allclose(scores, 1, atol=1e-6)
        neighbours.drain(1000, lambda: False)
    assert (neighbours.waiting, loaded.nodes, len(loaded.labels())) == (0, 301, 500)


def test_a_record_that_verify_reports_is_found_afterwards(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upsert, the record does not become a node again, which would cut off others."""
    collection = index.create(POOR_EUCLIDEAN)
    monkeypatch.setattr(collection, "_wake", lambda: None)
    vectors = gaussian(600, WIDTH)
    collection.upsert(numbered(600), vectors)
    unchecked(monkeypatch, collection.maintain)
    named = problems(collection)
    assert named, "the graph is too good to show anything"
    assert problems(collection) == []
    graph = collection._neighbours._graph
    nodes = graph.nodes
    for name in named:
        collection.upsert(numbered(1, first=int(name[1:])), vectors[int(name[1:])][None])
    collection._neighbours.drain(len(named), lambda: False)
    assert graph.nodes == nodes
    assert problems(collection) == []


@pytest.mark.parametrize("near", [60, 400], ids=["group without a graph", "group with a graph"])
def test_a_member_of_a_group_can_be_made_a_stray(near: int) -> None:
    vectors, others = crowd(300, near, 0.001)
    vectors = prepare(vectors, Distance.COSINE)
    graph = built(vectors)
    group = sorted(set(range(1, len(vectors) + 1)) - set((others + 1).tolist()))
    graph.compare_always([group[1], group[2], 10**6])
    assert graph.strays >= 2
    assert graph.search(vectors[group[1] - 1][None], 1)[0].tolist() == [[group[1]]]
    graph.compare_always(group)
    assert graph.labels() == set(range(1, len(vectors) + 1))
    assert graph.search(vectors[np.array(group) - 1], 1)[0][:, 0].tolist() == group
    graph.remove(set(group))
    assert graph.labels() == set((others + 1).tolist())
    assert graph.strays == 0
