"""The gRPC calls of `Client`, with threads: start calls, wait for responses.

`_aio/transport.py` has the counterparts of these classes and functions for asyncio. Both files are written by hand.
`tools/generate_async_client.py` generates the other modules of `_aio`, except `__init__.py`, from those of `_sync`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from emberpc.client._core.connection import CALL_CANCELLED, CHANNEL_CLOSED, CLIENT_CLOSED, ConnectionSettings
from emberpc.client._core.rpc_call import Call
from emberpc.client._core.streams import Item, StreamState
from emberpc.client.exceptions import Cancelled, InputTypeError

#: Maximum seconds that `Transport.close` waits for gRPC to close a channel. Closing takes milliseconds, unless it
#: hangs.
_CLOSE_SECONDS = 2.0

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
#: An iterator over the items that a caller gave to a stream.
ItemIterator: TypeAlias = Iterator[Item]


class Transport:
    """The channel of a client, and the calls over this channel.

    Args:
        connection: target and settings of the channel.
        channel: the caller's channel; None: open a channel.

    Attributes:
        owns_channel: whether the client opened the channel itself. Only such a channel is closed by `close`, and only
            over such a channel the client retries calls. Streams are opened again over any channel.

    Raises:
        InputTypeError: `channel` is a channel of grpc.aio.
    """

    def __init__(self, connection: ConnectionSettings, channel: grpc.Channel | None) -> None:
        if isinstance(channel, grpc.aio.Channel):
            raise InputTypeError("channel is one of grpc.aio; give one of grpc, or use AsyncClient")
        self._connection = connection
        self._closed = threading.Event()
        self.owns_channel = channel is None
        self._channel = channel or _open(connection)

    def close(self) -> None:
        """Refuse further calls, and close the channel unless the caller gave it. May be called several times.

        Closing the channel cancels the calls in flight.
        """
        self._closed.set()
        if not self.owns_channel:
            return
        # If Ctrl-C interrupted gRPC while it started a call, closing the channel waits for that call for ever
        # (grpc/grpc#19973). So another thread closes the channel, and this thread waits a limited time.
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
            # gRPC raises ValueError for a closed channel. Either the caller closed its own channel, or another thread
            # has closed this client since the check above.
            raise Cancelled(CLIENT_CLOSED if self._closed.is_set() else CHANNEL_CLOSED) from error

    def response(self, started: Any) -> Any:
        """Wait for the response of a started call with one response, and return it.

        Raises:
            grpc.RpcError: the call failed, or the channel was closed.
            Cancelled: `cancel` of `started` was called.
        """
        try:
            return started.result()
        except grpc.FutureCancelledError as error:
            raise Cancelled(CALL_CANCELLED) from error

    def next_response(self, started: Any) -> Any:
        """Wait for the next response of a started call with several responses, and return it; None: the call ended.

        Raises:
            grpc.RpcError: the call failed or was cancelled, or the channel was closed.
        """
        return next(started, None)

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, or until the client is closed if that is earlier."""
        self._closed.wait(seconds)


class StreamConnection:
    """One gRPC call with a stream of requests and a stream of responses. The constructor starts the call.

    A thread of the client receives the responses, and a thread of gRPC sends the requests.

    Args:
        transport: the channel.
        call: the method of the stream.

    Raises:
        Cancelled: the client or the channel is closed.
    """

    def __init__(self, transport: Transport, call: Call[Any, Any]) -> None:
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._inbox: SimpleQueue[Message | grpc.RpcError | None] = SimpleQueue()
        self._finished = False
        self._call = transport.start("stream_stream", call, iter(self._outbox.get, None))
        threading.Thread(target=self._receive, name="emberpc-stream", daemon=True).start()

    @property
    def silent(self) -> bool:
        """Whether no response, error or end waits: `next_event` has returned everything that arrived."""
        return self._inbox.empty()

    def enqueue(self, requests: Iterable[Message]) -> None:
        """Queue requests; gRPC sends them in this order, each when the server accepts more data. Does not wait.

        Requests that are queued after `finish` are not sent.
        """
        for request in requests:
            self._outbox.put(request)

    def finish(self) -> None:
        """Tell the server, after the queued requests, that no further requests follow. May be called several times."""
        if not self._finished:
            self._finished = True
            self._outbox.put(None)

    def next_event(self, timeout: float) -> Message | grpc.RpcError | None:
        """Wait for the next response and return it; return the error that ended the stream, or None at a normal end.

        Raises:
            TimeoutError: nothing arrived within `timeout` seconds, or the end was returned before.
        """
        try:
            return self._inbox.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None

    def close(self) -> None:
        """Cancel the stream unless it has ended. May be called several times."""
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
    """Return an iterator over the items that a caller gave to a stream.

    Raises:
        InputTypeError: the items are an asynchronous iterable.
    """
    if not isinstance(items, Iterable):
        raise InputTypeError(
            f"the items of the stream are of type {type(items).__name__}, which only AsyncClient reads; give a list or "
            "another iterable"
        )
    return iter(items)


def read_items(state: StreamState[Item, Any, Any, Any], items: ItemIterator[Item]) -> None:
    """Read items of the caller and add them to `state`, until `state.read_enough` is true.

    At the end of the items, `state.exhausted` is set. Raises what the iterator raises; and InputTypeError if an
    item of a stream of texts has the wrong type.
    """
    while not state.read_enough:
        try:
            item = next(items)
        except StopIteration:
            state.exhausted = True
        else:
            state.add(item)


def run_blocking(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call a function that may wait for a disk, and return its result; raise what the function raises.

    Here the function runs in the caller's own thread. `AsyncClient` has a coroutine of the same name, which calls the
    function in another thread, so that the event loop does not wait.
    """
    return function(*args, **kwargs)


def _open(connection: ConnectionSettings) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.target, connection.options)
    return grpc.secure_channel(connection.target, connection.tls.credentials(), connection.options)
