"""The gRPC calls of `AsyncClient`, with tasks of an event loop: start calls, wait for responses.

`_sync/transport.py` has the same classes and functions for threads, and documents what both have in common.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from emberpc.client._core.connection import CALL_CANCELLED, CHANNEL_CLOSED, CLIENT_CLOSED, ConnectionSettings
from emberpc.client._core.rpc_call import Call
from emberpc.client._core.streams import Item, StreamState
from emberpc.client.exceptions import Cancelled, FailedPrecondition, InputTypeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
#: An iterator over the items that a caller gave to a stream, asynchronous or not.
ItemIterator: TypeAlias = Iterator[Item] | AsyncIterator[Item]


class AsyncTransport:
    """The channel of a client.

    Args:
        connection: target and settings of the channel.
        channel: the caller's channel; None: open a channel at the first call, in the event loop that makes this call.

    Attributes:
        owns_channel: whether the client opens the channel, and may retry calls over it.

    Raises:
        InputTypeError: `channel` is a channel of grpc, not of grpc.aio.
    """

    def __init__(self, connection: ConnectionSettings, channel: grpc.aio.Channel | None) -> None:
        if isinstance(channel, grpc.Channel):
            raise InputTypeError("channel is one of grpc; give one of grpc.aio, or use Client")
        self._connection = connection
        self._closed = False
        self.owns_channel = channel is None
        self._channel = channel
        #: The event loop that the client's own channel belongs to.
        self._loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Refuse further calls, and close the channel unless the caller gave it. May be called several times."""
        self._closed = True
        channel = self._channel
        if not self.owns_channel or channel is None or self._loop is None:
            return
        self._channel = None
        if self._loop is asyncio.get_running_loop():
            await channel.close()
        elif self._loop.is_running():
            # Not awaited: the other loop may stop at any time.
            asyncio.run_coroutine_threadsafe(channel.close(), self._loop)

    def start(
        self, kind: str, call: Call[Any, Any], request: Message | AsyncIterator[Message], timeout: float | None = None
    ) -> Any:
        """Start a call and return gRPC's object for it.

        Args:
            kind: gRPC's name for the kind of method, such as `unary_stream`.
            call: the method, and the type of its requests.
            request: the request, or an iterator of requests.
            timeout: seconds until gRPC ends the call; None: no deadline.

        Raises:
            Cancelled: the client or the channel is closed.
            FailedPrecondition: the client is in use in another event loop.
        """
        if self._closed:
            raise Cancelled(CLIENT_CLOSED)
        method = getattr(self._opened(), kind)(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        try:
            return method(request, timeout=timeout, metadata=self._connection.metadata)
        except grpc.aio.UsageError as error:
            raise Cancelled(CHANNEL_CLOSED) from error

    async def response(self, started: Any) -> Any:
        """Return the response of a started call that has one response.

        Raises:
            grpc.RpcError: the call failed.
            Cancelled: the client was closed.
        """
        with self._cancelled_by_close():
            return await started

    async def next_response(self, started: Any) -> Any:
        """Return the next response of a started call that has several; None at its end.

        Raises:
            grpc.RpcError: the call failed.
            Cancelled: the client was closed.
        """
        with self._cancelled_by_close():
            # gRPC returns the same iterator each time.
            return await anext(aiter(started), None)

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""
        await asyncio.sleep(seconds)

    @contextmanager
    def _cancelled_by_close(self) -> Iterator[None]:
        """Raise Cancelled instead of a CancelledError that `close` caused."""
        try:
            yield
        except asyncio.CancelledError as error:
            # gRPC raises CancelledError also when the channel is closed. Python 3.10 does not state whether the task
            # was cancelled; then the error counts as caused by `close` if the client is closed.
            cancelling = getattr(asyncio.current_task(), "cancelling", lambda: not self._closed)
            if cancelling():
                raise
            raise Cancelled(CALL_CANCELLED) from error

    def _opened(self) -> grpc.aio.Channel:
        if self._channel is not None and not self.owns_channel:
            return self._channel
        running = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not running and not self._loop.is_closed():
            raise FailedPrecondition(
                "this AsyncClient was used in another event loop, which is still open; make one client for each loop"
            )
        if self._channel is None or self._loop is not running:
            self._channel = _open(self._connection)
            self._loop = running
        return self._channel


class AsyncStreamConnection:
    """A bidirectional stream over a channel.

    A task receives the responses, and gRPC sends the requests in another task.

    Args:
        transport: the channel.
        call: the method of the stream.
    """

    def __init__(self, transport: AsyncTransport, call: Call[Any, Any]) -> None:
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._inbox: asyncio.Queue[Message | grpc.RpcError | Cancelled | None] = asyncio.Queue()
        self._finished = False
        self._call = transport.start("stream_stream", call, self._requests())
        self._receiving = asyncio.create_task(self._receive())

    @property
    def silent(self) -> bool:
        """Whether no response or error waits: `next_event` has returned everything that arrived."""
        return self._inbox.empty()

    def enqueue(self, requests: Iterable[Message]) -> None:
        """Queue requests; gRPC sends them in this order, each when the server accepts more data. Does not wait."""
        for request in requests:
            self._outbox.put_nowait(request)

    def finish(self) -> None:
        """Tell the server, after the queued requests, that no further requests follow. May be called several times."""
        if not self._finished:
            self._finished = True
            self._outbox.put_nowait(None)

    async def next_event(self, timeout: float) -> Message | grpc.RpcError | None:
        """Wait for the next response and return it; return the error that ended the stream, or None at a normal end.

        Raises:
            TimeoutError: nothing arrived within `timeout` seconds.
            Cancelled: the client was closed.
        """
        try:
            event = await asyncio.wait_for(self._inbox.get(), timeout)
        except asyncio.TimeoutError:  # in Python 3.10 not the built-in one
            raise TimeoutError from None
        if isinstance(event, Cancelled):
            raise event
        return event

    async def close(self) -> None:
        """Cancel the stream unless it has ended."""
        self._call.cancel()
        self.finish()
        self._receiving.cancel()
        await asyncio.wait([self._receiving])

    async def _requests(self) -> AsyncIterator[Message]:
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _receive(self) -> None:
        try:
            async for response in self._call:
                self._inbox.put_nowait(response)
        except grpc.aio.AioRpcError as error:
            self._inbox.put_nowait(error)
        except asyncio.CancelledError:
            # gRPC raises it when the channel is closed.
            self._inbox.put_nowait(Cancelled(CALL_CANCELLED))
            raise
        else:
            self._inbox.put_nowait(None)


def item_iterator(items: Iterable[Item] | AsyncIterable[Item]) -> ItemIterator[Item]:
    """Return an iterator over the items that a caller gave to a stream."""
    return aiter(items) if isinstance(items, AsyncIterable) else iter(items)


async def read_items(state: StreamState[Item, Any, Any, Any], items: ItemIterator[Item]) -> None:
    """Read items of the caller and add them to `state`, until a request is full, a limit is reached or none is left."""
    while not state.read_enough:
        try:
            item = await anext(items) if isinstance(items, AsyncIterator) else next(items)
        except (StopIteration, StopAsyncIteration):
            state.exhausted = True
        else:
            state.add(item)


async def run_blocking(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call a function that may wait for a disk in another thread, and return its result."""
    return await asyncio.to_thread(function, *args, **kwargs)


def _open(connection: ConnectionSettings) -> grpc.aio.Channel:
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.target, connection.options)
    return grpc.aio.secure_channel(connection.target, connection.tls.credentials(), connection.options)
