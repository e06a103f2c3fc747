"""Runs a stream over a gRPC channel, for `Client`.

The caller's items are read in the caller's thread, between two results. gRPC
sends in a thread of its own and answers are received in another; what waits
between the three is bounded by the job's window.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import sleep
from typing import Any

import grpc
from google.protobuf.message import Message

from emberpc.client._connection import Connection
from emberpc.client._streaming import Item, Patience, Result, StreamJob, ended_early


class Line:
    """One stream over a channel. What comes in is a response, None at its end, or the error that ended it.

    Args:
        start: begins the call for an iterator of requests, and returns gRPC's call.
    """

    def __init__(self, start: Callable[[Iterator[Message]], Any]) -> None:
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._inbox: SimpleQueue[Message | grpc.RpcError | None] = SimpleQueue()
        self._finished = False
        self._call = start(iter(self._outbox.get, None))
        threading.Thread(target=self._receive, name="emberpc-stream", daemon=True).start()

    @property
    def silent(self) -> bool:
        """Whether nothing has come in that was not taken."""
        return self._inbox.empty()

    def send(self, requests: Iterable[Message]) -> None:
        """Have requests sent as soon as the server takes them."""
        for request in requests:
            self._outbox.put(request)

    def finish(self) -> None:
        """Say that nothing more is sent; once is enough."""
        if not self._finished:
            self._finished = True
            self._outbox.put(None)

    def receive(self, timeout: float) -> Message | grpc.RpcError | None:
        """Return what comes in next.

        Raises:
            queue.Empty: nothing came in time.
        """
        return self._inbox.get(timeout=timeout)

    def close(self) -> None:
        """Give up the stream, unless it has ended."""
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


def run_stream(
    job: StreamJob[Item, Any, Any, Result],
    items: Iterator[Item],
    open_line: Callable[[], Line],
    connection: Connection,
    timeout: float | None,
) -> Iterator[Result]:
    """Give the results of a stream as they come; open it again where it breaks."""
    patience = Patience(connection.deadline(timeout))
    line = open_line()
    try:
        line.send(job.opening())
        while True:
            line.send(job.requests())
            if job.may_read and line.silent:
                _read(job, items)
                yield from job.refused()
                patience.restart()
                continue
            if job.sent:
                line.finish()
            if job.done:
                _await_end(line, patience)
                return
            try:
                answer = line.receive(patience.left)
            except Empty:
                raise patience.reason or connection.silence(job.call, timeout) from None
            if answer is None:
                raise ended_early()
            if isinstance(answer, Message):
                if results := job.take(answer):
                    yield from results
                    patience.restart()
                continue
            error = connection.error(answer, job.call, timeout)
            pause = patience.pause(error)
            if pause is None or not job.may_go_on(error):
                raise error from answer
            line.close()
            sleep(pause)
            line = open_line()
            line.send(job.opening())
    finally:
        line.close()


def _read(job: StreamJob[Item, Any, Any, Any], items: Iterator[Item]) -> None:
    """Read the items of one request."""
    while not job.read_enough:
        try:
            item = next(items)
        except StopIteration:
            job.exhausted = True
        else:
            job.add(item)


def _await_end(line: Line, patience: Patience) -> None:
    """Let a stream end that has answered everything; how it does makes no difference any more."""
    with suppress(Empty):
        while isinstance(line.receive(patience.left), Message):
            pass
