"""EmbedStream of a server: every text is answered once, and an invalid one fails alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import Client
from emberpc.client.types import DType
from emberpc.server.errors import Code
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc, errors_pb2, types_pb2
from emberpc.wire import status
from examples.server_process import ServerProcess
from stream_helpers import LETTERS, Answers, messages, texts_of

#: A text with more tokens than the tiny model takes.
LONG = " ".join(LETTERS * 2)


@pytest.fixture(scope="module")
def tiny_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the tiny model with a limit of 1000 bytes for a text."""
    process = ServerProcess({"tiny": tiny_bundle}, tmp_path_factory.mktemp("data"), "--max-text-bytes", "1000")
    yield process
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.fixture(scope="module")
def stub(tiny_server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(tiny_server.address) as channel:
        yield embedding_pb2_grpc.EmbeddingServiceStub(channel)


@pytest.mark.parametrize("size", [1, 7, 500])
def test_every_text_is_answered_once_with_any_size_of_messages(
    tiny_server: ServerProcess, stub: Any, size: int
) -> None:
    texts = texts_of(500)
    with Client(tiny_server.address) as client:
        expected = client.embed(texts)
        tokens = client.count_tokens(texts)
    answers = Answers(stub.EmbedStream(messages(((f"text-{i}", text) for i, text in enumerate(texts)), size)))
    assert answers.times == Counter({f"text-{i}": 1 for i in range(500)})
    assert not answers.failures
    got = np.stack([answers.vectors[f"text-{i}"] for i in range(500)])
    assert np.abs(got - expected).max() < 1e-5
    assert [answers.usages[f"text-{i}"].tokens for i in range(500)] == tokens
    assert [response.HasField("model") for response in answers.responses] == [
        True,
        *[False] * (len(answers.responses) - 1),
    ]
    assert answers.responses[0].model.name == "tiny"
    assert len(answers.responses[0].model.fingerprint) == 64


BAD_TEXTS = {"empty": "", "blank": " \n", "long": LONG, "large": "x" * 1001}


def test_an_invalid_text_fails_alone_with_the_error_of_a_unary_call(tiny_server: ServerProcess, stub: Any) -> None:
    items = [(f"good-{i}", text) for i, text in enumerate(texts_of(100))]
    for i, (key, text) in enumerate(BAD_TEXTS.items()):
        items.insert(20 * i + 3, (key, text))
    answers = Answers(stub.EmbedStream(messages([*items, ("", "no id")], 30)))
    assert set(answers.vectors) == {f"good-{i}" for i in range(100)}
    assert set(answers.failures) == {*BAD_TEXTS, ""}
    assert set(answers.times.values()) == {1}
    for key, text in BAD_TEXTS.items():
        error = answers.failures[key]
        with pytest.raises(grpc.RpcError) as unary:
            stub.Embed(pb.EmbedRequest(texts=[text]))
        assert isinstance(unary.value, grpc.Call)
        assert error.code == unary.value.code().value[0] == Code.INVALID_ARGUMENT.value
        assert error.message.removeprefix("text") == str(unary.value.details()).removeprefix("texts[0]")
        bad_request = status.detail(error, errors_pb2.BadRequest)
        assert bad_request is not None
        assert [violation.field for violation in bad_request.field_violations] == ["text"]
        info = status.detail(error, errors_pb2.ErrorInfo)
        assert info is not None
        assert info.reason == "INVALID_FIELD"
        request_info = status.detail(error, errors_pb2.RequestInfo)
        assert request_info is not None
        assert request_info.request_id
    assert answers.failures[""].message.startswith("id is empty")


def test_over_long_texts_are_truncated_if_configured(stub: Any) -> None:
    config = pb.EmbedStreamConfig(truncation=types_pb2.TRUNCATION_END)
    answers = Answers(stub.EmbedStream(messages([("long", LONG), ("short", "a")], 2, config)))
    assert (answers.usages["long"].tokens, answers.usages["long"].truncated) == (32, True)
    assert (answers.usages["short"].tokens, answers.usages["short"].truncated) == (3, False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_vectors_of_all_element_types_equal_those_of_a_unary_call(
    tiny_server: ServerProcess, stub: Any, dtype: DType
) -> None:
    texts = texts_of(30)
    config = pb.EmbedStreamConfig(dtype=types_pb2.DataType.Value(f"DATA_TYPE_{dtype.upper()}"), normalize=True)
    answers = Answers(stub.EmbedStream(messages(((str(i), text) for i, text in enumerate(texts)), 30, config)))
    with Client(tiny_server.address) as client:
        expected = client.embed(texts, dtype=dtype, normalize=True)
    got = np.stack([answers.vectors[str(i)] for i in range(30)])
    # Another batch gives other rounding errors, which can change the sign of a value near zero.
    assert np.abs(got - expected).max() < 5e-3 or (dtype == "binary" and (got != expected).mean() < 0.01)


def test_any_ids_are_returned_unchanged(stub: Any) -> None:
    ids = ["ключ", "🦊/٣", "a\x00b", " ", "x" * 5000, "e\u0301", "é"]
    answers = Answers(stub.EmbedStream(messages(((key, "a b") for key in ids), 3)))
    assert set(answers.vectors) == set(ids)


def test_texts_with_equal_ids_are_all_answered(stub: Any) -> None:
    answers = Answers(stub.EmbedStream(messages([("same", "a"), ("same", "b"), ("same", "")], 3)))
    assert answers.times == {"same": 3}


def test_a_stream_without_texts_states_its_model(stub: Any) -> None:
    (response,) = stub.EmbedStream(messages([], 1))
    assert response.model.name == "tiny"


ITEM = pb.EmbedStreamItem(id="a", text="a")
CONFIG = pb.EmbedStreamConfig()
WRONG: list[tuple[list[pb.EmbedStreamRequest], grpc.StatusCode, list[str]]] = [
    ([], grpc.StatusCode.INVALID_ARGUMENT, ["config"]),
    ([pb.EmbedStreamRequest(items=[ITEM])], grpc.StatusCode.INVALID_ARGUMENT, ["config"]),
    (
        [pb.EmbedStreamRequest(config=CONFIG, items=[ITEM]), pb.EmbedStreamRequest(config=CONFIG)],
        grpc.StatusCode.INVALID_ARGUMENT,
        ["config"],
    ),
    (
        [pb.EmbedStreamRequest(config=pb.EmbedStreamConfig(dimensions=7))],
        grpc.StatusCode.INVALID_ARGUMENT,
        ["config.dimensions"],
    ),
    (
        [pb.EmbedStreamRequest(config=pb.EmbedStreamConfig(dtype=77))],  # type: ignore[arg-type]  # that is the case
        grpc.StatusCode.INVALID_ARGUMENT,
        ["config.dtype"],
    ),
    (
        [pb.EmbedStreamRequest(config=pb.EmbedStreamConfig(priority=77))],  # type: ignore[arg-type]
        grpc.StatusCode.INVALID_ARGUMENT,
        ["config.priority"],
    ),
    ([pb.EmbedStreamRequest(config=pb.EmbedStreamConfig(model="none"))], grpc.StatusCode.NOT_FOUND, []),
    ([pb.EmbedStreamRequest(config=CONFIG, items=[ITEM] * 4097)], grpc.StatusCode.INVALID_ARGUMENT, ["items"]),
]


@pytest.mark.parametrize(("requests", "code", "fields"), WRONG)
def test_an_invalid_stream_is_ended_with_the_reason(
    stub: Any, requests: list[pb.EmbedStreamRequest], code: grpc.StatusCode, fields: list[str]
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.EmbedStream(iter(requests)))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is code
    packed = dict(raised.value.trailing_metadata())[status.DETAILS_KEY]
    assert isinstance(packed, bytes)
    bad_request = status.detail(status.unpack(packed), errors_pb2.BadRequest)
    assert [violation.field for violation in bad_request.field_violations] == fields if bad_request else not fields
