"""Invalid requests change nothing, and every index backend refuses them with the same code and field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from conformance.conftest import MakeCollection
from emberpc.client import AlreadyExists, Client, NotFound
from emberpc.v1 import errors_pb2, index_pb2_grpc, types_pb2
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

Stub = index_pb2_grpc.IndexServiceStub


@contextmanager
def refused(field: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is code, caught.value.details()
    details = dict(caught.value.trailing_metadata())[status.DETAILS_KEY]
    assert isinstance(details, bytes)
    found = status.detail(status.unpack(details), errors_pb2.BadRequest)
    assert found is not None
    assert field in [violation.field for violation in found.field_violations]


def block(*rows: list[float]) -> types_pb2.Vectors:
    matrix = np.array(rows, dtype="<f4")
    return types_pb2.Vectors(
        data=matrix.tobytes(), rows=len(rows), dimensions=matrix.shape[1], dtype=types_pb2.DATA_TYPE_FLOAT32
    )


@pytest.fixture
def collection(client: Client, make_collection: MakeCollection) -> str:
    name = make_collection(3)
    client.upsert(name, [{"id": "a"}], vectors=[[1, 2, 3]])
    return name


BAD_VECTORS = {
    "nan": [1.0, float("nan"), 0.0],
    "infinite": [1.0, float("inf"), 0.0],
    "zero": [0.0, 0.0, 0.0],
    "huge": [1e30, 0.0, 0.0],
    "short": [1.0, 2.0],
    "long": [1.0, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize("kind", BAD_VECTORS)
def test_an_invalid_vector_is_refused_by_upsert_and_search(stub: Stub, collection: str, kind: str) -> None:
    bad = block(BAD_VECTORS[kind])
    with refused("vectors[0]"):
        stub.UpsertRecords(pb.UpsertRecordsRequest(collection=collection, records=[pb.Record(id="b")], vectors=bad))
    field = "queries[0].vector.dimensions" if kind in ("short", "long") else "queries[0].vector"
    with refused(field):
        stub.Search(pb.SearchRequest(collection=collection, queries=[pb.SearchQuery(vector=bad)]))
    assert stub.CountRecords(pb.CountRecordsRequest(collection=collection)).count == 1


@pytest.mark.parametrize(
    ("field", "record"),
    [
        ("records[1].id", pb.Record(id="")),
        ("records[1].id", pb.Record(id="x" * 513)),
        ("records[1].id", pb.Record(id="a\0b")),
        ("records[1].id", pb.Record(id="first")),
    ],
)
def test_an_upsert_with_one_invalid_record_changes_nothing(
    stub: Stub, collection: str, field: str, record: pb.Record
) -> None:
    with refused(field):
        stub.UpsertRecords(
            pb.UpsertRecordsRequest(
                collection=collection,
                records=[pb.Record(id="first"), record, pb.Record(id="a", text="new")],
                vectors=block([1, 0, 0], [0, 1, 0], [0, 0, 1]),
            )
        )
    response = stub.ListRecords(pb.ListRecordsRequest(collection=collection))
    assert [(found.id, found.text) for found in response.records] == [("a", "")]


@pytest.mark.parametrize("top_k", [-1, 10_001, 10**6])
def test_a_top_k_outside_its_limits_is_refused(stub: Stub, collection: str, top_k: int) -> None:
    with refused("top_k"):
        stub.Search(
            pb.SearchRequest(collection=collection, queries=[pb.SearchQuery(vector=block([1, 0, 0]))], top_k=top_k)
        )


def test_a_page_token_that_the_server_did_not_give_is_refused(stub: Stub, collection: str) -> None:
    with refused("page_token"):
        stub.ListRecords(pb.ListRecordsRequest(collection=collection, page_token="ä"))
    with refused("page_token"):
        stub.ListCollections(pb.ListCollectionsRequest(page_token="ä"))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("collection.name", pb.Collection(name="", dimensions=3)),
        ("collection.name", pb.Collection(name="no spaces", dimensions=3)),
        ("collection.name", pb.Collection(name="x" * 129, dimensions=3)),
        ("collection.dimensions", pb.Collection(name="x", dimensions=0)),
        ("collection.dimensions", pb.Collection(name="x", dimensions=16_001)),
        ("collection.hnsw.m", pb.Collection(name="x", dimensions=3, hnsw=pb.HnswParameters(m=3))),
    ],
)
def test_an_invalid_collection_is_not_created(stub: Stub, field: str, wrong: pb.Collection) -> None:
    with refused(field):
        stub.CreateCollection(pb.CreateCollectionRequest(collection=wrong))


@pytest.mark.parametrize("name", ["none", "no spaces", "", "x" * 300, '" or 1', "ü"])
def test_calls_on_a_missing_collection_raise_not_found(client: Client, name: str) -> None:
    for call in (client.get_collection, client.count, client.delete_collection):
        with pytest.raises(NotFound) as missing:
            call(name)
        assert missing.value.reason == "COLLECTION_NOT_FOUND"


def test_a_name_is_taken_until_its_collection_is_deleted(client: Client, make_collection: MakeCollection) -> None:
    name = make_collection(3)
    client.upsert(name, [{"id": "a"}], vectors=[[1, 2, 3]])
    with pytest.raises(AlreadyExists) as taken:
        client.create_collection(name, dimensions=3)
    assert taken.value.reason == "COLLECTION_EXISTS"
    client.delete_collection(name)
    with pytest.raises(NotFound):
        client.count(name)
    client.create_collection(name, dimensions=5, distance="euclidean")
    assert client.count(name) == 0
    client.upsert(name, [{"id": "b"}], vectors=[[1, 2, 3, 4, 5]])
    assert [record.id for record in client.records(name)] == ["b"]


def test_collections_are_listed_by_name_with_their_settings(stub: Stub, client: Client) -> None:
    names = sorted(["conf.list-a_b", "conf.list.a", "conf-list", "conf_list", "conf0", "Conf", "conf.list-a_b."])
    for name in names:
        client.create_collection(
            name, dimensions=3, distance="dot_product", truncation="start", m=8, ef_construction=40
        )
    try:
        listed = []
        token = ""
        while True:
            page = stub.ListCollections(pb.ListCollectionsRequest(page_size=2, page_token=token))
            listed += [found for found in page.collections if found.name in names]
            if not (token := page.next_page_token):
                break
        assert [found.name for found in listed] == names
        for found in map(client.get_collection, names):
            reported = (found.dimensions, found.distance, found.truncation, found.m, found.ef_construction)
            assert reported == (3, "dot_product", "start", 8, 40)
            assert (found.record_count, found.model) == (0, "")
            assert found.create_time is not None
    finally:
        for name in names:
            client.delete_collection(name)


def test_texts_without_vectors_are_refused_by_a_collection_without_a_model(stub: Stub, collection: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.UpsertRecords(pb.UpsertRecordsRequest(collection=collection, records=[pb.Record(id="b", text="t")]))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
