"""Very short vectors, and lengths over many magnitudes."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.collections.metric import lengthened, nearest
from emberpc.server.collections.types import Matrix, Plan, SearchStrategy
from emberpc.server.errors import Code
from emberpc.server.index import Index
from emberpc.server.index.graph.neighbours import Candidates, Neighbours
from emberpc.server.index.search import recall
from index.support import gaussian, numbered, refused

WIDTH = 8


def true_distances(queries: Matrix, vectors: Matrix) -> np.ndarray:
    differences = queries.astype(np.float64)[:, None] - vectors.astype(np.float64)
    return np.asarray(np.linalg.norm(differences, axis=2))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-23, 1e-16, 1e-5, 1, 1e10])
def test_distances_of_any_length_are_exact(scale: float) -> None:
    vectors, queries = (gaussian(count, WIDTH, seed=count) * np.float32(scale) for count in (500, 20))
    vectors[::2] = gaussian(250, WIDTH, seed=3)  # and longer vectors among them
    rows, scores = nearest(queries, vectors, 10, Distance.EUCLIDEAN)
    truth = true_distances(queries, vectors)
    assert np.allclose(-scores, np.take_along_axis(truth, rows, axis=1), rtol=1e-6, atol=0)
    assert np.allclose(-scores, np.sort(truth, axis=1)[:, :10], rtol=1e-6, atol=0)


def test_queries_of_any_length_are_scaled_without_a_warning() -> None:
    short = np.float32(2**14) * np.array([[0], [1e-42], [1e-30], [0.5], [1], [1e20]], dtype=np.float32)
    scaled, factors = lengthened(short)
    assert factors.ravel().tolist() == [2.0**120, 2.0**120, 2.0**100, 2, 1, 1]
    assert np.array_equal(scaled, short * factors)


@pytest.mark.parametrize("min_recall", [0, 1])
def test_very_short_vectors_are_found(index: Index, min_recall: float) -> None:
    collection = index.create(CollectionSpec("c", WIDTH, distance=Distance.EUCLIDEAN))
    vectors = gaussian(300, WIDTH) * np.float32(1e-23)
    collection.upsert(numbered(300), vectors)
    collection.maintain()
    queries = gaussian(20, WIDTH, seed=1) * np.float32(1e-23)
    nearest_ids = [[f"r{i:05}" for i in row] for row in np.argsort(true_distances(queries, vectors), axis=1)[:, :5]]
    outcomes = collection.search(queries, 5, min_recall=min_recall)
    assert [[record.id for record, _ in outcome.hits] for outcome in outcomes] == nearest_ids
    assert [problem for step in collection.verify(full=True) for problem in step.problems] == []


class Missing:
    """Neighbours whose hit for the second, shorter query is ten times too far away."""

    def search(self, queries: Matrix, k: int, ef: int) -> list[Candidates]:
        scores = [-1e10, -1e-4]
        return [Candidates([0], [score], False, Plan(SearchStrategy.HNSW, ef, 0)) for score in scores[: len(queries)]]


def test_recall_of_short_queries_is_measured_with_their_own_distances() -> None:
    """Compared with the longest of all distances, every hit of a short query would be near enough."""
    truth = np.array([[-1e10], [-1e-5]], dtype=np.float32)
    found = recall._recall(cast("Neighbours", Missing()), np.zeros((2, WIDTH), np.float32), truth, 1, 10, lambda: False)
    assert found == 0.5


@pytest.mark.parametrize("min_recall", [0, 1])
@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1])
def test_dot_products_of_short_vectors_are_exact(index: Index, scale: float, min_recall: float) -> None:
    collection = index.create(CollectionSpec("c", WIDTH, distance=Distance.DOT_PRODUCT))
    vectors = gaussian(300, WIDTH) * np.float32(scale)
    collection.upsert(numbered(300), vectors)
    collection.maintain()
    queries = gaussian(20, WIDTH, seed=1) * np.float32(scale)
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for outcome, row in zip(collection.search(queries, 5, min_recall=min_recall), products, strict=True):
        assert [record.id for record, _ in outcome.hits] == [f"r{i:05}" for i in np.argsort(-row)[:5]]
        assert np.allclose([score for _, score in outcome.hits], np.sort(row)[::-1][:5], rtol=1e-5, atol=0)


def test_vectors_whose_dot_products_would_be_zero_are_refused(index: Index) -> None:
    collection = index.create(CollectionSpec("c", WIDTH, distance=Distance.DOT_PRODUCT))
    short = gaussian(2, WIDTH) * np.float32(1e-20)
    with refused(Code.INVALID_ARGUMENT, "is shorter than 1e-16; their products would be zero; scale the vectors up"):
        collection.upsert(numbered(2), short)
    zeros = np.zeros((2, WIDTH), dtype=np.float32)
    collection.upsert(numbered(2), zeros)
    with refused(Code.INVALID_ARGUMENT, "is shorter than 1e-16"):
        collection.search(short[:1], 1)
    assert [score for _, score in collection.search(zeros[:1], 2)[0].hits] == [0, 0]
