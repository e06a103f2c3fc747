"""Runs a stream over a gRPC channel, for `AsyncClient`; what `_stream_running` says holds here too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from emberpc.client._connection import Connection
from emberpc.client._streaming import Item, Patience, Result, StreamJob, ended_early
from emberpc.client.exceptions import Cancelled

Incoming = Message | grpc.aio.AioRpcError | None


class AsyncLine:
    """One stream over a channel. What comes in is a response, None at its end, or the error that ended it.

    Args:
        start: begins the call for an iterator of requests, and returns gRPC's call.
    """

    def __init__(self, start: Callable[[AsyncIterator[Message]], Any]) -> None:
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._inbox: asyncio.Queue[Incoming | Cancelled] = asyncio.Queue()
        self._finished = False
        self._call = start(self._requests())
        self._receiving = asyncio.create_task(self._receive())

    @property
    def silent(self) -> bool:
        """Whether nothing has come in that was not taken."""
        return self._inbox.empty()

    def send(self, requests: Iterable[Message]) -> None:
        """Have requests sent as soon as the server takes them."""
        for request in requests:
            self._outbox.put_nowait(request)

    def finish(self) -> None:
        """Say that nothing more is sent; once is enough."""
        if not self._finished:
            self._finished = True
            self._outbox.put_nowait(None)

    async def receive(self, timeout: float) -> Incoming:
        """Return what comes in next.

        Raises:
            asyncio.TimeoutError: nothing came in time.
            Cancelled: the channel was closed.
        """
        answer = await asyncio.wait_for(self._inbox.get(), timeout)
        if isinstance(answer, Cancelled):
            raise answer
        return answer

    async def close(self) -> None:
        """Give up the stream, unless it has ended."""
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
            # So gRPC tells that the channel was closed.
            self._inbox.put_nowait(Cancelled("the call was cancelled before its answer came"))
            raise
        else:
            self._inbox.put_nowait(None)


async def run_stream(
    job: StreamJob[Item, Any, Any, Result],
    items: Iterable[Item] | AsyncIterable[Item],
    open_line: Callable[[], AsyncLine],
    connection: Connection,
    timeout: float | None,
) -> AsyncIterator[Result]:
    """Give the results of a stream as they come; open it again where it breaks."""
    source = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
    patience = Patience(connection.deadline(timeout))
    line = open_line()
    try:
        line.send(job.opening())
        while True:
            line.send(job.requests())
            if job.may_read and line.silent:
                await _read(job, source)
                for result in job.refused():
                    yield result
                patience.restart()
                continue
            if job.sent:
                line.finish()
            if job.done:
                await _await_end(line, patience)
                return
            try:
                answer = await line.receive(patience.left)
            except asyncio.TimeoutError:
                raise patience.reason or connection.silence(job.call, timeout) from None
            if answer is None:
                raise ended_early()
            if isinstance(answer, Message):
                if results := job.take(answer):
                    for result in results:
                        yield result
                    patience.restart()
                continue
            error = connection.error(answer, job.call, timeout)
            pause = patience.pause(error)
            if pause is None or not job.may_go_on(error):
                raise error from answer
            await line.close()
            await asyncio.sleep(pause)
            line = open_line()
            line.send(job.opening())
    finally:
        await line.close()


async def _read(job: StreamJob[Item, Any, Any, Any], source: Iterator[Item] | AsyncIterator[Item]) -> None:
    """Read the items of one request."""
    while not job.read_enough:
        try:
            item = await anext(source) if isinstance(source, AsyncIterator) else next(source)
        except (StopIteration, StopAsyncIteration):
            job.exhausted = True
        else:
            job.add(item)


async def _await_end(line: AsyncLine, patience: Patience) -> None:
    """Let a stream end that has answered everything; how it does makes no difference any more."""
    with suppress(asyncio.TimeoutError, Cancelled):
        while isinstance(await line.receive(patience.left), Message):
            pass
