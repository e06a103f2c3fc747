"""Run the calls of a client: start them, retry those that failed, and collect the responses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from emberpc.client._core.calls import Call, Job, Page, Step, Steps
from emberpc.client._core.connection import Connection
from emberpc.client._core.retries import Retries
from emberpc.client._core.streams import StreamJob
from emberpc.client._sync.streams import run_stream
from emberpc.client._sync.transport import Transport, item_iterator
from emberpc.client.exceptions import ResourceExhausted

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass
class _Pending:
    """A call that waits for its response: the call, its tries, its request(s), and gRPC's object of the present try."""

    call: Call[Any, Any]
    retries: Retries
    request: Any
    started: Any = None


class Runner:
    """Runs calls; its methods raise EmberpcError if a call fails.

    Args:
        connection: target and settings.
        channel: the caller's channel; None: open a channel.

    Raises:
        InputTypeError: the channel is of the wrong kind.
    """

    def __init__(self, connection: Connection, channel: grpc.Channel | None) -> None:
        self._connection = connection
        self._transport = Transport(connection, channel)

    def close(self) -> None:
        """Refuse further calls, and close the channel unless it is the caller's."""
        self._transport.close()

    def run(self, job: Job[Any, Result], timeout: float | None) -> Result:
        """Run the calls of a job, a few at a time unless they are ordered, and return the joined result."""
        pending: deque[_Pending] = deque()
        width = 1 if job.ordered else self._connection.in_flight
        try:
            with job.errors():
                for call in job.calls:
                    pending.append(self._start(call, timeout))
                    while len(pending) >= width:
                        self._take_oldest(job, pending, timeout)
                while pending:
                    self._take_oldest(job, pending, timeout)
        finally:
            for each in pending:
                each.started.cancel()
        return job.result()

    def run_one(self, call: Call[Any, Result], timeout: float | None) -> Result:
        """Run one call and return its result."""
        result: Result = self._response(self._start(call, timeout), timeout)
        return result

    def run_steps(
        self, call: Call[Any, Step[Item]], progress: Callable[[str], None] | None, timeout: float | None
    ) -> Item:
        """Run one call whose responses report steps, and return what the last step contains."""
        steps = Steps(call, progress)
        with closing(self.responses(call, timeout)) as responses:
            for step in responses:
                steps.take(step)
        return steps.result()

    def responses(self, call: Call[Any, Item], timeout: float | None) -> Generator[Item, None, None]:
        """Run one call of several responses, and yield them as they arrive. Closing the generator ends the call."""
        retries = Retries(self._connection.deadline(timeout), allowed=self._transport.owns_channel)
        answered = False
        while True:
            number = retries.begin()
            started = self._transport.start("unary_stream", call, call.request, timeout=retries.left)
            try:
                while (message := self._transport.next_response(started)) is not None:
                    answered = True
                    yield call.read(message)
            except grpc.RpcError as error:
                retries.end(number)
                ours = self._connection.error(error, call, timeout, late=retries.late)
                # Responses that were yielded cannot be taken back.
                if answered or (pause := retries.pause(ours)) is None:
                    raise ours from error
            else:
                return
            finally:
                started.cancel()
            self._transport.sleep(pause)

    def upload(self, call: Call[Any, Result], requests: Iterator[Message], timeout: float | None) -> Result:
        """Run one call of several requests. It is not retried, because the requests can be read only once."""
        pending = _Pending(call, Retries(self._connection.deadline(timeout), allowed=False), requests)
        self._try(pending, "stream_unary")
        try:
            result: Result = self._response(pending, timeout)
        finally:
            pending.started.cancel()
        return result

    def pages(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> Iterator[Item]:
        """Iterate over the items of all pages; `page_call` builds the call for a page token."""
        # The first call is built here, not in the generator, so that a wrong argument raises at once.
        return self._walk(page_call(""), page_call, timeout)

    def all_items(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> list[Item]:
        """Return the items of all pages; `page_call` builds the call for a page token."""
        items: list[Item] = []
        for item in self.pages(page_call, timeout):
            items.append(item)
        return items

    def stream(
        self, job: StreamJob[Item, Any, Any, Result], items: Iterable[Item], timeout: float | None
    ) -> Iterator[Result]:
        """Run a stream, and yield the results as they arrive."""
        self._connection.deadline(timeout)  # so that a wrong timeout raises now, not at the first result
        return run_stream(job, item_iterator(items), self._transport, self._connection, timeout)

    def _walk(
        self, call: Call[Any, Page[Item]], page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None
    ) -> Iterator[Item]:
        page = self.run_one(call, timeout)
        yield from page.items
        while page.next_token:
            page = self.run_one(page_call(page.next_token), timeout)
            yield from page.items

    def _take_oldest(self, job: Job[Any, Any], pending: deque[_Pending], timeout: float | None) -> None:
        # Removed only when its response is there, so that Ctrl-C cancels all calls that are in flight.
        try:
            part = self._response(pending[0], timeout)
        except ResourceExhausted as error:
            smaller = pending.popleft().call.smaller(error)
            pending.extendleft(self._start(call, timeout) for call in reversed(smaller))
            return
        job.take(pending.popleft().call, part)

    def _start(self, call: Call[Any, Any], timeout: float | None) -> _Pending:
        """Send the request of a call. Only a call over the client's own channel may be retried."""
        retries = Retries(self._connection.deadline(timeout), allowed=self._transport.owns_channel)
        pending = _Pending(call, retries, call.request)
        self._try(pending)
        return pending

    def _try(self, pending: _Pending, kind: str = "unary_unary") -> None:
        """Start a try of a call; `kind` is gRPC's name for the kind of method."""
        number = pending.retries.begin()
        pending.started = self._transport.start(kind, pending.call, pending.request, timeout=pending.retries.left)
        # A response may arrive while the call waits for earlier calls to be taken.
        pending.started.add_done_callback(lambda _: pending.retries.end(number))

    def _response(self, pending: _Pending, timeout: float | None) -> Any:
        """Wait for a response, retrying the call if necessary, and decode it."""
        while True:
            try:
                return pending.call.read(self._transport.response(pending.started))
            except grpc.RpcError as error:
                ours = self._connection.error(error, pending.call, timeout, late=pending.retries.late)
                if (pause := pending.retries.pause(ours)) is None:
                    raise ours from error
            self._transport.sleep(pause)
            self._try(pending)
