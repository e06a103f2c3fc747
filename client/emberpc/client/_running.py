"""Runs calls over a gRPC channel, for `Client`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from emberpc.client._calls import Call, Job, Page, Step, Steps
from emberpc.client._connection import Connection
from emberpc.client._retrying import Retries
from emberpc.client._stream_running import Line, run_stream
from emberpc.client._streaming import StreamJob
from emberpc.client.exceptions import Cancelled, InputTypeError, ResourceExhausted

#: Messages for a call that begins too late.
CLIENT_CLOSED = "the client is closed; make another one"
CHANNEL_CLOSED = "the channel is closed; give the client an open one"
#: For what takes milliseconds.
_CLOSE_SECONDS = 2.0

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass
class Pending:
    """A call that waits for its answer: what is sent, its tries, and gRPC's future of the present one."""

    call: Call[Any, Any]
    retries: Retries
    request: Any
    future: Any = None


class Starting:
    """Starts calls of one request, the same for both runners."""

    _connection: Connection
    _owns_channel: bool

    def _start(self, call: Call[Any, Any], timeout: float | None) -> Pending:
        """Send the request of a call; it may be repeated only over the client's own channel."""
        pending = Pending(call, Retries(self._connection.deadline(timeout), allowed=self._owns_channel), call.request)
        self._try(pending)
        return pending

    def _try(self, pending: Pending) -> None:
        """Begin a try of a call."""
        raise NotImplementedError


class Runner(Starting):
    """Runs calls; its methods raise EmberpcError if one fails.

    Args:
        connection: where to.
        channel: a channel of the caller's; None: make one.

    Raises:
        InputTypeError: the channel is one of another kind.
    """

    def __init__(self, connection: Connection, channel: grpc.Channel | None) -> None:
        if isinstance(channel, grpc.aio.Channel):
            raise InputTypeError("channel is one of grpc.aio; give one of grpc, or use AsyncClient")
        self._connection = connection
        self._closed = threading.Event()
        self._owns_channel = channel is None
        self._channel = channel or _open(connection)

    def close(self) -> None:
        """Take no more calls, and close the channel unless it is the caller's; once is enough."""
        self._closed.set()
        if not self._owns_channel:
            return
        # If Ctrl-C came while gRPC began a call, its own close waits for that call for ever (grpc/grpc#19973).
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def run(self, job: Job[Any, Result], timeout: float | None) -> Result:
        """Run the calls of a job, a few at a time unless they are ordered, and return what they make together."""
        pending: deque[Pending] = deque()
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
            for one in pending:
                one.future.cancel()
        return job.result()

    def run_one(self, call: Call[Any, Result], timeout: float | None) -> Result:
        """Run one call."""
        result: Result = self._answer(self._start(call, timeout), timeout)
        return result

    def follow(self, call: Call[Any, Step[Item]], told: Callable[[str], None] | None, timeout: float | None) -> Item:
        """Run one call that tells its steps, and return what the last one holds."""
        steps = Steps(call, told)
        with closing(self.receive(call, timeout)) as answers:
            for step in answers:
                steps.take(step)
        return steps.result()

    def receive(self, call: Call[Any, Item], timeout: float | None) -> Generator[Item, None, None]:
        """Run one call of several answers, and give them as they come; closing ends it."""
        retries = Retries(self._connection.deadline(timeout), allowed=self._owns_channel)
        method = self._method("unary_stream", call)
        answered = False
        while True:
            number = retries.begin()
            answers = self._begin(method, call.request, timeout=retries.left)
            try:
                for message in answers:
                    answered = True
                    yield call.read(message)
            except grpc.RpcError as error:
                retries.end(number)
                ours = self._connection.error(error, call, timeout, late=retries.late)
                # What was given out cannot be taken back.
                if answered or (pause := retries.pause(ours)) is None:
                    raise ours from error
            else:
                return
            finally:
                answers.cancel()
            self._closed.wait(pause)

    def send(self, call: Call[Any, Result], requests: Iterator[Message], timeout: float | None) -> Result:
        """Run one call of several requests, which are taken as they are sent, in another thread; it is not repeated."""
        pending = Pending(call, Retries(self._connection.deadline(timeout), allowed=False), requests)
        self._try(pending, "stream_unary")
        try:
            result: Result = self._answer(pending, timeout)
        finally:
            pending.future.cancel()
        return result

    def pages(self, page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None) -> Iterator[Item]:
        """Walk over the items of all pages; `page_call` makes the call for a page token."""
        # The first call is made here, not in the generator, so that a wrong argument is known at once.
        return self._walk(page_call(""), page_call, timeout)

    def stream(
        self, job: StreamJob[Item, Any, Any, Result], items: Iterator[Item], timeout: float | None
    ) -> Iterator[Result]:
        """Run a stream; give the results as they come."""
        self._connection.deadline(timeout)  # known to be wrong now, not at the first result
        start = partial(self._begin, self._method("stream_stream", job.call))
        return run_stream(job, items, lambda: Line(start), self._connection, timeout)

    def _walk(
        self, call: Call[Any, Page[Item]], page_call: Callable[[str], Call[Any, Page[Item]]], timeout: float | None
    ) -> Iterator[Item]:
        page = self.run_one(call, timeout)
        yield from page.items
        while page.next_token:
            page = self.run_one(page_call(page.next_token), timeout)
            yield from page.items

    def _take_oldest(self, job: Job[Any, Any], pending: deque[Pending], timeout: float | None) -> None:
        # Taken off only when it is answered: on Ctrl-C, all that are still in flight are cancelled.
        try:
            part = self._answer(pending[0], timeout)
        except ResourceExhausted as error:
            smaller = pending.popleft().call.smaller(error)
            pending.extendleft(self._start(call, timeout) for call in reversed(smaller))
            return
        job.take(pending.popleft().call, part)

    def _try(self, pending: Pending, kind: str = "unary_unary") -> None:
        """Begin a try of a call; `kind` is gRPC's word."""
        number = pending.retries.begin()
        method = self._method(kind, pending.call)
        pending.future = self._begin(method.future, pending.request, timeout=pending.retries.left)
        # An answer may wait for those before it.
        pending.future.add_done_callback(lambda _: pending.retries.end(number))

    def _method(self, kind: str, call: Call[Any, Any]) -> Any:
        """Return what gRPC makes calls of one method with; `kind` is gRPC's word, such as `unary_stream`."""
        return getattr(self._channel, kind)(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )

    def _begin(self, start: Callable[..., Any], request: Message | Iterator[Message], **options: Any) -> Any:
        """Begin a call; raises Cancelled if the client or the channel is closed."""
        if self._closed.is_set():
            raise Cancelled(CLIENT_CLOSED)
        try:
            return start(request, metadata=self._connection.metadata, **options)
        except ValueError as error:
            # gRPC's error for a closed channel: the caller's own, or one that another thread has just closed.
            raise Cancelled(CLIENT_CLOSED if self._closed.is_set() else CHANNEL_CLOSED) from error

    def _answer(self, pending: Pending, timeout: float | None) -> Any:
        """Wait for an answer, repeating the call if need be, and read it."""
        while True:
            try:
                return pending.call.read(pending.future.result())
            except grpc.FutureCancelledError as error:
                raise Cancelled("the call was cancelled before its answer came") from error
            except grpc.RpcError as error:
                ours = self._connection.error(error, pending.call, timeout, late=pending.retries.late)
                if (pause := pending.retries.pause(ours)) is None:
                    raise ours from error
            self._closed.wait(pause)
            self._try(pending)


def _open(connection: Connection) -> grpc.Channel:
    if connection.tls is None:
        return grpc.insecure_channel(connection.target, connection.options)
    return grpc.secure_channel(connection.target, connection.tls.credentials(), connection.options)
