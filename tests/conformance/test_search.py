"""Search, on every index backend, finds the true nearest records with the documented scores."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.conftest import MakeCollection
from emberpc.client import Client, NotFound, RecordId
from emberpc.server.collections import Distance
from index_helpers import true_scores, vectors

DIMENSIONS = 32


def fill(client: Client, collection: str, matrix: np.ndarray, first: int = 0) -> dict[str, np.ndarray]:
    truth = {f"r{first + i:05}": row for i, row in enumerate(matrix)}
    client.upsert(collection, [{"id": each} for each in truth], vectors=matrix, batch_size=1000)
    return truth


def recall(
    client: Client, collection: str, truth: dict[str, np.ndarray], queries: np.ndarray, k: int, distance: Distance
) -> float:
    """Return the share of the true k nearest records that searches find, and check the score of each hit."""
    found = 0
    matrix = np.stack(list(truth.values()))
    for query, result in zip(queries, client.search_batch(collection, list(queries), top_k=k), strict=True):
        scores = true_scores(query, matrix, distance)
        by_id = dict(zip(truth, scores.tolist(), strict=True))
        assert [hit.score for hit in result.hits] == sorted((hit.score for hit in result.hits), reverse=True)
        for hit in result.hits:
            assert hit.score == pytest.approx(by_id[hit.record.id], rel=1e-3, abs=1e-4)
        bound = np.sort(scores)[-k]
        found += sum(by_id[hit.record.id] >= bound - 1e-5 for hit in result.hits)
    return found / (len(queries) * k)


@pytest.mark.parametrize("distance", list(Distance))
def test_a_search_finds_the_true_nearest_records(
    client: Client, make_collection: MakeCollection, distance: Distance
) -> None:
    collection = make_collection(DIMENSIONS, distance.value)
    truth = fill(client, collection, vectors(2000, dimensions=DIMENSIONS))
    queries = vectors(2040, dimensions=DIMENSIONS)[2000:]
    assert recall(client, collection, truth, queries, 10, distance) >= 0.98


def test_recall_holds_when_records_are_replaced_and_deleted(client: Client, make_collection: MakeCollection) -> None:
    collection = make_collection(DIMENSIONS)
    truth = fill(client, collection, vectors(1000, dimensions=DIMENSIONS))
    for round_ in range(3):
        truth |= fill(client, collection, vectors(500, seed=1 + round_, dimensions=DIMENSIONS), first=250 * round_)
    gone = list(truth)[::3]
    client.delete(collection, gone)
    left = {key: vector for key, vector in truth.items() if key not in set(gone)}
    assert client.count(collection) == len(left)
    queries = np.stack(list(left.values()))[:40] + 0.1 * vectors(40, seed=9, dimensions=DIMENSIONS)
    assert recall(client, collection, left, queries, 10, Distance.COSINE) >= 0.98


def test_each_query_of_a_batch_gets_its_own_hits(client: Client, make_collection: MakeCollection) -> None:
    collection = make_collection(DIMENSIONS)
    truth = fill(client, collection, vectors(300, dimensions=DIMENSIONS))
    results = client.search_batch(collection, list(truth.values()), top_k=1)
    assert [result.hits[0].record.id for result in results] == list(truth)


def test_a_search_by_record_leaves_the_record_out(client: Client, make_collection: MakeCollection) -> None:
    collection = make_collection(DIMENSIONS)
    fill(client, collection, vectors(20, dimensions=DIMENSIONS))
    (result,) = client.search_batch(collection, [RecordId("r00003")], top_k=50)
    assert sorted(hit.record.id for hit in result.hits) == [f"r{i:05}" for i in range(20) if i != 3]
    assert result.plan.shortfall_reason == "the collection holds 20 records, the record asked about left out"
    with pytest.raises(NotFound):
        client.search(collection, RecordId("none"))


def test_a_top_k_above_the_number_of_records_returns_all_records(
    client: Client, make_collection: MakeCollection
) -> None:
    collection = make_collection(DIMENSIONS)
    matrix = vectors(100, dimensions=DIMENSIONS)
    (empty,) = client.search_batch(collection, [matrix[0]], top_k=10)
    assert (empty.hits, empty.plan.shortfall_reason) == ((), "the collection holds 0 records")
    fill(client, collection, matrix)
    (result,) = client.search_batch(collection, [matrix[0]], top_k=10_000, with_vectors=True)
    assert len(result.hits) == 100
    assert result.plan.shortfall_reason == "the collection holds 100 records"
    vector = result.hits[0].record.vector
    assert vector is not None
    assert np.array_equal(vector, matrix[0])


def test_a_search_returns_2500_hits_of_each_query(client: Client, make_collection: MakeCollection) -> None:
    collection = make_collection(4)
    truth = fill(client, collection, vectors(3000, dimensions=4))
    results = client.search_batch(collection, list(truth.values())[:5], top_k=2500)
    assert [len({hit.record.id for hit in result.hits}) for result in results] == [2500] * 5
