"""Wrap the handlers of all methods: assign a request id, decode the request, count its bytes, and report errors.

The methods of gRPC's own services (health and reflection) are wrapped too.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import count
from time import perf_counter
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from emberpc.server import descriptors
from emberpc.server.element_counts import count_elements
from emberpc.server.errors import Code, ServiceError
from emberpc.server.in_flight import LARGE, BytesInFlight, Held, HeldMessage, Streams
from emberpc.server.statuses import status_of
from emberpc.wire import status

log = logging.getLogger(__name__)

_STATUS_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
#: Pattern of the request ids that are accepted from callers: 1 to 128 printable ASCII characters. They are logged and
#: sent back, so spaces and control characters are not allowed.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
#: The two parts of a new request id: a random number of this process, and a counter. A random number for each call
#: would need a system call, which releases the interpreter's lock.
_PROCESS, _numbers = secrets.token_hex(8), count()

Context = grpc.aio.ServicerContext[Any, Any]
Observe = Callable[[str, str, float], None]
#: Type of a function that decodes the request of a call: to a message, or for a stream to an iterator over messages.
_Read = Callable[[Any, Held], Awaitable[Any]]
Service = TypeVar("Service")


class Handlers:
    """Registers services with a gRPC server, with wrapped methods.

    Each call gets a request id. An exception that a handler raises becomes a gRPC status with details: the status of a
    `ServiceError`, UNIMPLEMENTED for NotImplementedError (a method that the service does not implement),
    RESOURCE_EXHAUSTED for an OSError which says that no file descriptor is free, and INTERNAL for any other exception,
    whose text the caller does not receive. The last two are logged with the request id, and so is a `ServiceError` with
    INTERNAL. A cancellation, and the AbortError of one of gRPC's own services, stay as they are.

    Handlers are wrapped once, when they are registered. An interceptor would wrap them again for each call, which takes
    a tenth of the event loop's time for a short call.

    Requests are decoded here, not by gRPC: gRPC answers a request that cannot be decoded with UNKNOWN and Python's
    exception text, without a request id.

    Args:
        server: the gRPC server.
        observe: called at the end of each call with the path of the method, the name of the status code, and the
            duration in seconds. None: no function is called.
        counts: maximum number of elements of the repeated fields of a request, by field name; `count_elements` has
            further limits. Requests of 64 KiB or more are checked before they are decoded; above a limit,
            INVALID_ARGUMENT.
        max_in_flight_bytes: limit of `BytesInFlight`; responses of a stream do not count. A call that would exceed the
            limit fails with RESOURCE_EXHAUSTED.
        max_streams: limit of the open request streams. Further streams fail with RESOURCE_EXHAUSTED.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        observe: Observe | None = None,
        counts: Mapping[str, int] = MappingProxyType({}),
        max_in_flight_bytes: int = 96 * 2**20,
        max_streams: int = 64,
    ) -> None:
        self._server = server
        self._observe = observe or (lambda _method, _code, _seconds: None)
        self._counts = counts
        self._in_flight = BytesInFlight(max_in_flight_bytes)
        self._streams = Streams(max_streams)
        self._turn = asyncio.Lock()

    def add(self, add_to_server: Callable[[Service, Any], None], service: Service) -> None:
        """Register a service.

        Args:
            add_to_server: the generated `add_…Servicer_to_server`; it receives this object in place of a server.
            service: the implementation of the service.
        """
        add_to_server(service, self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Do nothing. Generated code also passes the same methods to `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, methods: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Wrap `methods`, gRPC's handlers by name, and register them with the server; generated code calls this."""
        wrapped = {name: self._wrap(f"/{service}/{name}", handler) for name, handler in methods.items()}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, wrapped)])

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        wrap = self._stream if handler.response_streaming else self._unary
        read = _reader(handler, method, self._counts, self._turn)
        wrapped: grpc.RpcMethodHandler[Any, Any] = wrap(handler, method, read)
        return wrapped

    def _unary(self, handler: Any, method: str, read: _Read) -> Any:
        """Wrap `handler`, gRPC's handler from the generated code, of a method with one response; see `Handlers`."""
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        if not inspect.iscoroutinefunction(inner):
            inner = _as_coroutine(inner)
        #: Serializes the response. A method that returns serialized bytes has no serializer.
        serialize = handler.response_serializer or (lambda response: response)

        async def answer(request: Any, context: Context) -> bytes:
            serialized: bytes = serialize(await inner(request, context))
            return serialized

        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(self._awaited(answer, method, read), None, None)

    def _stream(self, handler: Any, method: str, read: _Read) -> Any:
        """Wrap `handler`, gRPC's handler from the generated code, of a method with a stream; see `Handlers`."""
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        wrap = self._awaited if inspect.iscoroutinefunction(inner) else self._iterated
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(wrap(inner, method, read), None, handler.response_serializer)

    def _awaited(self, inner: Any, method: str, read: _Read) -> Any:
        """Return a coroutine function that decodes a request with `read`, awaits `inner`, and ends the `_Call`."""

        async def handle(request: Any, context: Context) -> Any:
            call = self._begin(method, context)
            try:
                decoded = await read(request, call.held)
                del request  # the bytes are not kept beside the message
                response = await inner(decoded, context)
                del decoded  # a large request and its large response need not fit together
                call.held.release()
                self._count(response, context)
            except BaseException as error:
                await call.fail(error)
                raise
            call.end("OK")
            return response

        return handle

    def _iterated(self, inner: Any, method: str, read: _Read) -> Any:
        """Return an asynchronous generator function: as `_awaited`, but it yields the responses that `inner` yields."""

        async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
            call = self._begin(method, context)
            try:
                decoded = await read(request, call.held)
                del request  # the bytes are not kept beside the message
                # If this generator is closed, `aclosing` closes the inner one too, which stops its work in progress.
                async with aclosing(inner(decoded, context)) as answers:
                    async for answer in answers:
                        yield answer
            except BaseException as error:
                await call.fail(error)
                raise
            call.end("OK")

        return handle

    def _begin(self, method: str, context: Context) -> _Call:
        return _Call(method, context, Held(self._in_flight, self._streams), self._observe)

    def _count(self, response: bytes | None, context: Context) -> None:
        """Count a serialized response of 64 KiB or more until the caller has read it or left.

        RESOURCE_EXHAUSTED if too many bytes are in flight. `response` is None if the method has sent a stream itself.
        """
        if response is not None and (size := len(response)) >= LARGE:
            self._in_flight.add(size)
            context.add_done_callback(lambda _: self._in_flight.remove(size))  # type: ignore[arg-type]


class _Call:
    """A call in progress. The constructor sets its request id in the trailing metadata.

    Args:
        method: path of the method.
        context: gRPC's context of the call.
        held: counts the bytes and the stream that the call holds.
        observe: called when the call ends; see `Handlers`.
    """

    def __init__(self, method: str, context: Context, held: Held, observe: Observe) -> None:
        self._method = method
        self._context = context
        self.held = held
        self._observe = observe
        self._request_id = _request_id(context)
        self._start = perf_counter()
        context.set_trailing_metadata(((status.REQUEST_ID_KEY, self._request_id),))

    def end(self, code: str) -> None:
        """Release what `held` counts, and call `observe` with `code`, the name of the status code."""
        self.held.release()
        self._observe(self._method, code, perf_counter() - self._start)

    async def fail(self, error: BaseException) -> None:
        """End the call after `error`, and send the error's status by `_abort`, which raises an exception.

        If `error` is no `Exception`, such as a cancellation, no status is sent, and this method returns.
        """
        # The call is reported before the status is sent: the caller may read the metrics once it has the status.
        self.end(_code_name(error, self._context))
        if isinstance(error, Exception):
            await _abort(error, self._method, self._request_id, self._context)


def _code_name(error: BaseException, context: Context) -> str:
    """Return the name of a status code, such as `NOT_FOUND`, that `observe` gets for a call that ends with `error`."""
    if isinstance(error, grpc.aio.AbortError):  # one of gRPC's own services has set the code
        code = context.code()
        return _STATUS_CODES[code].name if isinstance(code, int) else code.name
    if isinstance(error, ServiceError):
        return error.code.name
    if isinstance(error, OSError) and descriptors.is_shortage(error):
        return Code.RESOURCE_EXHAUSTED.name
    if isinstance(error, NotImplementedError):
        return Code.UNIMPLEMENTED.name
    # GeneratorExit: the response stream was closed because its caller left.
    return "CANCELLED" if isinstance(error, asyncio.CancelledError | GeneratorExit) else Code.INTERNAL.name


def _reader(handler: Any, method: str, counts: Mapping[str, int], turn: asyncio.Lock) -> _Read:
    """Return the function that decodes the request of a call: to one message, or to an iterator over messages.

    The function, or `anext` of the iterator, raises INVALID_ARGUMENT for a message that cannot be decoded or has too
    many elements, and RESOURCE_EXHAUSTED if too many bytes are in flight. The function also raises RESOURCE_EXHAUSTED
    if too many streams are open.

    Args:
        handler: gRPC's handler of the method.
        method: path of the method, such as `/emberpc.v1.EmbeddingService/Embed`.
        counts: maximum number of elements of the repeated fields of a request, by field name.
        turn: lock, held while a request of 64 KiB or more is decoded, after its first step. Without it, the steps of
            eight requests would alternate, and a short call would wait for eight steps. Streams use `Streams.turn`.
    """
    service, _, name = method[1:].partition("/")
    request: Descriptor = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type

    def decode(data: bytes) -> Iterator[Any]:
        """Count a message's elements, yielding None when `count_elements` yields; then yield the decoded message.

        INVALID_ARGUMENT if the bytes are malformed or have too many elements.
        """
        try:
            yield from count_elements(data, request, counts)
            yield handler.request_deserializer(data)
        except (DecodeError, ValueError, RecursionError):
            raise _malformed(name) from None

    async def read(data: bytes, held: Held) -> Any:
        held.add(len(data))
        steps = decode(data)
        decoded = next(steps)
        if decoded is None:
            async with turn:
                decoded = await _finished(steps)
        return decoded

    async def read_stream(messages: AsyncIterator[bytes], held: Held) -> Any:
        held.open_stream()
        return _Decoded(messages, decode, held)

    return read_stream if handler.request_streaming else read


async def _finished(steps: Iterator[Any]) -> Any:
    """Return the value that the last of `steps` yields (the others yield None); let other calls run between steps."""
    for value in steps:
        if value is not None:
            return value
        await asyncio.sleep(0)
    raise AssertionError("the last step yields the value")


def _malformed(name: str) -> ServiceError:
    """Return the INVALID_ARGUMENT error for a request of the method `name` that cannot be decoded."""
    return ServiceError(
        Code.INVALID_ARGUMENT,
        f"a request of {name} cannot be decoded: its bytes are malformed, a string is not UTF-8, or messages "
        "are nested more than 100 levels deep; generate the client's code from emberpc's .proto files",
        reason="MALFORMED_REQUEST",
    )


class _Decoded:
    """Iterator over the decoded messages of a request stream; a `HoldingStream`.

    This is a class, not a generator: after a cancelled `anext`, a generator ends, but this iterator can continue.

    Args:
        messages: the messages as bytes.
        decode: the function `decode` of `_reader`.
        held: counts the bytes of the messages; its `streams.turn` is the lock for decoding.
    """

    def __init__(self, messages: AsyncIterator[bytes], decode: Callable[[bytes], Iterator[Any]], held: Held) -> None:
        self._messages = aiter(messages)
        self._decode = decode
        self._held = held
        #: Bytes of the latest message, which are released when the next message is read; 0 after `hold`.
        self._size = 0
        #: The steps that decode a message which `anext` has read and not returned, and the message after the last step.
        #: If `anext` is cancelled, both stay here for the next `anext`.
        self._begun: Iterator[Any] | None = None
        self._message: Any = None

    def __aiter__(self) -> _Decoded:
        return self

    async def __anext__(self) -> Any:
        if self._begun is None:
            data = await anext(self._messages)
            self._held.remove(self._size)
            self._size = 0
            self._held.add(len(data))
            self._size = len(data)
            self._begun = self._decode(data)
        # Only one stream decodes at a time, and other calls can run between two steps and between two messages. So a
        # short call waits for one step, not for one of each stream.
        async with self._held.streams.turn:
            if self._message is None:
                self._message = await _finished(self._begun)
            await asyncio.sleep(0)
        message, self._begun, self._message = self._message, None, None
        return message

    def hold(self) -> HeldMessage:
        """Keep the latest message counted until its `release` or the call's end. Hold a message at most once."""
        size, self._size = self._size, 0
        return HeldMessage(size, partial(self._held.remove, size))


def _as_coroutine(method: Any) -> Any:
    """Return a coroutine function that calls a plain function.

    The generated servicer has plain functions for methods without an implementation.
    """

    async def call(request: Any, context: Context) -> Any:
        return method(request, context)

    return call


def _request_id(context: Context) -> str:
    """Return the request id of a call: the first valid id (`_REQUEST_ID`) that the caller sent, else a new id."""
    for key, value in context.invocation_metadata() or ():
        if key == status.REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{_PROCESS}{next(_numbers):016x}"


def _release_frames(error: BaseException | None) -> None:
    """Remove the tracebacks of an error that is not needed any more, and of the errors in its chain of `__context__`.

    The frames of a traceback refer to the request, and may refer to the error itself. That cycle would keep the request
    in memory until the garbage collector runs: 25 refused requests of 15 MiB took 3 GB.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__context__


async def _abort(error: Exception, method: str, request_id: str, context: Context) -> NoReturn:
    """End a call with the gRPC status of an error. `Handlers` says which status, and which errors are logged.

    Raises:
        grpc.aio.AbortError: the status was sent, now or before.
        grpc.aio.BaseError: the caller has left.
    """
    raised = error
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):
        name = method.rpartition("/")[2]
        error = ServiceError(Code.UNIMPLEMENTED, f"{name} is not supported by this version of emberpc")
    if isinstance(error, OSError) and descriptors.is_shortage(error):
        log.error("%s failed, request %s: no file descriptor is free", method, request_id)
        error = descriptors.shortage()
    if not isinstance(error, ServiceError):
        log.error("%s failed, request %s", method, request_id, exc_info=error)
        error = ServiceError(Code.INTERNAL, "the server made an error")
    elif error.code is Code.INTERNAL:
        log.error("%s failed, request %s: %s", method, request_id, error.message, exc_info=error.__cause__)
    _release_frames(raised)
    answer = status_of(error, request_id)
    metadata: list[tuple[str, str | bytes]] = [
        (status.DETAILS_KEY, answer.SerializeToString()),
        (status.REQUEST_ID_KEY, request_id),
    ]
    if error.retry_after is not None:
        metadata.append((status.PUSHBACK_KEY, str(int(error.retry_after * 1000))))
    await context.abort(_STATUS_CODES[error.code.value], answer.message, tuple(metadata))
    raise AssertionError("abort always raises")
