"""Callers who send much, read nothing or say nothing take a bounded part of the server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from emberpc.client import Client
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from examples.server_process import ServerProcess
from ping_proxy import PingProxy

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


def test_responses_that_nobody_reads_are_bounded(process: ServerProcess) -> None:
    """A caller who stops reading is refused more, and others are served again when it has gone."""
    with PingProxy(process.address, 1) as proxy, grpc.insecure_channel(proxy.target) as silent:
        stub = index_pb2_grpc.IndexServiceStub(silent)
        assert len(stub.BatchGetRecords(REQUEST).records) == 2
        proxy.pause()
        unread = [stub.BatchGetRecords.future(REQUEST) for _ in range(20)]
        with grpc.insecure_channel(process.address) as channel:
            other = index_pb2_grpc.IndexServiceStub(channel)
            refused = wait_until(lambda: failure(other))
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_in_flight_bytes" in refused.details()
            # Small responses need no room.
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


def wait_until(look: Callable[[], Any]) -> Any:
    """Return the first true outcome of a function."""
    deadline = time.monotonic() + 300
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_a_connection_that_says_nothing_is_closed(process: ServerProcess) -> None:
    host, _, port = process.address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=300)) as connection:
        while connection.recv(1024):  # the server's own first frames
            pass


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """Return a frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + data


def header(name: str, value: str) -> bytes:
    """Return a header field, a literal without indexing (RFC 7541, section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


CALL = b"".join(
    header(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
)


def test_calls_that_are_reset_at_once_cancel_no_call_of_others(process: ServerProcess) -> None:
    host, _, port = process.address.rpartition(":")
    headers, reset, cancel = 1, 3, (8).to_bytes(4, "big")
    begun, done = threading.Event(), threading.Event()

    def flood() -> None:
        while not done.is_set():
            with suppress(OSError), socket.create_connection((host, int(port))) as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
                for first in range(1, 40_000, 400):
                    calls = range(first, first + 400, 2)
                    connection.sendall(b"".join(frame(headers, 4, i, CALL) + frame(reset, 0, i, cancel) for i in calls))
                    begun.set()
                    if done.is_set():
                        return

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert begun.wait(60)
        with grpc.insecure_channel(process.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for _ in range(60):
                stub.Check(health_pb2.HealthCheckRequest(), timeout=300)
    finally:
        done.set()
        flooding.join()
