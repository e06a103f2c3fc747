"""Vectors: refused values, and scores as documented in index.proto."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.collections.metric import check_vectors, nearest, prepare
from emberpc.server.collections.types import Matrix
from emberpc.server.errors import Code, ServiceError, items_of
from emberpc.server.index import Index
from index.support import gaussian, numbered, refused
from index_helpers import true_scores

GOOD = gaussian(3, 4)


def with_row(row: list[float]) -> Matrix:
    return np.stack([GOOD[0], np.array(row, dtype=np.float32), GOOD[1]])


BAD = {
    "NaN": ([np.nan, 1, 1, 1], list(Distance), "NaN or infinity; give finite numbers"),
    "infinity": ([1, -np.inf, 1, 1], list(Distance), "NaN or infinity; give finite numbers"),
    "zero": ([0, 0, 0, 0], [Distance.COSINE], "length zero, so no direction for cosine; give a vector that is not all"),
    "too long": ([3e38, 0, 0, 0], list(Distance), "longer than 1e+14; scale the vectors down"),
}


@pytest.mark.parametrize(
    ("row", "distance", "word"),
    [pytest.param(row, d, word, id=f"{name}-{d.value}") for name, (row, ds, word) in BAD.items() for d in ds],
)
def test_an_invalid_vector_is_refused_with_its_index_in_writes_and_queries(
    index: Index, row: list[float], distance: Distance, word: str
) -> None:
    collection = index.create(CollectionSpec("c", 4, distance=distance))
    with refused(Code.INVALID_ARGUMENT, word, field="vectors[1]"):
        collection.upsert(numbered(3), with_row(row))
    assert collection.count() == 0
    with refused(Code.INVALID_ARGUMENT, word, field="queries[1].vector"):
        collection.search(with_row(row), 1)


def test_vectors_of_another_type_or_shape_are_refused(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 4))
    with refused(Code.INVALID_ARGUMENT, "float64"):
        collection.upsert(numbered(3), GOOD.astype(np.float64))
    with refused(Code.INVALID_ARGUMENT, "has 0 dimensions, the collection has 4; give a vector of 4 dimensions"):
        collection.search(GOOD[0], 1)
    with refused(Code.INVALID_ARGUMENT, "2 vectors for 3 records", field="vectors"):
        collection.upsert(numbered(3), GOOD[:2])


@given(
    matrix=arrays(np.float32, (3, 5), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    distance=st.sampled_from(Distance),
)
def test_accepted_vectors_have_finite_scores(matrix: Matrix, distance: Distance) -> None:
    try:
        check_vectors(matrix, 5, distance, items_of("vectors"))
    except ServiceError:
        return
    prepared = prepare(matrix, distance)
    assert np.isfinite(prepared).all()
    rows, scores = nearest(prepared, prepared, 3, distance)
    assert np.isfinite(scores).all()
    assert sorted(rows[0].tolist()) == [0, 1, 2]
    if distance is Distance.COSINE:
        np.testing.assert_allclose(np.linalg.norm(prepared.astype(np.float64), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("buffer_limit", [1000, 10], ids=["buffer", "graph"])
@pytest.mark.parametrize("distance", Distance)
def test_scores_of_buffer_and_graph_are_as_documented(
    tmp_path: Path, distance: Distance, buffer_limit: int, scale: float
) -> None:
    index = Index(tmp_path, buffer_limit=buffer_limit)
    collection = index.create(CollectionSpec("c", 8, distance=distance))
    vectors, queries = gaussian(100, 8) * np.float32(scale), gaussian(5, 8, seed=1) * np.float32(scale)
    collection.upsert(numbered(100), vectors)
    collection.maintain()
    for query, outcome in zip(queries, collection.search(queries, 20), strict=True):
        scores = true_scores(query, vectors, distance)
        order = np.argsort(-scores)[:20]
        assert [record.id for record, _ in outcome.hits] == [f"r{i:05}" for i in order]
        np.testing.assert_allclose([score for _, score in outcome.hits], scores[order], rtol=1e-3, atol=1e-6 * scale)
    index.close()


def test_small_distances_between_long_vectors_are_exact(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 4, distance=Distance.EUCLIDEAN))
    base = np.full(4, 5000, dtype=np.float32)
    vectors = np.stack([base + np.float32(step) for step in (0.25, 0.5, 1.0)])
    collection.upsert(numbered(3), vectors)
    outcome = collection.search(base[None], 3)[0]
    np.testing.assert_allclose([score for _, score in outcome.hits], [-0.5, -1.0, -2.0])


def test_a_stored_vector_is_read_as_written(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 4, distance=Distance.COSINE))
    collection.upsert(numbered(3), GOOD * 7)
    found = collection.get([record.id for record in numbered(3)], with_vectors=True)
    np.testing.assert_array_equal(np.stack([record.vector for record in found if record.vector is not None]), GOOD * 7)
    assert collection.get(["r00000"])[0].vector is None
