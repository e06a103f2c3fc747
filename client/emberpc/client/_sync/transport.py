"""gRPC for `Client`: start calls, wait for responses, with threads.

`_aio/transport.py` has the same classes and functions for asyncio. Both files are written by hand. The modules that
use them are written only for `_sync`; `tools/generate_async_client.py` generates those of `_aio`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from emberpc.client._core.calls import Call
from emberpc.client._core.connection import CALL_CANCELLED, CHANNEL_CLOSED, CLIENT_CLOSED, Connection
from emberpc.client._core.streams import Item, StreamJob
from emberpc.client.exceptions import Cancelled, InputTypeError

#: Seconds to wait for gRPC to close a channel, which takes milliseconds.
_CLOSE_SECONDS = 2.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
#: An iterator over a caller's items.
ItemIterator: TypeAlias = Iterator[Item]


class Transport:
    """The channel of a client.

    Args:
        connection: target and settings of the channel.
        channel: the caller's channel; None: open a channel.

    Attributes:
        owns_channel: whether the client opened the channel, and may retry calls over it.

    Raises:
        InputTypeError: `channel` is a channel of grpc.aio.
    """

    def __init__(self, connection: Connection, channel: grpc.Channel | None) -> None:
        if isinstance(channel, grpc.aio.Channel):
            raise InputTypeError("channel is one of grpc.aio; give one of grpc, or use AsyncClient")
        self._connection = connection
        self._closed = threading.Event()
        self.owns_channel = channel is None
        self._channel = channel or _open(connection)

    def close(self) -> None:
        """Refuse further calls, and close the channel unless it is the caller's. May be called several times."""
        self._closed.set()
        if not self.owns_channel:
            return
        # If Ctrl-C interrupts gRPC while it starts a call, `close` waits for that call for ever (grpc/grpc#19973).
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def start(
        self, kind: str, call: Call[Any, Any], request: Message | Iterator[Message], timeout: float | None = None
    ) -> Any:
        """Start a call and return gRPC's object for it.

        Args:
            kind: gRPC's name for the kind of method, such as `unary_stream`.
            call: the method, and the type of its requests.
            request: the request, or an iterator of requests, which gRPC reads in another thread.
            timeout: seconds until gRPC ends the call; None: no deadline.

        Raises:
            Cancelled: the client or the channel is closed.
        """
        if self._closed.is_set():
            raise Cancelled(CLIENT_CLOSED)
        method = getattr(self._channel, kind)(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        start = method if kind.endswith("_stream") else method.future
        try:
            return start(request, timeout=timeout, metadata=self._connection.metadata)
        except ValueError as error:
            # gRPC raises ValueError for a closed channel: the caller's, or one that another thread has just closed.
            raise Cancelled(CLIENT_CLOSED if self._closed.is_set() else CHANNEL_CLOSED) from error

    def response(self, started: Any) -> Any:
        """Return the response of a started call that has one response.

        Raises:
            grpc.RpcError: the call failed.
            Cancelled: the client was closed.
        """
        try:
            return started.result()
        except grpc.FutureCancelledError as error:
            raise Cancelled(CALL_CANCELLED) from error

    def next_response(self, started: Any) -> Any:
        """Return the next response of a started call that has several; None at its end.

        Raises:
            grpc.RpcError: the call failed, or the client was closed.
        """
        return next(started, None)

    def sleep(self, seconds: float) -> None:
        """Wait, at most until the client is closed."""
        self._closed.wait(seconds)


class StreamConnection:
    """A bidirectional stream over a channel.

    A thread receives the responses. gRPC sends the requests in a thread of its own.

    Args:
        transport: the channel.
        call: the method of the stream.
    """

    def __init__(self, transport: Transport, call: Call[Any, Any]) -> None:
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._inbox: SimpleQueue[Message | grpc.RpcError | None] = SimpleQueue()
        self._finished = False
        self._call = transport.start("stream_stream", call, iter(self._outbox.get, None))
        threading.Thread(target=self._receive, name="emberpc-stream", daemon=True).start()

    @property
    def silent(self) -> bool:
        """Whether every response that arrived was taken."""
        return self._inbox.empty()

    def enqueue(self, requests: Iterable[Message]) -> None:
        """Hand over requests to be sent as soon as the server accepts them."""
        for request in requests:
            self._outbox.put(request)

    def finish(self) -> None:
        """State that no further requests follow. May be called several times."""
        if not self._finished:
            self._finished = True
            self._outbox.put(None)

    def next_event(self, timeout: float) -> Message | grpc.RpcError | None:
        """Return the next response, the error that ended the stream, or None at its end.

        Raises:
            TimeoutError: nothing arrived within `timeout` seconds.
        """
        try:
            return self._inbox.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None

    def close(self) -> None:
        """Cancel the stream unless it has ended."""
        self._call.cancel()
        self.finish()

    def _receive(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
        except grpc.RpcError as error:
            self._inbox.put(error)
        else:
            self._inbox.put(None)


def item_iterator(items: Iterable[Item]) -> ItemIterator[Item]:
    """Return an iterator over a caller's items."""
    return iter(items)


def read_items(job: StreamJob[Item, Any, Any, Any], items: ItemIterator[Item]) -> None:
    """Read items for one request of a stream, in the caller's thread."""
    while not job.read_enough:
        try:
            item = next(items)
        except StopIteration:
            job.exhausted = True
        else:
            job.add(item)


def run_blocking(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call a function that waits for a disk; here in the caller's thread."""
    return function(*args, **kwargs)


def _open(connection: Connection) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.target, connection.options)
    return grpc.secure_channel(connection.target, connection.tls.credentials(), connection.options)
