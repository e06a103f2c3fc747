"""Callers that send much, read nothing or send nothing use a limited part of the server."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import closing

import grpc
import grpc.aio
import pytest

from emberpc.client import Client
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from examples.server_process import ServerProcess
from ping_proxy import PingProxy
from waiting import wait_until

#: Bytes of the text of the one record.
TEXT = 500_000
LIMIT = 4 * TEXT
REQUEST = pb.BatchGetRecordsRequest(collection="long", ids=["a", "a"])


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--max-in-flight-bytes", str(LIMIT), "--handshake-seconds", "1")
    with ServerProcess({}, tmp_path_factory.mktemp("data"), *options) as started:
        with Client(started.address) as client:
            client.create_collection("long", dimensions=2)
            client.upsert("long", [{"id": "a", "text": "x" * TEXT}], vectors=[[1.0, 0.0]])
        yield started


def test_unread_responses_are_limited(process: ServerProcess) -> None:
    """A caller that stops reading is refused further calls, and others are served again after it has left."""
    with PingProxy(process.address, 1) as proxy, grpc.insecure_channel(proxy.target) as silent:
        stub = index_pb2_grpc.IndexServiceStub(silent)
        assert len(stub.BatchGetRecords(REQUEST).records) == 2
        proxy.pause()
        unread = [stub.BatchGetRecords.future(REQUEST) for _ in range(20)]
        with grpc.insecure_channel(process.address) as channel:
            other = index_pb2_grpc.IndexServiceStub(channel)
            refused = wait_until(lambda: failure(other))
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_in_flight_bytes" in str(refused.details())
            # Small responses do not count.
            assert other.CountRecords(pb.CountRecordsRequest(collection="long")).count == 1
            proxy.cut()
            wait_until(lambda: failure(other) is None)
        for call in unread:
            call.cancel()


def failure(stub: index_pb2_grpc.IndexServiceStub) -> grpc.RpcError | None:
    try:
        stub.BatchGetRecords(REQUEST)
    except grpc.RpcError as error:
        return error
    return None


def test_a_silent_connection_is_closed(process: ServerProcess) -> None:
    host, _, port = process.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=300)) as connection:
        while connection.recv(1024):  # the server's own first frames
            pass


def test_the_server_states_its_limit_of_calls_of_a_connection(process: ServerProcess) -> None:
    """Without a limit, one connection that opens and resets calls makes gRPC cancel calls of other connections."""
    host, _, port = process.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection, connection.makefile("rb") as response:
        # The preface of HTTP/2 and an empty frame of settings (RFC 9113, sections 3.4 and 6.5).
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        head = response.read(9)
        payload = response.read(int.from_bytes(head[:3], "big"))
    assert head[3] == 4
    stated = dict(struct.unpack_from(">HI", payload, start) for start in range(0, len(payload), 6))
    max_concurrent_streams = 3
    assert stated[max_concurrent_streams] == 4096


async def test_no_call_of_300_callers_on_one_connection_is_lost(process: ServerProcess) -> None:
    """gRPC refuses calls above its limit for a connection, and even below it if callers send the next call at once."""
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)

        async def go_on() -> None:
            for _ in range(4):
                await stub.ListCollections(pb.ListCollectionsRequest())

        await asyncio.gather(*(go_on() for _ in range(300)))
