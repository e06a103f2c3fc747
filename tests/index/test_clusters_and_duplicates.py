"""Duplicates and clusters equal those of a comparison of all pairs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs import duplicates
from emberpc.server.index.jobs.clusters import k_means
from index.support import numbered, refused
from index_helpers import DIMENSIONS, vectors


def never() -> bool:
    return False


@pytest.fixture(params=Distance)
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Collection]:
    with closing(Index(tmp_path, buffer_limit=50)) as index:
        yield index.create(CollectionSpec("c", DIMENSIONS, distance=request.param))


def true_pairs(matrix: np.ndarray, min_score: float) -> dict[tuple[str, str], float]:
    units = matrix.astype(np.float64) / np.linalg.norm(matrix, axis=1, keepdims=True)
    scores = units @ units.T
    return {
        (f"r{i:05}", f"r{j:05}"): scores[i, j]
        for i in range(len(matrix))
        for j in range(i + 1, len(matrix))
        if scores[i, j] >= min_score
    }


def test_all_pairs_above_the_least_score_are_found_in_order_of_score(collection: Collection) -> None:
    matrix = vectors(300)
    matrix[7] = 2 * matrix[3]
    collection.upsert(numbered(300), matrix)
    found = collection.duplicates(0.9, never)
    true = true_pairs(matrix, 0.9)
    assert len(true) > 50
    assert {(pair.first_id, pair.second_id) for pair in found} == set(true)
    for pair in found:
        assert pair.score == pytest.approx(true[pair.first_id, pair.second_id], abs=1e-5)
    assert found == sorted(found, key=lambda pair: pair.order)
    assert (found[0].first_id, found[0].second_id) == ("r00003", "r00007")


def test_duplicates_of_large_collections_are_found_with_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "EXACT_LIMIT", 100)
    matrix = vectors(600, dimensions=32)
    with closing(Index(tmp_path, buffer_limit=50)) as index:
        collection = index.create(CollectionSpec("c", 32))
        collection.upsert(numbered(600), matrix)
        collection.maintain()
        found = {(pair.first_id, pair.second_id): pair.score for pair in collection.duplicates(0.9, never)}
    true = true_pairs(matrix, 0.9)
    assert set(found) <= set(true)
    assert len(found) >= 0.98 * len(true)


def test_if_there_are_too_many_pairs_those_with_the_greatest_scores_are_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 40)
    monkeypatch.setattr(duplicates, "_BLOCK", 1000)
    matrix = vectors(200)
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(numbered(200), matrix)
        found = collection.duplicates(0.5, never)
    best = sorted(true_pairs(matrix, 0.5).values(), reverse=True)[:40]
    assert [pair.score for pair in found] == pytest.approx(best, abs=1e-5)


def test_distant_clusters_are_found_whole(collection: Collection) -> None:
    generator = np.random.default_rng(0)
    centres = 20 * np.eye(DIMENSIONS, dtype=np.float32)[:5]
    sizes = [60, 50, 40, 30, 20]
    matrix = np.vstack(
        [centre + generator.normal(size=(size, DIMENSIONS)) for centre, size in zip(centres, sizes, strict=True)]
    )
    collection.upsert(numbered(200), matrix.astype(np.float32))
    found = collection.clusters(5, 4, never)
    assert [cluster.record_count for cluster in found] == sizes
    firsts = np.cumsum([0, *sizes])
    for cluster, first, last in zip(found, firsts, firsts[1:], strict=False):
        assert len(cluster.examples) == 4
        assert all(first <= int(record.id[1:]) < last for record in cluster.examples)


def test_examples_of_a_cluster_are_nearest_to_its_centre(tmp_path: Path) -> None:
    matrix = vectors(500)
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(numbered(500), matrix)
        found = collection.clusters(6, 500, never)
    assert sum(cluster.record_count for cluster in found) == 500
    units = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    for cluster in found:
        assert len(cluster.examples) == cluster.record_count
        own = units[[int(record.id[1:]) for record in cluster.examples]]
        scores = own @ own.mean(axis=0)
        assert np.all(np.diff(scores) < 0.02 * np.abs(scores).max())


@given(st.integers(1, 40), st.integers(2, 12), st.booleans(), st.integers(0, 100))
def test_k_means_ends_with_at_most_as_many_centres_as_distinct_vectors(
    count: int, k: int, directions: bool, seed: int
) -> None:
    matrix = vectors(count, seed)
    matrix[count // 2 :] = matrix[0]
    if directions:
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    centres = k_means(matrix, k, directions=directions)
    assert 1 <= len(centres) <= min(k, len(np.unique(matrix, axis=0)))
    assert np.isfinite(centres).all()


def test_empty_collections_and_equal_vectors_have_duplicates_and_clusters(collection: Collection) -> None:
    assert collection.duplicates(0.9, never) == []
    assert collection.clusters(3, 5, never) == []
    collection.upsert(numbered(10), np.ones((10, DIMENSIONS), dtype=np.float32))
    assert len(collection.duplicates(1.0, never)) == 45
    assert [cluster.record_count for cluster in collection.clusters(3, 5, never)] == [10]


@pytest.mark.parametrize("distance", [Distance.COSINE, Distance.DOT_PRODUCT])
def test_duplicates_and_clusters_do_not_depend_on_the_length_of_vectors(tmp_path: Path, distance: Distance) -> None:
    """The squares of numbers below 1e-23 are 0 in float32."""
    matrix = np.zeros((40, DIMENSIONS), dtype=np.float32)
    matrix[:20, 0] = matrix[20:, 1] = 1
    matrix += vectors(40) * np.float32(0.01)
    shortest = np.float32(1e-30 if distance is Distance.COSINE else 1e-15)
    lengths = np.where(np.arange(40) % 3, np.float32(1), shortest)[:, None]
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS, distance=distance))
        collection.upsert(numbered(40), matrix * lengths)
        assert [cluster.record_count for cluster in collection.clusters(2, 1, never)] == [20, 20]
        assert len(collection.duplicates(0.9, never)) == 2 * (20 * 19 // 2)


def test_damaged_vectors_are_in_no_cluster(collection: Collection) -> None:
    collection.upsert(numbered(10), vectors(10))
    with closing(sqlite3.connect(collection._folder / "records.db", isolation_level=None)) as database:
        database.execute("UPDATE records SET vector = zeroblob(7) WHERE id != 'r00003'")
        assert [cluster.record_count for cluster in collection.clusters(2, 1, never)] == [1]
        database.execute("UPDATE records SET vector = zeroblob(7)")
    assert collection.clusters(2, 1, never) == []
    assert collection.duplicates(-1, never) == []


def test_deleting_a_collection_ends_its_search_for_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_BLOCK", 1000)
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(numbered(100), vectors(100))
        looking, deleted = threading.Event(), threading.Event()

        def delete() -> None:
            looking.wait(300)
            index.delete("c")
            deleted.set()

        deleting = threading.Thread(target=delete)
        deleting.start()

        def slowly() -> bool:
            looking.set()
            assert collection._calls._ending.wait(300)
            return False

        with refused(Code.UNAVAILABLE, "closed or deleted"):
            collection.duplicates(0.5, slowly)
        deleting.join(300)
        assert deleted.is_set()
