"""Requests that cannot be decoded are refused as INVALID_ARGUMENT with a request id, without an exception's text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from emberpc.client._core.connection import ConnectionSettings
from emberpc.server.app import _KEEPALIVE
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc, errors_pb2, filter_pb2, index_pb2
from emberpc.wire import status
from examples.server_process import ServerProcess


def nested(levels: int) -> bytes:
    """Return a CountRecordsRequest whose filter has `levels` nested negations."""
    number = filter_pb2.Filter.DESCRIPTOR.fields_by_name["not"].number
    inner = b""
    for _ in range(levels):
        inner = bytes([number << 3 | 2]) + _varint(len(inner)) + inner
    field = index_pb2.CountRecordsRequest.DESCRIPTOR.fields_by_name["filter"].number
    return bytes([field << 3 | 2]) + _varint(len(inner)) + inner


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


_BAD = {
    "cut off": ("EmbeddingService/Embed", b"\x0a\x7f"),
    "no protobuf": ("ModelService/ListModels", b"\xff" * 40),
    "bad UTF-8": ("IndexService/GetCollection", b"\x0a\x02\xff\xfe"),
    "nested too deeply": ("IndexService/CountRecords", nested(300)),
    "classification": ("ClassificationService/Classify", b"\x0a\x7f"),
}


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def check(raised: grpc.RpcError, name: str) -> None:
    assert isinstance(raised, grpc.Call)
    assert raised.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"a request of {name} cannot be decoded" in raised.details()
    trailing = dict(raised.trailing_metadata())
    assert trailing[status.REQUEST_ID_KEY]
    info = status.detail(status.unpack(trailing[status.DETAILS_KEY]), errors_pb2.ErrorInfo)
    assert info is not None
    assert info.reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize("kind", _BAD)
def test_a_malformed_request_is_refused(server: ServerProcess, channel: grpc.Channel, kind: str) -> None:
    method, data = _BAD[kind]
    call: Any = channel.unary_unary(f"/emberpc.v1.{method}")
    with pytest.raises(grpc.RpcError) as raised:
        call(data, timeout=300)
    check(raised.value, method.partition("/")[2])
    assert "Traceback" not in server.output


@pytest.mark.parametrize("name", ["UpsertRecordsStream", "RestoreCollection"])
def test_a_malformed_message_of_a_stream_is_refused(server: ServerProcess, channel: grpc.Channel, name: str) -> None:
    open_stream: Any = channel.stream_stream(f"/emberpc.v1.IndexService/{name}")
    with pytest.raises(grpc.RpcError) as raised:
        list(open_stream(iter([b"\x0a\x7f"]), timeout=300))
    check(raised.value, name)
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    "name",
    ["health.v1.Health/Check", "health.v1.Health/Watch", "reflection.v1alpha.ServerReflection/ServerReflectionInfo"],
)
@pytest.mark.parametrize("data", [b"\x0a\x7f", b"\x0a\x02\xff\xfe", b"\xff" * 40])
def test_a_malformed_request_to_a_service_of_grpc_is_refused(
    server: ServerProcess, channel: grpc.Channel, name: str, data: bytes
) -> None:
    open_stream: Any = channel.stream_stream(f"/grpc.{name}")
    with pytest.raises(grpc.RpcError) as raised:
        list(open_stream(iter([data]), timeout=300))
    check(raised.value, name.partition("/")[2])
    assert "Traceback" not in server.output


def test_valid_requests_to_services_of_grpc_are_answered(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=300).status == serving
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="emberpc.v1.IndexService"), timeout=300)
    assert next(watch).status == serving
    watch.cancel()
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(health_pb2.HealthCheckRequest(service="none"), timeout=300)
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert status.REQUEST_ID_KEY in dict(raised.value.trailing_metadata())
    info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")] * 2
    for response in info(iter(requests), timeout=300):
        names = {service.name for service in response.list_services_response.service}
        assert {"emberpc.v1.IndexService", "grpc.health.v1.Health"} <= names


def test_a_request_with_many_invalid_items_is_an_invalid_argument(channel: grpc.Channel) -> None:
    request = embedding_pb2.EmbedRequest(model="minilm", texts=[" "] * 400)
    with pytest.raises(grpc.RpcError) as raised:
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(request, timeout=300)
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "(and 399 more)" in str(raised.value.details())


def test_the_error_for_a_very_long_model_name_reaches_the_caller(channel: grpc.Channel) -> None:
    request = embedding_pb2.EmbedRequest(model="é" * 100_000, texts=["a"])
    with pytest.raises(grpc.RpcError) as raised:
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(request, timeout=300)
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_server_accepts_the_ping_interval_of_the_client() -> None:
    connection = ConnectionSettings("localhost:50051", timeout=1, tls=None, token=None, in_flight=1, own_channel=False)
    client, server = dict(connection.options), dict(_KEEPALIVE)
    assert int(client["grpc.keepalive_time_ms"]) >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]
