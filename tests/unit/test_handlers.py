"""Handling of calls: decoding in steps, counting of messages, and freeing of objects after errors."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock

import grpc
import grpc.aio
import pytest

from aio_server import channel_to
from emberpc.server import handlers
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.handlers import Handlers
from emberpc.server.in_flight import LARGE, BytesInFlight, Held, Streams
from emberpc.v1 import server_pb2, server_pb2_grpc
from waiting import Changes

METHOD = "/emberpc.v1.ServerService/GetServerInfo"


class Marker:
    """An object that a handler references, like its request."""


class Failing(server_pb2_grpc.ServerServiceServicer):
    """Raises an error that the frame of the handler references."""

    def __init__(self) -> None:
        self.markers: list[weakref.ref[Marker]] = []
        self.changes = Changes()

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        marker = Marker()
        self.markers.append(weakref.ref(marker, self.changes.notify))
        try:
            int("no number")
        except ValueError as cause:
            error = invalid("field", "is wrong")
            raise error from cause


@asynccontextmanager
async def served(servicer: Any, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    Handlers(server, **options).add(server_pb2_grpc.add_ServerServiceServicer_to_server, servicer)
    async with channel_to(server) as channel:
        yield channel


async def test_objects_of_a_failed_call_are_freed_without_garbage_collection() -> None:
    servicer = Failing()
    async with served(servicer) as channel:
        call: Any = channel.unary_unary(METHOD)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await call(b"")
                assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            # The task of the server for the last call may not have ended yet.
            await servicer.changes.until(lambda: all(marker() is None for marker in servicer.markers))
        finally:
            gc.enable()
    assert len(servicer.markers) == 5


async def test_other_calls_are_answered_while_a_request_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = asyncio.Event()

    def count(data: bytes, message: Any, limits: Any) -> Iterator[None]:
        while data and not going_on.is_set():
            yield

    monkeypatch.setattr(handlers, "count_elements", count)

    class Answering(server_pb2_grpc.ServerServiceServicer):
        async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            going_on.set()
            return server_pb2.GetServerInfoResponse()

    async with served(Answering()) as channel:
        call: Any = channel.unary_unary(METHOD)
        counted = asyncio.ensure_future(call(b"\xf8\x07\x01"))
        await call(b"")
        await counted


async def test_the_bytes_of_a_request_are_released_before_its_response() -> None:
    class Answering(server_pb2_grpc.ServerServiceServicer):
        async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            return server_pb2.GetServerInfoResponse(version="x" * LARGE)

    # Three quarters of the limit each. An unknown field makes the request large.
    async with served(Answering(), max_in_flight_bytes=LARGE * 4 // 3) as channel:
        call: Any = channel.unary_unary(METHOD)
        for _ in range(2):
            assert len(await call(b"\xfa\x07\x80\x80\x04" + bytes(LARGE))) > LARGE


@pytest.mark.parametrize("rounds", range(10))
async def test_a_cancelled_read_of_a_stream_loses_no_message(rounds: int) -> None:
    """The read is cancelled while it waits for the message, its turn, a step of decoding, or other calls."""

    def decode(data: bytes) -> Iterator[Any]:
        yield None
        yield None
        yield data

    async def messages() -> AsyncIterator[bytes]:
        for data in (b"first", b"second"):
            yield data

    stream = handlers._Decoded(messages(), decode, Held(BytesInFlight(100), Streams(1)))
    reading = asyncio.ensure_future(anext(stream))
    for _ in range(rounds):
        await asyncio.sleep(0)
    reading.cancel()
    try:
        read = [await reading]
    except asyncio.CancelledError:
        read = []
    assert read + [message async for message in stream] == [b"first", b"second"]


async def test_other_calls_are_served_between_the_messages_of_streams() -> None:
    """Streams with available messages do not decode all of them in one round of the event loop."""
    streams = Streams(20)

    async def messages() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x"

    def decode(data: bytes) -> Iterator[Any]:
        yield data

    decoded = 0

    async def read() -> None:
        nonlocal decoded
        async for _ in handlers._Decoded(messages(), decode, Held(BytesInFlight(100), streams)):
            decoded += 1

    readers = [asyncio.ensure_future(read()) for _ in range(20)]
    before, maximum = 0, 0
    while not all(reader.done() for reader in readers):
        await asyncio.sleep(0)
        maximum, before = max(maximum, decoded - before), decoded
    assert decoded == 100
    assert maximum <= 2


async def test_a_message_of_a_stream_is_counted_until_the_next_one_or_until_it_is_released() -> None:
    in_flight = BytesInFlight(10 * LARGE)

    async def messages() -> AsyncIterator[bytes]:
        for size in (1, 2, 3, 4, 9):
            yield b"x" * (size * LARGE)

    def decode(data: bytes) -> Iterator[Any]:
        yield data

    held = Held(in_flight, Streams(1))
    stream = handlers._Decoded(messages(), decode, held)
    counted, releases = [], []
    for hold in (False, True, False, True):
        await anext(stream)
        if hold:
            releases.append(stream.hold().release)
        counted.append(in_flight.total // LARGE)
    assert counted == [1, 2, 2 + 3, 2 + 4]
    releases[0]()
    assert in_flight.total == 4 * LARGE
    with pytest.raises(ServiceError, match="max_in_flight_bytes"):
        await anext(stream)
    held.release()
    assert in_flight.total == 0


async def test_the_log_has_an_internal_error_with_its_request_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = ServiceError(Code.INTERNAL, "the database of collection 'c' failed")
    error.__cause__ = sqlite3.OperationalError("disk I/O error")
    context = AsyncMock()
    with pytest.raises(AssertionError, match="abort always raises"):
        await handlers._abort(error, "/emberpc.v1.IndexService/Search", "0123abcd", context)
    assert context.abort.await_args.args[1].endswith("the server's log has more under request id 0123abcd")
    (record,) = caplog.records
    assert record.getMessage().endswith("Search failed, request 0123abcd: the database of collection 'c' failed")
    assert record.exc_info is not None
    assert record.exc_info[1] is error.__cause__
    caplog.clear()
    with pytest.raises(AssertionError, match="abort always raises"):
        await handlers._abort(ServiceError(Code.NOT_FOUND, "no collection"), "/x/Search", "0123abcd", context)
    assert caplog.records == []
