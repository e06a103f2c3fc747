"""Records, on every index backend, are read as they were written."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.conftest import MakeCollection
from emberpc.client import Client, Record
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from index_helpers import vectors

DIMENSIONS = 8
#: Ids with characters that are special in query languages, file names or sort orders; in byte order.
IDS = sorted(
    [
        " ", '"', "$x", "%", "'", "' or 1 == 1 --", "*", "0", "1", "10", "9", "A", "\\", "\\n", '\\"', "a", "ab",
        'a" or id != "', "a" * 512, "id in [1]", "{x}", "é", "日本語", "\uffee", "🐝",
    ],
    key=str.encode,
)  # fmt: skip
METADATA = {
    "text": 'a "quoted" \\ text\nof two lines, and a bee: 🐝',
    "number": 0.1,
    "whole": 2**53,
    "great": 1e300,
    "true": True,
    "nothing": None,
    "list": [1, "two", [3, {}]],
    "nested": {"a.b": {"": [None]}},
    "": "an empty key",
}


@pytest.fixture
def collection(make_collection: MakeCollection) -> str:
    return make_collection(DIMENSIONS)


def fill(client: Client, collection: str, ids: list[str]) -> np.ndarray:
    matrix = vectors(len(ids), dimensions=DIMENSIONS)
    client.upsert(collection, [Record(each, f"text of {each}", {"id": each}) for each in ids], vectors=matrix)
    return matrix


def test_records_are_read_as_written(client: Client, collection: str) -> None:
    matrix = vectors(len(IDS), dimensions=DIMENSIONS)
    records = [Record(each, f"text of {each}\n\t\\", METADATA, f"label of {each}"[:100]) for each in IDS]
    result = client.upsert(collection, records, vectors=matrix)
    assert (result.inserted, result.updated) == (len(IDS), 0)
    found = client.get(collection, [*reversed(IDS), "none"], with_vectors=True)
    assert found == records[::-1]
    assert np.array_equal(np.stack([record.vector for record in found if record.vector is not None]), matrix[::-1])
    assert {record.revision for record in found} == {result.sequence}
    assert client.count(collection) == len(IDS)


def test_records_are_listed_by_id_in_byte_order(client: Client, collection: str) -> None:
    fill(client, collection, IDS[::-1])
    for page_size in (1, 7, 1000):
        assert [record.id for record in client.records(collection, page_size=page_size)] == IDS
    assert [record.vector is not None for record in client.records(collection, with_vectors=True)] == [True] * len(IDS)


def test_paging_returns_each_unchanged_record_once_despite_writes(client: Client, collection: str) -> None:
    ids = [f"r{i:03}" for i in range(60)]
    fill(client, collection, ids)
    met = []
    for i, record in enumerate(client.records(collection, page_size=7)):
        met.append(record.id)
        if i % 10 == 5:  # a listed record and one that is not listed yet
            client.delete(collection, [ids[i - 3], ids[59 - i // 10]])
            fill(client, collection, [f"a{i}", record.id])
    gone = {ids[i - 3] for i in range(5, 60, 10)} | {ids[59 - i // 10] for i in range(5, 60, 10)}
    assert len(met) == len(set(met))
    assert set(ids) - gone <= set(met)


def test_an_upsert_replaces_a_record_and_keeps_its_create_time(client: Client, collection: str) -> None:
    first = client.upsert(collection, [Record("a", "old", {"x": 1})], vectors=vectors(1, 1, DIMENSIONS))
    (before,) = client.get(collection, ["a"])
    second = client.upsert(collection, [Record("a", "new"), Record("b")], vectors=vectors(2, 2, DIMENSIONS))
    assert (second.inserted, second.updated) == (1, 1)
    assert second.sequence > first.sequence
    (after,) = client.get(collection, ["a"])
    assert (after.text, after.metadata) == ("new", {})
    assert after.create_time == before.create_time
    assert before.update_time is not None
    assert after.update_time is not None
    assert after.update_time > before.update_time
    assert client.count(collection) == 2
    assert client.get_collection(collection).sequence == second.sequence


def test_deleted_records_are_missing_in_all_reads(client: Client, collection: str) -> None:
    matrix = fill(client, collection, IDS)
    gone = IDS[::2]
    assert client.delete(collection, [*gone, "none", gone[0]]) == len(gone)
    assert client.delete(collection, gone) == 0
    left = [each for each in IDS if each not in gone]
    assert client.get(collection, gone) == []
    assert [record.id for record in client.records(collection)] == left
    assert client.count(collection) == len(left)
    assert {hit.record.id for hit in client.search(collection, matrix[0], top_k=len(IDS))} == set(left)
    fill(client, collection, gone[:1])
    assert client.count(collection) == len(left) + 1


def test_a_write_is_seen_by_the_next_read(client: Client, collection: str) -> None:
    one, other = np.eye(DIMENSIONS, dtype=np.float32)[:2]
    client.upsert(collection, [{"id": "fixed"}], vectors=[one + other])
    for round_ in range(10):
        near = [one, other][round_ % 2]
        client.upsert(collection, [{"id": "moving", "text": str(round_)}], vectors=[near])
        hits = client.search(collection, near, top_k=2)
        assert [hit.record.id for hit in hits] == ["moving", "fixed"]
        assert hits[0].record.text == str(round_)
        assert client.count(collection) == 2


def test_a_batch_of_2500_records_is_written_and_deleted_whole(client: Client, collection: str) -> None:
    ids = [f"r{i:04}" for i in range(2500)]
    matrix = vectors(len(ids), dimensions=DIMENSIONS)
    client.upsert(collection, [{"id": each} for each in ids], vectors=matrix, batch_size=len(ids))
    assert client.count(collection) == len(ids)
    assert [record.id for record in client.get(collection, ids[::-1])] == ids[::-1]
    assert client.delete(collection, ids[:2000]) == 2000
    assert [record.id for record in client.records(collection)] == ids[2000:]


def test_records_have_only_the_requested_parts(
    stub: index_pb2_grpc.IndexServiceStub, client: Client, collection: str
) -> None:
    fill(client, collection, ["a", "b"])
    request = pb.BatchGetRecordsRequest(collection=collection, ids=["b", "x"], parts=[pb.RECORD_PART_VECTOR])
    response = stub.BatchGetRecords(request)
    assert response.missing_ids == ["x"]
    assert [(record.id, record.text) for record in response.records] == [("b", "")]
    assert response.vectors.dimensions == DIMENSIONS
