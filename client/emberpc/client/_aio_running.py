"""Runs calls over a gRPC channel, for `AsyncClient`; what `_running` says holds here too."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from emberpc.client._aio_stream_running import AsyncLine, run_stream
from emberpc.client._calls import Call, Job, Page, Step, Steps
from emberpc.client._connection import Connection
from emberpc.client._retrying import Retries
from emberpc.client._running import CHANNEL_CLOSED, CLIENT_CLOSED, Pending, Starting
from emberpc.client._streaming import StreamJob
from emberpc.client.exceptions import Cancelled, EmberpcError, FailedPrecondition, InputTypeError, ResourceExhausted

Result = TypeVar("Result")
Item = TypeVar("Item")


class AsyncRunner(Starting):
    """Runs calls; its methods raise EmberpcError if one fails.

    Args:
        connection: where to.
        channel: a channel of the caller's; None: make one at the first call, since it belongs to the loop that runs.

    Raises:
        InputTypeError: the channel is one of another kind.
    """

    def __init__(self, connection: Connection, channel: grpc.aio.Channel | None) -> None:
        if isinstance(channel, grpc.Channel):
            raise InputTypeError("channel is one of grpc; give one of grpc.aio, or use Client")
        self._connection = connection
        self._closed = False
        self._owns_channel = channel is None
        self._channel = channel
        #: The loop that the client's own channel belongs to.
        self._loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Take no more calls, and close the channel unless it is the caller's; once is enough."""
        self._closed = True
        channel = self._channel
        if not self._owns_channel or channel is None or self._loop is None:
            return
        self._channel = None
        if self._loop is asyncio.get_running_loop():
            await channel.close()
        elif self._loop.is_running():
            # Not awaited: nothing says that the other loop goes on running.
            asyncio.run_coroutine_threadsafe(channel.close(), self._loop)

    async def run(self, job: Job[Any, Result], timeout: float | None) -> Result:
        """Run the calls of a job, a few at a time unless they are ordered, and return what they make together."""
        pending: deque[Pending] = deque()
        width = 1 if job.ordered else self._connection.in_flight
        try:
            with job.errors():
                for call in job.calls:
                    pending.append(self._start(call, timeout))
                    while len(pending) >= width:
                        await self._take_oldest(job, pending, timeout)
                while pending:
                    await self._take_oldest(job, pending, timeout)
        finally:
            for one in pending:
                one.future.cancel()
        return job.result()

    async def run_one(self, call: Call[Any, Result], timeout: float | None) -> Result:
        """Run one call."""
        result: Result = await self._answer(self._start(call, timeout), timeout)
        return result

    async def follow(
        self, call: Call[Any, Step[Item]], told: Callable[[str], None] | None, timeout: float | None
    ) -> Item:
        """Run one call that tells its steps, and return what the last one holds."""
        steps = Steps(call, told)
        async with aclosing(self.receive(call, timeout)) as answers:
            async for step in answers:
                steps.take(step)
        return steps.result()

    async def receive(self, call: Call[Any, Item], timeout: float | None) -> AsyncGenerator[Item, None]:
        """Run one call of several answers, and give them as they come; closing ends it."""
        retries = Retries(self._connection.deadline(timeout), allowed=self._owns_channel)
        answered = False
        while True:
            retries.begin()
            answers = self._begin("unary_stream", call, call.request, timeout=retries.left)
            iterator = aiter(answers)
            try:
                while True:
                    with self._errors(call, timeout, retries):
                        try:
                            message = await anext(iterator)
                        except StopAsyncIteration:
                            return
                    answered = True
                    yield call.read(message)
            except EmberpcError as error:
                # What was given out cannot be taken back.
                if answered or (pause := retries.pause(error)) is None:
                    raise
            finally:
                answers.cancel()
            await asyncio.sleep(pause)

    async def send(self, call: Call[Any, Result], requests: AsyncIterator[Message], timeout: float | None) -> Result:
        """Run one call of several requests, which are taken as they are sent; it is not repeated."""
        pending = Pending(call, Retries(self._connection.deadline(timeout), allowed=False), requests)
        self._try(pending, "stream_unary")
        try:
            result: Result = await self._answer(pending, timeout)
        finally:
            pending.future.cancel()
        return result

    def pages(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> AsyncIterator[Item]:
        """Walk over the items of all pages; `page_call` makes the call for a page token."""
        return self._walk(page_call(""), page_call, timeout)

    def stream(
        self,
        job: StreamJob[Item, Any, Any, Result],
        items: Iterable[Item] | AsyncIterable[Item],
        timeout: float | None,
    ) -> AsyncIterator[Result]:
        """Run a stream; give the results as they come."""
        self._connection.deadline(timeout)  # known to be wrong now, not at the first result
        start = partial(self._begin, "stream_stream", job.call)
        return run_stream(job, items, lambda: AsyncLine(start), self._connection, timeout)

    async def _walk(
        self, call: Call[Any, Page[Item]], page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None
    ) -> AsyncIterator[Item]:
        page = await self.run_one(call, timeout)
        for item in page.items:
            yield item
        while page.next_token:
            page = await self.run_one(page_call(page.next_token), timeout)
            for item in page.items:
                yield item

    async def _take_oldest(self, job: Job[Any, Any], pending: deque[Pending], timeout: float | None) -> None:
        try:
            part = await self._answer(pending[0], timeout)
        except ResourceExhausted as error:
            smaller = pending.popleft().call.smaller(error)
            pending.extendleft(self._start(call, timeout) for call in reversed(smaller))
            return
        job.take(pending.popleft().call, part)

    def _try(self, pending: Pending, kind: str = "unary_unary") -> None:
        """Begin a try of a call; `kind` is gRPC's word."""
        number = pending.retries.begin()
        pending.future = self._begin(kind, pending.call, pending.request, timeout=pending.retries.left)
        # An answer may wait for those before it.
        pending.future.add_done_callback(lambda _: pending.retries.end(number))

    def _begin(self, kind: str, call: Call[Any, Any], request: Message | AsyncIterator[Message], **options: Any) -> Any:
        """Begin a call; `kind` is gRPC's word, such as `unary_stream`.

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
            return method(request, metadata=self._connection.metadata, **options)
        except grpc.aio.UsageError as error:
            raise Cancelled(CHANNEL_CLOSED) from error

    @contextmanager
    def _errors(self, call: Call[Any, Any], timeout: float | None, retries: Retries) -> Iterator[None]:
        """Turn gRPC's errors into ours, and a cancellation that was not the caller's into Cancelled."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error, call, timeout, late=retries.late) from error
        except asyncio.CancelledError as error:
            # So gRPC says that the channel was closed. Python 3.10 does not say whether the task was cancelled.
            cancelling = getattr(asyncio.current_task(), "cancelling", lambda: not self._closed)
            if cancelling():
                raise
            raise Cancelled("the call was cancelled before its answer came") from error

    async def _answer(self, pending: Pending, timeout: float | None) -> Any:
        """Wait for an answer, repeating the call if need be, and read it."""
        while True:
            try:
                with self._errors(pending.call, timeout, pending.retries):
                    return pending.call.read(await pending.future)
            except EmberpcError as error:
                if (pause := pending.retries.pause(error)) is None:
                    raise
            await asyncio.sleep(pause)
            self._try(pending)

    def _opened(self) -> grpc.aio.Channel:
        if self._channel is not None and not self._owns_channel:
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


def _open(connection: Connection) -> grpc.aio.Channel:
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.target, connection.options)
    return grpc.aio.secure_channel(connection.target, connection.tls.credentials(), connection.options)
