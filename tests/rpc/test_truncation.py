"""Over-long texts: queries are truncated and report it, writes follow their own setting or that of the collection."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from emberpc.cli.app import run
from emberpc.client import AsyncClient, Client, FilterWarning, InvalidArgument, Record, RecordId, ResponseDetails
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc, types_pb2
from emberpc.wire import vectors
from examples.server_process import ServerProcess

LONG = "first " + "word " * 2000 + "last"


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[index_pb2_grpc.IndexServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        opened = index_pb2_grpc.IndexServiceStub(channel)
        opened.CreateCollection(pb.CreateCollectionRequest(collection=pb.Collection(name="cut", model="minilm")))
        yield opened
        opened.DeleteCollection(pb.DeleteCollectionRequest(name="cut"))


def upsert(
    stub: index_pb2_grpc.IndexServiceStub, truncation: types_pb2.Truncation.ValueType = types_pb2.TRUNCATION_UNSPECIFIED
) -> list[float]:
    """Write a long text; return its vector."""
    record = pb.Record(id="long", text=LONG)
    response = stub.UpsertRecords(pb.UpsertRecordsRequest(collection="cut", records=[record], truncation=truncation))
    assert response.usages[0].truncated
    return stored(stub)


def stored(stub: index_pb2_grpc.IndexServiceStub) -> list[float]:
    request = pb.BatchGetRecordsRequest(collection="cut", ids=["long"], parts=[pb.RECORD_PART_VECTOR])
    found: list[float] = vectors.decode(stub.BatchGetRecords(request).vectors)[0].tolist()
    return found


def update(stub: index_pb2_grpc.IndexServiceStub, truncation: types_pb2.Truncation.ValueType) -> pb.Collection:
    request = pb.UpdateCollectionRequest(
        collection=pb.Collection(name="cut", truncation=truncation), update_mask=FieldMask(paths=["truncation"])
    )
    return stub.UpdateCollection(request).collection


def test_a_long_query_is_truncated_and_the_usage_states_it(stub: index_pb2_grpc.IndexServiceStub) -> None:
    queries = [pb.SearchQuery(text=LONG), pb.SearchQuery(text="word")]
    response = stub.Search(pb.SearchRequest(collection="cut", queries=queries))
    assert [result.usage.truncated for result in response.results] == [True, False]


def test_a_search_may_refuse_long_queries(stub: index_pb2_grpc.IndexServiceStub) -> None:
    request = pb.SearchRequest(
        collection="cut", queries=[pb.SearchQuery(text=LONG)], truncation=types_pb2.TRUNCATION_REFUSE
    )
    with pytest.raises(grpc.RpcError, match=r"queries\[0\].text has .* tokens"):
        stub.Search(request)


def test_an_upsert_can_set_the_truncation_of_its_texts(stub: index_pb2_grpc.IndexServiceStub) -> None:
    with pytest.raises(grpc.RpcError, match="set the call's `truncation`"):
        upsert(stub)
    assert upsert(stub, types_pb2.TRUNCATION_END) != upsert(stub, types_pb2.TRUNCATION_START)


def test_a_message_of_a_stream_can_set_the_truncation_of_its_texts(stub: index_pb2_grpc.IndexServiceStub) -> None:
    start = upsert(stub, types_pb2.TRUNCATION_START)
    truncations = (types_pb2.TRUNCATION_END, types_pb2.TRUNCATION_START, types_pb2.TRUNCATION_UNSPECIFIED)
    messages = [
        pb.UpsertRecordsStreamRequest(
            collection="cut", batch_number=number, records=[pb.Record(id="long", text=LONG)], truncation=truncation
        )
        for number, truncation in enumerate(truncations, start=1)
    ]
    responses = list(stub.UpsertRecordsStream(iter(messages)))
    assert [bool(response.failures) for response in responses] == [False, False, True]
    assert np.allclose(stored(stub), start, atol=1e-6)


def test_the_truncation_of_a_collection_can_be_changed(stub: index_pb2_grpc.IndexServiceStub) -> None:
    assert update(stub, types_pb2.TRUNCATION_END).truncation == types_pb2.TRUNCATION_END
    end = upsert(stub)
    update(stub, types_pb2.TRUNCATION_START)
    assert upsert(stub) != end
    update(stub, types_pb2.TRUNCATION_REFUSE)
    with pytest.raises(grpc.RpcError, match="tokens"):
        upsert(stub)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.UpdateCollectionRequest(collection=pb.Collection(name="cut")), "update_mask"),
        (
            pb.UpdateCollectionRequest(
                collection=pb.Collection(name="cut"), update_mask=FieldMask(paths=["truncation", "dimensions"])
            ),
            r"update_mask.paths\[1\]",
        ),
        (
            pb.UpdateCollectionRequest(
                collection=pb.Collection(name="cut", truncation=9),  # type: ignore[arg-type]  # no Truncation
                update_mask=FieldMask(paths=["truncation"]),
            ),
            "collection.truncation",
        ),
    ],
)
def test_an_invalid_update_of_a_collection_is_refused_with_the_field(
    stub: index_pb2_grpc.IndexServiceStub, request_: pb.UpdateCollectionRequest, field: str
) -> None:
    with pytest.raises(grpc.RpcError, match=f"{field} ") as refused:
        stub.UpdateCollection(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("stub")
async def test_both_clients_set_the_truncation_of_writes_and_searches(server: ServerProcess, client: Client) -> None:
    records = [Record("long", LONG)]
    with pytest.raises(InvalidArgument, match="tokens"):
        client.upsert("cut", records)
    assert client.upsert("cut", records, truncation="end").inserted == 1
    (checkpoint,) = client.upsert_stream("cut", records, truncation="start")
    assert checkpoint.failures == ()
    assert [result.truncated for result in client.search_batch("cut", [LONG, "word"])] == [True, False]
    with pytest.raises(InvalidArgument, match="tokens"):
        client.search("cut", LONG, truncation="refuse")
    async with AsyncClient(server.address) as asynchronous:
        assert (await asynchronous.update_collection("cut", truncation="start")).truncation == "start"
        assert (await asynchronous.upsert("cut", records)).updated == 1
        assert await asynchronous.server_info() == client.server_info()
    assert client.server_info().limits["max_texts"] == 4096


@pytest.mark.usefixtures("stub")
def test_a_filter_that_compares_strings_with_a_number_gives_a_warning(
    server: ServerProcess, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client.upsert("cut", [Record("a", "text", {"year": "1999"})])
    calls: list[Callable[[], object]] = [
        lambda: client.count("cut", where="year >= 1990"),
        lambda: client.search("cut", "text", where="year >= 1990"),
        lambda: list(client.records("cut", where="year >= 1990")),
        lambda: client.delete("cut", where="year >= 1990"),
    ]
    for call in calls:
        with pytest.warns(FilterWarning, match="'year' with a number"):
            call()
    assert run(["search", "cut", LONG, "--where", "year >= 1990", "--target", server.address]) == 0
    notes = capsys.readouterr().err
    assert "warning: the filter compares 'year' with a number" in notes
    assert "was truncated" in notes


@pytest.mark.usefixtures("stub")
def test_details_state_whether_a_query_was_truncated(client: Client) -> None:
    client.upsert("cut", [Record("short", "short")])
    seen: list[ResponseDetails] = []
    client.search("cut", LONG, details=seen.append)
    client.search_batch("cut", ["short", RecordId("short"), LONG], details=seen.append)
    client.search("cut", "short", mode="lexical", details=seen.append)
    assert [[usage.truncated for usage in each.usages] for each in seen] == [[True], [False, False, True], []]
    assert seen[0].usages[0].tokens == 256
    assert (seen[1].usages[0].tokens, seen[1].usages[1].tokens) == (3, 0)


@pytest.mark.usefixtures("stub")
def test_commands_change_the_truncation_and_print_limits(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", server.address]
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "text": LONG}) + "\n")
    assert run(["upsert", "cut", str(path), *target]) == 2
    assert run(["upsert", "cut", str(path), "--truncation", "end", *target]) == 0
    assert run(["upsert", "cut", str(path), "--truncation", "end", "--stream", *target]) == 0
    assert run(["collection", "update", "cut", "--truncation", "start", *target]) == 0
    assert run(["upsert", "cut", str(path), *target]) == 0
    capsys.readouterr()
    assert run(["info", "--json", *target]) == 0
    assert json.loads(capsys.readouterr().out)["limits"]["max_texts"] == 4096
