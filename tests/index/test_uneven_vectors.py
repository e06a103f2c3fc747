"""Vectors of uneven density or length are found, although a simple graph would cut off many of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Matrix
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.grouped_graph import GroupedGraph
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.jobs import graph_maintenance
from emberpc.server.index.search import recall
from index.support import gaussian, numbered
from index.test_grouped_graph import DEFAULT_EF, SPEC, WIDTH, built, problems, read_of, recalls


def one_cone(count: int = 1500) -> Matrix:
    """Return vectors around one mean; some are a hundred times as near to the mean as others."""
    mean = gaussian(1, WIDTH, seed=1) / WIDTH**0.5
    noises = (0.01, 0.02, 0.05, 0.1, 1)
    return np.vstack(
        [mean + noise / WIDTH**0.5 * gaussian(count // 5, WIDTH, seed=i) for i, noise in enumerate(noises, 2)]
    )


def with_a_hub(count: int) -> Matrix:
    """Return vectors that are nearer to a vector in their centre than to each other."""
    vectors = gaussian(count, WIDTH)
    vectors[0] = 0
    return vectors


def of_many_lengths(count: int) -> Matrix:
    """Return vectors of which some are hundreds of times as long as others."""
    return np.asarray(gaussian(count, WIDTH) * np.exp(1.5 * gaussian(count, 1, seed=1)), dtype=np.float32)


#: Vectors of which a simple graph cuts off many, or which it cannot distinguish.
UNEVEN = {
    "one cone": (one_cone, Distance.COSINE),
    "a hub": (with_a_hub, Distance.EUCLIDEAN),
    "many lengths": (of_many_lengths, Distance.EUCLIDEAN),
    "many lengths, product": (of_many_lengths, Distance.DOT_PRODUCT),
    "short, distance": (lambda count: gaussian(count, WIDTH) * np.float32(1e-23), Distance.EUCLIDEAN),
    "very short, distance": (lambda count: gaussian(count, WIDTH) * np.float32(1e-37), Distance.EUCLIDEAN),
    "short, product": (lambda count: gaussian(count, WIDTH) * np.float32(1e-12), Distance.DOT_PRODUCT),
}


def collection_recalls(collection: Collection, queries: Matrix, min_recall: float = 0) -> tuple[float, float]:
    """Return the shares of the nearest and of the ten nearest that searches find; an equal score counts."""
    distance = collection.spec.distance
    vectors = collection._read_vectors(collection._store.labels().tolist())[1]
    outcomes = collection.search(queries, 10, min_recall=min_recall)
    scores = np.array([[score for _, score in outcome.hits] for outcome in outcomes])
    _, truth = nearest(prepare(queries, distance), vectors, 10, distance)
    bounds = truth - 1e-5 * np.abs(truth).max(axis=1, keepdims=True)
    return float(np.mean(scores[:, 0] >= bounds[:, 0])), float(np.mean(scores >= bounds[:, 9:]))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        # test_short_vectors.py has fast tests of short vectors.
        ("one cone", 600),
        pytest.param("a hub", 600, marks=pytest.mark.slow),
        *(pytest.param(kind, 1500, marks=pytest.mark.slow) for kind in UNEVEN),
    ],
)
def test_uneven_vectors_are_found_after_writes_and_deletions(
    index: Index, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    make, distance = UNEVEN[kind]
    # The recall of so small a graph is measured too, and a sample of its nodes is checked. With the default parameters
    # a graph of 600 vectors misses none of them.
    spec = CollectionSpec("c", WIDTH, distance=distance)
    if count < 1000:
        spec = replace(spec, m=6, ef_construction=24)
    monkeypatch.setattr(recall, "MIN_SIZE", 2 * count // 3)
    monkeypatch.setattr(graph_maintenance, "_FIRST_SAMPLE", 2 * count // 3)
    vectors = make(count)[np.random.default_rng(0).permutation(count)].astype(np.float32)
    part = count // 15
    collection = index.create(spec)
    monkeypatch.setattr(collection, "_wake", lambda: None)
    collection.upsert(numbered(count), vectors)
    collection.maintain()
    for state in ("new", "changed"):
        if state == "changed":
            vectors[: 6 * part] = vectors[6 * part : 12 * part] * np.float32(1.0001)
            collection.upsert(numbered(6 * part), vectors[: 6 * part])
            collection.delete([f"r{i:05}" for i in range(3 * part, 7 * part)])
            collection.maintain()
        some = vectors[7 * part :: 4]
        noise = 0.05 * np.linalg.norm(some, axis=1, keepdims=True) * gaussian(len(some), WIDTH) / WIDTH**0.5
        for queries in (some, some + noise):
            own, at_ten = collection_recalls(collection, queries)
            assert own >= 0.99
            assert at_ten >= 0.95
            assert collection_recalls(collection, queries, 0.97)[1] >= 0.96
        assert problems(collection) == []


def test_queries_much_shorter_than_the_vectors_find_their_hits(index: Index) -> None:
    collection = index.create(CollectionSpec("c", WIDTH, distance=Distance.DOT_PRODUCT))
    collection.upsert(numbered(1500), gaussian(1500, WIDTH))
    collection.maintain()
    queries = gaussian(50, WIDTH, seed=1)
    for scale in (1e-15, 1e-12, 1):
        outcomes = collection.search(queries * np.float32(scale), 10)
        assert outcomes[0].plan.ef
        assert collection_recalls(collection, queries * np.float32(scale))[1] >= 0.95


def test_shells_survive_a_restart(tmp_path: Path) -> None:
    vectors = prepare(one_cone(), Distance.COSINE)
    neighbours = Neighbours(SPEC, built(vectors))
    neighbours.rebuild(read_of(vectors), lambda: False, shuffled=True)
    graph = neighbours._graph
    assert graph.shells is not None
    snapshots.save(graph.save, SPEC, "identity", tmp_path)
    loaded = snapshots.load(SPEC, "identity", 2000, tmp_path)
    assert loaded is not None
    again = Neighbours(SPEC, loaded)
    again.catch_up(np.arange(1, 1501), read_of(vectors))
    assert again.waiting == 0
    assert loaded.shells is not None
    assert np.array_equal(loaded.shells.of(vectors), graph.shells.of(vectors))
    loaded.set_ef(DEFAULT_EF)
    assert recalls(loaded, vectors, vectors[::5])[0] >= 0.99


def test_many_strays_get_a_graph_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberpc.server.index.graph.grouped_graph._MAX_COMPARED_STRAYS", 100)
    vectors = prepare(one_cone(), Distance.COSINE)
    graph = built(vectors)
    graph.check(graph.begin_check())
    assert graph.strays > 100
    assert isinstance(graph._strays, GroupedGraph)
    graph.check(graph.begin_check())
    assert recalls(graph, vectors, vectors[::5])[0] >= 0.99
    some = sorted(graph._strays.labels())[:2]
    graph.compare_always(some)
    assert graph.held(some).keys() == set(some)
    snapshots.save(graph.save, SPEC, "identity", tmp_path)
    loaded = snapshots.load(SPEC, "identity", 2000, tmp_path)
    assert loaded is not None
    Neighbours(SPEC, loaded).catch_up(np.arange(1, 1501), read_of(vectors))
    loaded.set_ef(DEFAULT_EF)
    assert loaded.strays == graph.strays
    assert recalls(loaded, vectors, vectors[::5])[0] >= 0.99
    strays = graph._strays.labels()
    graph.remove(strays)
    assert graph.strays == 0
    assert not strays & set(graph.search(vectors, 1)[0][:, 0].tolist())
