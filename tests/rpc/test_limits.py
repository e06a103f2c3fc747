"""The limits of requests and responses: stated by GetServerInfo, and checked before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import AsyncClient, Client
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc, server_pb2, server_pb2_grpc, types_pb2
from emberpc.wire import vectors
from examples.server_process import ServerProcess

RESPONSE = 200_000
#: A tenth of a response.
TEXT = "x" * (RESPONSE // 10)
COUNT = 40
#: List items and map entries of the metadata of one record.
_VALUES = 10_001


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ServerProcess({}, tmp_path_factory.mktemp("data"), "--max-response-bytes", str(RESPONSE)) as process:
        yield process.address


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with Client(address) as client:
        client.create_collection("long", dimensions=2)
        records = [{"id": f"r{i:02}", "text": f"{i} {TEXT}"} for i in range(COUNT)]
        client.upsert("long", records, vectors=[[1.0, i] for i in range(COUNT)])
    with grpc.insecure_channel(address) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> index_pb2_grpc.IndexServiceStub:
    return index_pb2_grpc.IndexServiceStub(channel)


def query(count: int) -> list[pb.SearchQuery]:
    return [pb.SearchQuery(vector=vectors.encode(np.array([[1.0, 0.0]], dtype=np.float32)))] * count


TOO_LARGE = {
    "one record many times": lambda stub: stub.BatchGetRecords(
        pb.BatchGetRecordsRequest(collection="long", ids=["r00"] * 500)
    ),
    "many records": lambda stub: stub.BatchGetRecords(
        pb.BatchGetRecordsRequest(collection="long", ids=[f"r{i:02}" for i in range(COUNT)])
    ),
    "unknown ids": lambda stub: stub.BatchGetRecords(
        pb.BatchGetRecordsRequest(collection="long", ids=[f"{i:0500}" for i in range(RESPONSE // 500 + 1)])
    ),
    "many hits": lambda stub: stub.Search(pb.SearchRequest(collection="long", queries=query(1), top_k=COUNT)),
    "one hit of many queries": lambda stub: stub.Search(
        pb.SearchRequest(collection="long", queries=query(300), top_k=1)
    ),
    "vectors of many hits": lambda stub: stub.Search(
        pb.SearchRequest(collection="long", queries=query(9), top_k=10_000, parts=[pb.RECORD_PART_VECTOR])
    ),
    "hits by words": lambda stub: stub.Search(
        pb.SearchRequest(
            collection="long", queries=[pb.SearchQuery(text=str(i)) for i in range(COUNT)], mode=pb.SEARCH_MODE_LEXICAL
        )
    ),
    "examples of clusters": lambda stub: stub.ClusterRecords(
        pb.ClusterRecordsRequest(collection="long", cluster_count=2, examples_per_cluster=20)
    ),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_response_that_would_be_too_large_is_refused(stub: index_pb2_grpc.IndexServiceStub, kind: str) -> None:
    with pytest.raises(grpc.RpcError, match=f"more than {RESPONSE} bytes") as refused:
        TOO_LARGE[kind](stub)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_records_and_their_vectors_are_limited_together(stub: index_pb2_grpc.IndexServiceStub) -> None:
    def get(count: int) -> Any:
        parts = [pb.RECORD_PART_VECTOR]
        return stub.BatchGetRecords(pb.BatchGetRecordsRequest(collection="long", ids=["r00"] * count, parts=parts))

    of_one = get(1).records[0].ByteSize()
    assert len(get(RESPONSE // (of_one + 8 + 4)).records)
    with pytest.raises(grpc.RpcError, match=f"more than {RESPONSE} bytes"):
        get(RESPONSE // of_one)  # records without vectors


def test_a_page_ends_before_its_limit_of_bytes(stub: index_pb2_grpc.IndexServiceStub) -> None:
    found, token, pages = [], "", 0
    while pages == 0 or token:
        response = stub.ListRecords(pb.ListRecordsRequest(collection="long", page_size=1000, page_token=token))
        found += [record.id for record in response.records]
        token, pages = response.next_page_token, pages + 1
    assert found == [f"r{i:02}" for i in range(COUNT)]
    assert pages > 1


def test_records_below_the_response_limit_are_returned_whole(stub: index_pb2_grpc.IndexServiceStub) -> None:
    response = stub.BatchGetRecords(pb.BatchGetRecordsRequest(collection="long", ids=["r01", "none", "r00"]))
    assert [record.text[:2] for record in response.records] == ["1 ", "0 "]
    assert list(response.missing_ids) == ["none"]
    (result,) = stub.Search(pb.SearchRequest(collection="long", queries=query(1), top_k=5)).results
    assert len(result.hits) == 5


@pytest.mark.usefixtures("stub")
async def test_the_clients_divide_a_get_of_many_long_records(address: str) -> None:
    ids = [f"r{i:02}" for i in range(COUNT)]
    with Client(address) as client:
        found = client.get("long", ids, with_vectors=True)
    assert [record.id for record in found] == ids
    async with AsyncClient(address) as asynchronous:
        assert await asynchronous.get("long", ids) == found


@pytest.mark.usefixtures("stub")
async def test_the_clients_divide_a_search_with_many_long_hits(address: str) -> None:
    queries = np.array([[1.0, i] for i in range(COUNT)], dtype=np.float32)
    with Client(address) as client:
        found = client.search_batch("long", list(queries), top_k=2)
    assert [len(result.hits) for result in found] == [2] * COUNT
    async with AsyncClient(address) as asynchronous:
        assert await asynchronous.search_batch("long", list(queries), top_k=2) == found


def test_omitted_parts_do_not_count_as_response_bytes(stub: index_pb2_grpc.IndexServiceStub) -> None:
    parts, ids = [pb.RECORD_PART_METADATA], [f"r{i:02}" for i in range(COUNT)]
    got = stub.BatchGetRecords(pb.BatchGetRecordsRequest(collection="long", ids=ids, parts=parts))
    assert [record.id for record in got.records] == ids
    page = stub.ListRecords(pb.ListRecordsRequest(collection="long", page_size=1000, parts=parts))
    assert [record.id for record in page.records] == ids
    for mode in (pb.SEARCH_MODE_DENSE, pb.SEARCH_MODE_LEXICAL):
        queries = query(1) if mode == pb.SEARCH_MODE_DENSE else [pb.SearchQuery(text=str(i)) for i in range(COUNT)]
        found = stub.Search(pb.SearchRequest(collection="long", queries=queries, top_k=COUNT, mode=mode, parts=parts))
        hits = [hit.record for result in found.results for hit in result.hits]
        assert sorted(record.id for record in hits) == ids
        assert not any(record.text for record in hits)


def test_the_server_states_its_limits(channel: grpc.Channel) -> None:
    info = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    assert info.version == version("emberpc")
    assert info.limits.max_response_bytes == RESPONSE
    assert list(info.features) == ["index_backend:embedded"]
    for field in info.limits.DESCRIPTOR.fields:
        assert getattr(info.limits, field.name) > 0


def test_stated_limits_are_the_ones_that_are_checked(tiny_server: ServerProcess) -> None:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(tiny_server.address, options) as channel:
        try:
            check_limits(channel)
        finally:
            request = pb.DeleteCollectionRequest(name="limits")
            index_pb2_grpc.IndexServiceStub(channel).DeleteCollection(request)


def check_limits(channel: grpc.Channel) -> None:
    stub = index_pb2_grpc.IndexServiceStub(channel)
    limits = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest()).limits

    def upsert(count: int = 1, **fields: Any) -> object:
        records = [pb.Record(**{"id": f"new{i}", **fields}) for i in range(count)]
        matrix = vectors.encode(np.ones((count, 2), dtype=np.float32))
        return stub.UpsertRecords(pb.UpsertRecordsRequest(collection="limits", records=records, vectors=matrix))

    def upsert_values(total: int) -> object:
        """Upsert records with metadata of `total` map entries and list items together."""
        sizes = [_VALUES] * (total // _VALUES) + [total % _VALUES]
        records = [pb.Record(id=f"new{i}") for i in range(len(sizes))]
        for record, size in zip(records, sizes, strict=True):
            record.metadata.update({"k": [None] * (size - 1)} if size else {})
        matrix = vectors.encode(np.ones((len(records), 2), dtype=np.float32))
        return stub.UpsertRecords(pb.UpsertRecordsRequest(collection="limits", records=records, vectors=matrix))

    def search(count: int = 1, **fields: Any) -> object:
        return stub.Search(
            pb.SearchRequest(collection="limits", queries=query(count), parts=[pb.RECORD_PART_METADATA], **fields)
        )

    def get(count: int) -> object:
        return stub.BatchGetRecords(pb.BatchGetRecordsRequest(collection="limits", ids=["a"] * count))

    def page(size: int) -> object:
        return stub.ListRecords(pb.ListRecordsRequest(collection="limits", page_size=size))

    stub.CreateCollection(pb.CreateCollectionRequest(collection=pb.Collection(name="limits", dimensions=2)))
    cases: list[tuple[int, Callable[[int], object], str]] = [
        (limits.max_texts, upsert, "records"),
        (limits.max_id_bytes, lambda size: upsert(id="i" * size), "records[0].id"),
        (limits.max_label_bytes, lambda size: upsert(label="l" * size), "records[0].label"),
        (limits.max_text_bytes, lambda size: upsert(text="t" * size), "records[0].text"),
        (limits.max_metadata_bytes, lambda size: upsert(metadata={"k": "m" * (size - 9)}), "records[0].metadata"),
        (limits.max_queries, search, "queries"),
        (limits.max_top_k, lambda size: search(top_k=size), "top_k"),
        (limits.max_hits, lambda size: search(1000, top_k=-(-size // 1000)), "queries"),
        (limits.max_ids, get, "ids"),
        (limits.max_page_size, page, "page_size"),
        (limits.max_elements, upsert_values, "UpsertRecordsRequest"),
    ]
    for limit, call, field in cases:
        call(limit)
        with pytest.raises(grpc.RpcError, match=f"{field} ".replace("[", "\\[")) as refused:
            call(limit + 1)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_stated_limit_of_message_bytes_is_the_one_that_is_checked(
    channel: grpc.Channel, stub: index_pb2_grpc.IndexServiceStub
) -> None:
    limit = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest()).limits
    block = types_pb2.Vectors(rows=1, dimensions=1, data=b"x" * limit.max_message_bytes)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Search(pb.SearchRequest(collection="long", queries=[pb.SearchQuery(vector=block)]))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
