# Generated from ../_sync/runner.py by tools/generate_async_client.py. Edit that file and run the script.
"""Run the calls of a client: start calls, retry failed calls, and collect the responses."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message

from emberpc.client._aio.streams import run_stream
from emberpc.client._aio.transport import AsyncTransport, item_iterator
from emberpc.client._core.connection import ConnectionSettings
from emberpc.client._core.joined_calls import JoinedCalls
from emberpc.client._core.retries import Retries
from emberpc.client._core.rpc_call import Call, Page, Step, Steps
from emberpc.client._core.streams import StreamState
from emberpc.client.exceptions import ResourceExhausted

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass
class _Pending:
    """A call that waits for its response.

    `request` is what gRPC sends: the request, or an iterator of requests. `started` is gRPC's object for the latest
    try.
    """

    call: Call[Any, Any]
    retries: Retries
    request: Any
    started: Any = None


class AsyncRunner:
    """Runs calls over the channel of a client.

    `timeout` of the methods is the seconds that one call may take, with all its tries; of `stream`, the
    maximum seconds without a result. None is the timeout of `connection`. A wrong timeout raises InputError or
    InputTypeError.
    A failed call raises EmberpcError. Calls are retried as `Retries` describes, but not over the caller's channel;
    `stream` opens a broken stream again over any channel.

    Args:
        connection: target and settings of the client.
        channel: the caller's channel; None: open a channel.

    Raises:
        InputTypeError: `channel` is one for the other client: of grpc.aio for the sync client, of grpc for the async
            client.
    """

    def __init__(self, connection: ConnectionSettings, channel: grpc.aio.Channel | None) -> None:
        self._connection = connection
        self._transport = AsyncTransport(connection, channel)

    async def close(self) -> None:
        """Let further calls raise Cancelled, and close the channel, which cancels the calls in flight.

        A channel that the caller gave stays open, and the calls in flight over it go on.
        """
        await self._transport.close()

    async def run(self, joined: JoinedCalls[Any, Result], timeout: float | None) -> Result:
        """Run the calls of `joined` and return the joined result.

        At most `in_flight` calls (a setting of the connection) run at a time; 1 if the calls are ordered. A call whose
        response would be too large is replaced, if it can be divided, by two calls with half of the items each. Both
        start at once, so more than `in_flight` calls may run then. If a call fails, the calls in flight are cancelled.
        `timeout` is the seconds of each call with all its tries; None: the timeout of the connection.

        Raises:
            EmberpcError: a call failed; `done` is the number of items that earlier calls wrote or deleted, 0 for calls
                that only read.
            InputError: an item is wrong, found when its call is built; or `timeout` is out of range.
            InputTypeError: an item has the wrong type, or `timeout` is not a number.
        """
        pending: deque[_Pending] = deque()
        width = 1 if joined.ordered else self._connection.in_flight
        try:
            with joined.errors():
                for call in joined.calls:
                    pending.append(self._start(call, timeout))
                    while len(pending) >= width:
                        await self._take_oldest(joined, pending, timeout)
                while pending:
                    await self._take_oldest(joined, pending, timeout)
        finally:
            for each in pending:
                each.started.cancel()
        return joined.result()

    async def run_one(self, call: Call[Any, Result], timeout: float | None) -> Result:
        """Run one call, with retries, and return its result; raise EmberpcError if the call fails.

        `timeout` is the seconds of all tries together; None: the timeout of the connection.
        """
        result: Result = await self._response(self._start(call, timeout), timeout)
        return result

    async def run_steps(
        self, call: Call[Any, Step[Item]], progress: Callable[[str], None] | None, timeout: float | None
    ) -> Item:
        """Run one call whose responses report steps, and return the result in the last step.

        `progress` is called with the stage of each step; None: no calls. `timeout` is the seconds of all tries
        together; None: the timeout of the connection. Raises EmberpcError if the call fails or has no response.
        """
        steps = Steps(call, progress)
        async with aclosing(self.responses(call, timeout)) as responses:
            async for step in responses:
                steps.take(step)
        return steps.result()

    async def responses(self, call: Call[Any, Item], timeout: float | None) -> AsyncGenerator[Item, None]:
        """Run one call with several responses, and yield the result of each when it arrives.

        Closing the generator cancels the call. The call is not retried if it fails after the first response. `timeout`
        is the seconds of all tries together; None: the timeout of the connection. Raises EmberpcError if the call fails
        and is not retried.
        """
        retries = Retries(self._connection.deadline(timeout), allowed=self._transport.owns_channel)
        answered = False
        while True:
            number = retries.begin()
            started = self._transport.start("unary_stream", call, call.request, timeout=retries.left)
            try:
                while (message := await self._transport.next_response(started)) is not None:
                    answered = True
                    yield call.read(message)
            except grpc.RpcError as error:
                retries.end(number)
                ours = self._connection.error(error, call, timeout, late=retries.late)
                # A retry would yield all responses again, also those that were yielded already.
                if answered or (pause := retries.pause(ours)) is None:
                    raise ours from error
            else:
                return
            finally:
                started.cancel()
            await self._transport.sleep(pause)

    async def upload(self, call: Call[Any, Result], requests: AsyncIterator[Message], timeout: float | None) -> Result:
        """Run one call with several requests and one response, and return its result.

        The call is not retried, because the requests can be read only once. `timeout` is the seconds of the call; None:
        the timeout of the connection. Raises EmberpcError if the call fails.
        """
        pending = _Pending(call, Retries(self._connection.deadline(timeout), allowed=False), requests)
        self._try(pending, "stream_unary")
        try:
            result: Result = await self._response(pending, timeout)
        finally:
            pending.started.cancel()
        return result

    def pages(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> AsyncIterator[Item]:
        """Return an iterator over the items of all pages, which requests each page when its first item is taken.

        Args:
            page_call: returns the call for a page token; the token of the first page is empty.
            timeout: seconds of each call with all its tries; None: the timeout of the connection.

        Raises:
            EmberpcError: a call failed; raised when the next item is taken, as is the error for a wrong timeout. An
                error of `page_call("")`, for wrong arguments of the caller, is raised by `pages` itself.
        """
        # The first call is built here, though it is sent only when the first item is taken, so that wrong arguments
        # raise now: in the generator, they would raise only then.
        return self._walk(page_call(""), page_call, timeout)

    async def all_items(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> list[Item]:
        """Request all pages and return their items as a list; raise EmberpcError if a call fails.

        `page_call` returns the call for a page token, which is empty for the first page. `timeout` is the seconds of
        each call with all its tries; None: the timeout of the connection.
        """
        items: list[Item] = []
        async for item in self.pages(page_call, timeout):
            items.append(item)
        return items

    def stream(
        self,
        state: StreamState[Item, Any, Any, Result],
        items: Iterable[Item] | AsyncIterable[Item],
        timeout: float | None,
    ) -> AsyncIterator[Result]:
        """Return an iterator that runs a stream of items, and yields the results as they arrive.

        Args:
            state: state of the stream.
            items: the caller's items; read when the window of `state` has space for them.
            timeout: maximum seconds without a result; None: the timeout of the connection.

        Raises:
            InputTypeError: `timeout` is not a number; or, when the next result is taken, an item has the wrong type.
            InputError: `timeout` is out of range.
            EmberpcError: the stream failed; raised when the next result is taken.
        """
        self._connection.deadline(timeout)  # so that a wrong timeout raises now, not at the first result
        return run_stream(state, item_iterator(items), self._transport, self._connection, timeout)

    async def _walk(
        self, call: Call[Any, Page[Item]], page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None
    ) -> AsyncIterator[Item]:
        page = await self.run_one(call, timeout)
        for each in page.items:
            yield each
        while page.next_token:
            page = await self.run_one(page_call(page.next_token), timeout)
            for each in page.items:
                yield each

    async def _take_oldest(
        self, joined: JoinedCalls[Any, Any], pending: deque[_Pending], timeout: float | None
    ) -> None:
        # The call stays in `pending` while its response is awaited: if Ctrl-C interrupts the wait, `run` cancels all
        # calls in `pending`.
        try:
            part = await self._response(pending[0], timeout)
        except ResourceExhausted as error:
            smaller = pending.popleft().call.smaller(error)
            pending.extendleft(self._start(call, timeout) for call in reversed(smaller))
            return
        joined.take(pending.popleft().call, part)

    def _start(self, call: Call[Any, Any], timeout: float | None) -> _Pending:
        """Start the first try of a call with one request and one response.

        Retries are allowed only over a channel that the client opened itself. `timeout` is the seconds of all tries
        together.
        """
        retries = Retries(self._connection.deadline(timeout), allowed=self._transport.owns_channel)
        pending = _Pending(call, retries, call.request)
        self._try(pending)
        return pending

    def _try(self, pending: _Pending, kind: str = "unary_unary") -> None:
        """Start the next try of a call; its end will be recorded in `pending.retries`.

        `kind` is gRPC's name for the kind of method.
        """
        number = pending.retries.begin()
        pending.started = self._transport.start(kind, pending.call, pending.request, timeout=pending.retries.left)
        # The response may arrive long before `_response` waits for it, and `retries` must know how long the try ran.
        pending.started.add_done_callback(lambda _: pending.retries.end(number))

    async def _response(self, pending: _Pending, timeout: float | None) -> Any:
        """Wait for the response of a started call, and return its result; retry the call if it may be retried.

        `timeout` is the timeout of the call, which error messages state.

        Raises:
            EmberpcError: the call failed and is not retried.
        """
        while True:
            try:
                return pending.call.read(await self._transport.response(pending.started))
            except grpc.RpcError as error:
                ours = self._connection.error(error, pending.call, timeout, late=pending.retries.late)
                if (pause := pending.retries.pause(ours)) is None:
                    raise ours from error
            await self._transport.sleep(pause)
            self._try(pending)
