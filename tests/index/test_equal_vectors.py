"""Records with equal vectors share a node of the graph, so they do not cut off other records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import Labels, Matrix
from emberpc.server.index import Index
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.persistent_graph import PersistentGraph
from index.support import gaussian, numbered

WIDTH = 32
SPEC = CollectionSpec("c", WIDTH)


def with_copies(others: int, copies: int) -> tuple[Matrix, Labels]:
    """Return shuffled prepared vectors, and the rows of those that have no copy."""
    rng = np.random.default_rng(0)
    order = rng.permutation(others + copies)
    vectors = np.vstack([gaussian(others, WIDTH), np.repeat(gaussian(1, WIDTH, seed=1), copies, axis=0)])[order]
    return prepare(vectors, Distance.COSINE), np.flatnonzero(order < others)


def built(vectors: Matrix) -> PersistentGraph:
    graph = PersistentGraph(SPEC)
    labels = np.arange(1, len(vectors) + 1, dtype=np.int64)
    for start in range(0, len(vectors), 16):
        graph.add(labels[start : start + 16], vectors[start : start + 16])
    graph.set_ef(100)
    return graph


def test_many_equal_vectors_do_not_hide_other_records() -> None:
    vectors, others = with_copies(500, 1000)
    labels, _ = built(vectors).search(vectors[others], 1)
    assert np.mean(labels[:, 0] == others + 1) >= 0.99


def test_a_node_returns_all_its_records_and_stays_until_the_last_is_removed() -> None:
    vectors, others = with_copies(300, 200)
    graph = built(vectors)
    copies = sorted(set(range(1, 501)) - set((others + 1).tolist()))
    query = vectors[copies[0] - 1][None]
    labels, scores = graph.search(query, 50)
    assert labels[0].tolist() == copies[:50]
    assert np.allclose(scores, 1, atol=1e-5)
    graph.remove(set(copies[:-1]))
    assert graph.live == 301
    assert graph.dead_share == 0
    assert graph.search(query, 2)[0][0, 0] == copies[-1]
    assert np.array_equal(graph.held(copies)[copies[-1]], query[0])
    graph.remove({copies[-1]})
    assert graph.dead_share > 0
    assert copies[-1] not in graph.search(query, 2)[0]
    graph.add(np.array([501], dtype=np.int64), query)
    assert graph.search(query, 2)[0][0, 0] == 501


def test_few_nodes_with_many_labels_are_searched() -> None:
    vectors, _ = with_copies(3, 200)
    labels, _ = built(vectors).search(vectors[:2], 20)
    assert labels.shape == (2, 20)
    assert all(len(set(row)) == 20 for row in labels.tolist())


def test_a_snapshot_keeps_the_labels_of_each_node(tmp_path: Path) -> None:
    vectors, _ = with_copies(300, 200)
    graph = built(vectors)
    graph.remove({1, 2, 3, 4})
    snapshots.save(graph.save, SPEC, "identity", tmp_path)
    loaded = snapshots.load(SPEC, "identity", 500, tmp_path)
    assert loaded is not None
    assert loaded.labels() == graph.labels()
    assert loaded.dead_share == graph.dead_share
    loaded.set_ef(100)
    assert np.array_equal(loaded.search(vectors[:20], 10)[0], graph.search(vectors[:20], 10)[0])
    # A copy that is added to the loaded graph joins its node.
    (found,) = loaded.search(vectors[7][None], 1)[0].tolist()
    loaded.add(np.array([600], dtype=np.int64), loaded.held(found)[found[0]][None])
    loaded.remove({600})
    assert loaded.dead_share == graph.dead_share


def test_a_snapshot_of_the_former_format_is_not_used(tmp_path: Path) -> None:
    snapshots.save(built(with_copies(20, 5)[0]).save, SPEC, "identity", tmp_path)
    (sidecar,) = tmp_path.glob("*.json")
    facts = json.loads(sidecar.read_text(encoding="utf-8"))["facts"]
    facts["format"] = 3
    for key in ("outside", "ghosts", "checked"):
        del facts[key]
    sidecar.write_text(json.dumps({"facts": facts, "facts_sha256": snapshots._digest(facts)}), encoding="utf-8")
    assert snapshots.load(SPEC, "identity", 500, tmp_path) is None


def test_a_search_returns_as_many_records_of_equal_vectors_as_requested(index: Index) -> None:
    collection = index.create(SPEC)
    vectors, others = with_copies(100, 200)
    collection.upsert(numbered(300), vectors)
    collection.maintain()
    copies = sorted(set(range(300)) - set(others.tolist()))
    (outcome,) = collection.search(vectors[copies[0]][None], 30)
    names = [record.id for record, _ in outcome.hits]
    assert len(set(names)) == 30
    assert set(names) <= {f"r{i:05}" for i in copies}
    collection.delete(names)
    (outcome,) = collection.search(vectors[copies[0]][None], 30)
    assert not set(names) & {record.id for record, _ in outcome.hits}
    assert [problem for step in collection.verify() for problem in step.problems] == []
