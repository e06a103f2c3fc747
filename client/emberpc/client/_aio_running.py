"""Runs calls over a gRPC channel, for `AsyncClient`; what `_running` says holds here too."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from emberpc.client._aio_stream_running import AsyncLine, run_stream
from emberpc.client._calls import Call, Job, Page, Response, Step, Steps
from emberpc.client._connection import Connection
from emberpc.client._streaming import StreamJob

Result = TypeVar("Result")
Item = TypeVar("Item")


class AsyncRunner:
    """Runs calls; its methods raise EmberpcError if one fails.

    Args:
        connection: where to.
        channel: a channel of the caller's; None: make one at the first call, since it belongs to the loop that runs.
    """

    def __init__(self, connection: Connection, channel: grpc.aio.Channel | None) -> None:
        self._connection = connection
        self._owns_channel = channel is None
        self._channel = channel

    async def close(self) -> None:
        """Close the channel, unless it is the caller's."""
        if self._owns_channel and self._channel is not None:
            await self._channel.close()

    async def run(self, job: Job[Any, Result], timeout: float | None) -> Result:
        """Run the calls of a job, a few at a time unless they are ordered, and return what they make together."""
        pending: deque[tuple[Call[Any, Any], Any]] = deque()
        width = 1 if job.ordered else self._connection.in_flight
        try:
            for call in job.calls:
                pending.append((call, self._start(call, timeout)))
                if len(pending) == width:
                    await self._take_oldest(job, pending, timeout)
            while pending:
                await self._take_oldest(job, pending, timeout)
        finally:
            for _, future in pending:
                future.cancel()
        return job.result()

    async def run_one(self, call: Call[Any, Result], timeout: float | None) -> Result:
        """Run one call."""
        return await self._answer(call, self._start(call, timeout), timeout)

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
        method: Any = self._opened().unary_stream(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        answers = method(call.request, timeout=self._connection.deadline(timeout), metadata=self._connection.metadata)
        try:
            async for message in answers:
                yield call.read(message)
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error, call, timeout) from error
        finally:
            answers.cancel()

    async def send(self, call: Call[Any, Result], requests: AsyncIterator[Message], timeout: float | None) -> Result:
        """Run one call of several requests, which are taken as they are sent."""
        method: Any = self._opened().stream_unary(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        timeout = self._connection.deadline(timeout)
        answer = method(requests, timeout=timeout, metadata=self._connection.metadata)
        try:
            return await self._answer(call, answer, timeout)
        finally:
            answer.cancel()

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

        def open_line() -> AsyncLine:
            method: Any = self._opened().stream_stream(
                job.call.method.path,
                request_serializer=type(job.call.request).SerializeToString,
                response_deserializer=job.call.method.response.FromString,
            )
            return AsyncLine(method, self._connection.metadata)

        return run_stream(job, items, open_line, self._connection, timeout)

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

    async def _take_oldest(
        self, job: Job[Any, Any], pending: deque[tuple[Call[Any, Any], Any]], timeout: float | None
    ) -> None:
        call, future = pending[0]
        part = await self._answer(call, future, timeout)
        pending.popleft()
        job.take(call, part)

    def _start(self, call: Call[Response, Any], timeout: float | None) -> Any:
        """Send a request; return gRPC's awaitable of the answer."""
        method: Any = self._opened().unary_unary(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        return method(call.request, timeout=self._connection.deadline(timeout), metadata=self._connection.metadata)

    async def _answer(self, call: Call[Any, Result], future: Any, timeout: float | None) -> Result:
        """Wait for an answer, and read it."""
        try:
            response = await future
        except grpc.aio.AioRpcError as error:
            raise self._connection.error(error, call, timeout) from error
        return call.read(response)

    def _opened(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = _open(self._connection)
        return self._channel


def _open(connection: Connection) -> grpc.aio.Channel:
    if connection.tls is None:
        return grpc.aio.insecure_channel(connection.target, connection.options)
    return grpc.aio.secure_channel(connection.target, connection.tls.credentials(), connection.options)
