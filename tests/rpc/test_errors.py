"""Invalid requests: the documented status code, and a field violation that names the item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import Client
from emberpc.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    errors_pb2,
    index_pb2,
    index_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    types_pb2,
)
from emberpc.wire import status, vectors
from examples.server_process import ServerProcess


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def collection(server: ServerProcess) -> Iterator[str]:
    with Client(server.address) as client:
        client.create_collection("errors", model="minilm")
        client.create_collection("plain", dimensions=3)
        client.upsert("errors", [{"id": "a", "text": "a text"}])
        yield "errors"
        client.delete_collection("errors")
        client.delete_collection("plain")


class Failure:
    """Code, message and details of a failed call."""

    def __init__(self, error: grpc.RpcError) -> None:
        assert isinstance(error, grpc.Call)
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        trailing: dict[str, str | bytes] = dict(error.trailing_metadata())
        self.request_id: str | bytes = trailing[status.REQUEST_ID_KEY]
        packed = trailing[status.DETAILS_KEY]
        assert isinstance(packed, bytes)
        self.status: errors_pb2.ErrorStatus = status.unpack(packed)
        bad = status.detail(self.status, errors_pb2.BadRequest)
        self.fields: list[str] = [violation.field for violation in bad.field_violations] if bad else []
        info = status.detail(self.status, errors_pb2.ErrorInfo)
        assert info is not None
        self.reason: str = info.reason


def failure(call: Callable[[Any], Any], request: Any) -> Failure:
    with pytest.raises(grpc.RpcError) as raised:
        call(request)
    found = Failure(raised.value)
    assert found.status.code == found.code.value[0]
    assert found.status.message == found.message
    return found


LONG = "word " * 1000

EMBED_CASES = [
    ({"texts": []}, "texts", "at least one"),
    ({"texts": ["good", ""]}, "texts[1]", "is empty"),
    ({"texts": ["good", " \n"]}, "texts[1]", "is empty"),
    ({"texts": ["good", "good", LONG]}, "texts[2]", "at most 256"),
    ({"texts": ["x" * (2 * 2**20 + 1)]}, "texts[0]", "2097152"),
    ({"texts": ["x"] * 4097}, "texts", "at most 4096"),
    ({"texts": ["x"], "dimensions": 100}, "dimensions", "384"),
    ({"texts": ["x"], "dtype": 77}, "dtype", "77"),
    ({"texts": ["x"], "input_kind": 77}, "input_kind", "77"),
    ({"texts": ["x"], "truncation": 77}, "truncation", "77"),
    ({"texts": ["x"], "normalize": False}, "normalize", "length 1"),
]


@pytest.mark.parametrize(("fields", "field", "words"), EMBED_CASES)
def test_the_error_of_embed_names_the_invalid_field(
    channel: grpc.Channel, fields: dict[str, Any], field: str, words: str
) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed, embedding_pb2.EmbedRequest(model="minilm", **fields)
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == [field]
    assert words in found.message


def test_the_error_of_embed_lists_all_invalid_texts(channel: grpc.Channel) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed,
        embedding_pb2.EmbedRequest(model="minilm", texts=["", "good", ""]),
    )
    assert found.fields == ["texts[0]", "texts[2]"]


def test_the_error_of_embed_lists_repeated_invalid_texts(channel: grpc.Channel) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed,
        embedding_pb2.EmbedRequest(model="minilm", texts=[LONG, "good", f"{LONG} else", LONG, "good"]),
    )
    assert found.fields == ["texts[0]", "texts[2]", "texts[3]"]
    assert found.message.startswith("texts[0] has ")
    assert found.message.endswith("(and 2 more)")


def test_the_error_of_embed_lists_a_limited_number_of_invalid_texts(channel: grpc.Channel) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed,
        embedding_pb2.EmbedRequest(model="minilm", texts=[LONG] * 100),
    )
    bad = status.detail(found.status, errors_pb2.BadRequest)
    assert bad is not None
    *named, last = bad.field_violations
    assert [violation.field for violation in named] == [f"texts[{i}]" for i in range(len(named))]
    assert 5 < len(named) < 30
    assert last.description == f"{100 - len(named)} more violations are not listed"


def test_an_unknown_model_is_not_found_and_the_known_ones_are_listed(channel: grpc.Channel) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed, embedding_pb2.EmbedRequest(model="gpt", texts=["x"])
    )
    assert found.code is grpc.StatusCode.NOT_FOUND
    assert found.reason == "MODEL_NOT_FOUND"
    assert "'gpt'" in found.message
    assert "minilm" in found.message
    found = failure(model_pb2_grpc.ModelServiceStub(channel).GetModel, model_pb2.GetModelRequest(name="gpt"))
    assert found.code is grpc.StatusCode.NOT_FOUND


def test_a_model_of_the_wrong_kind_is_a_failed_precondition(channel: grpc.Channel) -> None:
    found = failure(
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed, embedding_pb2.EmbedRequest(model="modules", texts=["x"])
    )
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    found = failure(
        classification_pb2_grpc.ClassificationServiceStub(channel).Classify,
        classification_pb2.ClassifyRequest(classifier="minilm", texts=["x"]),
    )
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    assert found.reason == "WRONG_MODEL_TASK"


def test_count_tokens_without_a_model_uses_the_only_embedding_model(channel: grpc.Channel) -> None:
    counted = embedding_pb2_grpc.EmbeddingServiceStub(channel).CountTokens(
        embedding_pb2.CountTokensRequest(texts=["x"])
    )
    assert counted.model.name == "minilm"


def test_count_tokens_needs_a_model_name_if_there_are_two(tiny_server: ServerProcess) -> None:
    with grpc.insecure_channel(tiny_server.address) as two:
        found = failure(
            embedding_pb2_grpc.EmbeddingServiceStub(two).CountTokens, embedding_pb2.CountTokensRequest(texts=["x"])
        )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == ["model"]


CLASSIFY_CASES = [
    ({"texts": []}, grpc.StatusCode.INVALID_ARGUMENT, ["texts"]),
    ({"texts": ["x", ""]}, grpc.StatusCode.INVALID_ARGUMENT, ["texts[1]"]),
    ({"texts": [LONG]}, grpc.StatusCode.INVALID_ARGUMENT, ["texts[0]"]),
    ({"texts": ["x"], "top_k": -1}, grpc.StatusCode.INVALID_ARGUMENT, ["top_k"]),
    ({"texts": ["x"], "nearest_examples": 3}, grpc.StatusCode.FAILED_PRECONDITION, []),
    ({"texts": ["x"], "classifier": "none"}, grpc.StatusCode.NOT_FOUND, []),
]


@pytest.mark.parametrize(("fields", "code", "paths"), CLASSIFY_CASES)
def test_the_error_of_classify_names_the_invalid_field(
    channel: grpc.Channel, fields: dict[str, Any], code: grpc.StatusCode, paths: list[str]
) -> None:
    found = failure(
        classification_pb2_grpc.ClassificationServiceStub(channel).Classify,
        classification_pb2.ClassifyRequest(**fields),
    )
    assert found.code is code
    assert found.fields == paths


def block(*rows: list[float]) -> types_pb2.Vectors:
    return vectors.encode(np.array(rows, dtype=np.float32))


def query(**fields: Any) -> list[index_pb2.SearchQuery]:
    return [index_pb2.SearchQuery(text="good"), index_pb2.SearchQuery(**fields)]


SEARCH_CASES = [
    ({"queries": []}, "queries"),
    ({"queries": query()}, "queries[1]"),
    ({"queries": query(text="")}, "queries[1].text"),
    ({"queries": query(text=LONG), "truncation": types_pb2.TRUNCATION_REFUSE}, "queries[1].text"),
    ({"queries": query(text="x"), "truncation": 77}, "truncation"),
    ({"queries": query(vector=block([1.0, 2.0]))}, "queries[1].vector.dimensions"),
    ({"queries": query(vector=block([float("nan")] * 384))}, "queries[1].vector"),
    ({"queries": query(vector=block([float("inf")] * 384))}, "queries[1].vector"),
    ({"queries": query(vector=block([0.0] * 384))}, "queries[1].vector"),
    ({"queries": query(vector=block([1.0] * 384, [1.0] * 384))}, "queries[1].vector.rows"),
    (
        {"queries": query(vector=types_pb2.Vectors(rows=1, dimensions=384, data=b"short"))},
        "queries[1].vector.data",
    ),
    ({"queries": query(vector=types_pb2.Vectors(rows=-1, dimensions=384))}, "queries[1].vector.rows"),
    (
        {"queries": query(vector=vectors.encode(np.ones((1, 384), np.float32), types_pb2.DATA_TYPE_INT8))},
        "queries[1].vector.dtype",
    ),
    ({"queries": query(text="x", top_k=-1)}, "queries[1].top_k"),
    ({"queries": query(text="x"), "top_k": 10**6}, "top_k"),
    ({"queries": query(text="x") * 6, "top_k": 10_000}, "queries"),
    ({"queries": query(text="x"), "ef": -5}, "ef"),
    ({"queries": query(text="x", ef=-5)}, "queries[1].ef"),
    ({"queries": query(text="x", ef=2_000_000)}, "queries[1].ef"),
    ({"queries": query(text="x", ef=9), "min_recall": 0.9}, "queries[1].ef"),
    ({"queries": query(text="x", ef=9), "mode": index_pb2.SEARCH_MODE_LEXICAL}, "queries[1].ef"),
    ({"queries": query(text="x"), "mode": index_pb2.SEARCH_MODE_HYBRID, "fusion": 77}, "fusion"),
    ({"queries": query(text="x"), "parts": [77]}, "parts[0]"),
]


@pytest.mark.parametrize(("fields", "field"), SEARCH_CASES)
def test_the_error_of_search_names_the_invalid_field(channel: grpc.Channel, fields: dict[str, Any], field: str) -> None:
    found = failure(
        index_pb2_grpc.IndexServiceStub(channel).Search, index_pb2.SearchRequest(collection="errors", **fields)
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == [field]


def record(**fields: Any) -> list[index_pb2.Record]:
    return [index_pb2.Record(id="good", text="good"), index_pb2.Record(**fields)]


UPSERT_CASES = [
    ({"records": []}, "records"),
    ({"records": record(text="no id")}, "records[1].id"),
    ({"records": record(id="x" * 513, text="long id")}, "records[1].id"),
    ({"records": record(id="a\x00b", text="control")}, "records[1].id"),
    ({"records": record(id="good", text="twice")}, "records[1].id"),
    ({"records": record(id="b", text="")}, "records[1].text"),
    ({"records": record(id="b", text=LONG)}, "records[1].text"),
    ({"records": record(id="b", text="b"), "vectors": block([1.0] * 384)}, "vectors.rows"),
    ({"records": record(id="b", text="b"), "vectors": block([1.0] * 384, [float("nan")] * 384)}, "vectors[1]"),
    ({"records": record(id="b", text="b"), "vectors": block([1.0] * 384, [0.0] * 384)}, "vectors[1]"),
    ({"records": record(id="b", text="b"), "expected_revisions": [0]}, "expected_revisions"),
]


@pytest.mark.parametrize(("fields", "field"), UPSERT_CASES)
def test_the_error_of_upsert_names_the_invalid_field_and_nothing_is_written(
    channel: grpc.Channel, client: Client, fields: dict[str, Any], field: str
) -> None:
    found = failure(
        index_pb2_grpc.IndexServiceStub(channel).UpsertRecords,
        index_pb2.UpsertRecordsRequest(collection="errors", **fields),
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == [field]
    assert client.count("errors") == 1


def test_vectors_of_other_dimensions_are_refused(channel: grpc.Channel) -> None:
    found = failure(
        index_pb2_grpc.IndexServiceStub(channel).UpsertRecords,
        index_pb2.UpsertRecordsRequest(
            collection="errors", records=[index_pb2.Record(id="b", text="b")], vectors=block([1.0, 2.0])
        ),
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "2" in found.message
    assert "384" in found.message


def test_metadata_that_json_cannot_hold_is_refused(channel: grpc.Channel) -> None:
    bad = index_pb2.Record(id="b", text="b")
    bad.metadata.update({"x": float("nan")})
    found = failure(
        index_pb2_grpc.IndexServiceStub(channel).UpsertRecords,
        index_pb2.UpsertRecordsRequest(collection="errors", records=[bad]),
    )
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.fields == ["records[0].metadata"]


COLLECTION_CASES = [
    ({}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.name"]),
    ({"name": "a/b", "dimensions": 3}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.name"]),
    ({"name": "c"}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.dimensions"]),
    ({"name": "c", "dimensions": 16001}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.dimensions"]),
    ({"name": "c", "dimensions": 3, "model": "minilm"}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.dimensions"]),
    ({"name": "c", "dimensions": 3, "distance": 77}, grpc.StatusCode.INVALID_ARGUMENT, ["collection.distance"]),
    ({"name": "c", "model": "modules"}, grpc.StatusCode.FAILED_PRECONDITION, []),
    ({"name": "c", "model": "none"}, grpc.StatusCode.NOT_FOUND, []),
    ({"name": "errors", "model": "minilm"}, grpc.StatusCode.ALREADY_EXISTS, []),
]


@pytest.mark.parametrize(("fields", "code", "paths"), COLLECTION_CASES)
def test_an_invalid_collection_is_not_created(
    channel: grpc.Channel, fields: dict[str, Any], code: grpc.StatusCode, paths: list[str]
) -> None:
    found = failure(
        index_pb2_grpc.IndexServiceStub(channel).CreateCollection,
        index_pb2.CreateCollectionRequest(collection=index_pb2.Collection(**fields)),
    )
    assert found.code is code
    assert found.fields == paths


def test_every_call_on_a_missing_collection_raises_not_found(channel: grpc.Channel) -> None:
    stub = index_pb2_grpc.IndexServiceStub(channel)
    for call, request in (
        (stub.GetCollection, index_pb2.GetCollectionRequest(name="none")),
        (stub.ReembedCollection, index_pb2.ReembedCollectionRequest(name="none", model="minilm")),
        (stub.CancelReembedding, index_pb2.CancelReembeddingRequest(name="none")),
        (stub.DeleteCollection, index_pb2.DeleteCollectionRequest(name="none")),
        (
            stub.UpsertRecords,
            index_pb2.UpsertRecordsRequest(collection="none", records=[index_pb2.Record(id="a", text="x")]),
        ),
        (stub.BatchGetRecords, index_pb2.BatchGetRecordsRequest(collection="none", ids=["a"])),
        (stub.DeleteRecords, index_pb2.DeleteRecordsRequest(collection="none", ids=["a"])),
        (stub.ListRecords, index_pb2.ListRecordsRequest(collection="none")),
        (stub.CountRecords, index_pb2.CountRecordsRequest(collection="none")),
        (stub.Search, index_pb2.SearchRequest(collection="none", queries=[index_pb2.SearchQuery(text="x")])),
    ):
        found = failure(call, request)
        assert found.code is grpc.StatusCode.NOT_FOUND
        assert found.reason == "COLLECTION_NOT_FOUND"


def test_a_collection_without_a_model_refuses_texts(channel: grpc.Channel) -> None:
    stub = index_pb2_grpc.IndexServiceStub(channel)
    search = index_pb2.SearchRequest(collection="plain", queries=[index_pb2.SearchQuery(text="x")])
    upsert = index_pb2.UpsertRecordsRequest(collection="plain", records=[index_pb2.Record(id="a", text="x")])
    for call, request in ((stub.Search, search), (stub.UpsertRecords, upsert)):
        found = failure(call, request)
        assert found.code is grpc.StatusCode.FAILED_PRECONDITION
        assert found.reason == "COLLECTION_WITHOUT_MODEL"


def test_invalid_page_sizes_and_tokens_are_refused(channel: grpc.Channel) -> None:
    index, models = index_pb2_grpc.IndexServiceStub(channel), model_pb2_grpc.ModelServiceStub(channel)
    for call, request in (
        (index.ListCollections, index_pb2.ListCollectionsRequest),
        (models.ListModels, model_pb2.ListModelsRequest),
        (index.ListRecords, lambda **fields: index_pb2.ListRecordsRequest(collection="errors", **fields)),
    ):
        assert failure(call, request(page_size=-1)).fields == ["page_size"]
        assert failure(call, request(page_size=1001)).fields == ["page_size"]
        assert failure(call, request(page_token="!?")).fields == ["page_token"]


def test_planned_rpcs_are_unimplemented_with_the_reason(channel: grpc.Channel) -> None:
    stub = classification_pb2_grpc.ClassificationServiceStub(channel)
    found = failure(stub.CreateClassifier, classification_pb2.CreateClassifierRequest())
    assert found.code is grpc.StatusCode.UNIMPLEMENTED
    assert "this version" in found.message


def test_a_valid_request_id_is_returned_and_an_invalid_one_replaced(channel: grpc.Channel) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    request = embedding_pb2.EmbedRequest(model="minilm", texts=[])
    for sent, kept in (("call-17", True), ("x" * 129, False), ("with space", False)):
        with pytest.raises(grpc.RpcError) as raised:
            stub.Embed(request, metadata=((status.REQUEST_ID_KEY, sent),))
        assert (Failure(raised.value).request_id == sent) is kept


def test_a_message_above_the_limit_is_refused(channel: grpc.Channel, server: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(
            embedding_pb2.EmbedRequest(model="minilm", texts=["x" * (65 * 2**20)])
        )
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
