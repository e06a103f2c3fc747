"""Limits of what calls hold at a time: bytes of large requests and responses, and open streams of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from emberpc.server.errors import Code, ServiceError

#: Bytes from which on a message is counted; the number of smaller ones is bounded by other limits.
LARGE = 64 * 1024
_RETRY_SECONDS = 1.0


class BytesInFlight:
    """Bytes of the requests at work and of the responses that callers have not read. To be used from one event loop.

    gRPC keeps a response until its caller has read it, and a call that waits keeps its request: 100 calls with
    responses of 30 MB took 8.7 GB.

    Args:
        limit: most bytes; one message alone may have more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = 0

    def add(self, size: int) -> None:
        """Count a message of `size` bytes in.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if all messages would have more bytes than the limit.
        """
        if self.total and self.total + size > self._limit:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"requests at work and responses that were not read have {self.total} bytes, this call has {size} "
                f"more, and the server holds at most {self._limit} (its max_in_flight_bytes); try again in "
                f"{_RETRY_SECONDS:g} s, or send fewer large calls at a time",
                reason="TOO_MANY_BYTES",
                retry_after=_RETRY_SECONDS,
            )
        self.total += size

    def remove(self, size: int) -> None:
        """Count a message of `size` bytes out."""
        self.total -= size


class Streams:
    """The open streams of requests. To be used from one event loop.

    Args:
        limit: most streams that are open at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.open = 0
        #: Held by the stream whose message is decoded. If all streams decoded in one round of the event loop, other
        #: calls would wait for all of them: 60 streams kept health checks waiting for 11 seconds on a busy host.
        self.turn = asyncio.Semaphore(1)

    def add(self) -> None:
        """Count a stream in.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the most streams are open.
        """
        if self.open >= self._limit:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"{self.open} streams of requests are open, the most of this server (its max_streams); try again in "
                f"{_RETRY_SECONDS:g} s, or open fewer streams at a time",
                reason="TOO_MANY_STREAMS",
                retry_after=_RETRY_SECONDS,
            )
        self.open += 1

    def remove(self) -> None:
        """Count a stream out."""
        self.open -= 1


class Held:
    """What one call holds: the bytes of its request, or of the messages of its stream, and that stream.

    A call that holds fewer than `LARGE` bytes is not counted.
    """

    def __init__(self, in_flight: BytesInFlight, streams: Streams) -> None:
        self._in_flight = in_flight
        self.streams = streams
        self._size = 0
        self._counted = 0
        self._has_stream = False

    def open_stream(self) -> None:
        """Count the call's stream of requests in.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, see `Streams.add`.
        """
        self.streams.add()
        self._has_stream = True

    def add(self, size: int) -> None:
        """Count a message of `size` bytes in.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, see `BytesInFlight.add`; then the message is not counted.
        """
        self._set(self._size + size)

    def remove(self, size: int) -> None:
        """Count a message of `size` bytes out."""
        self._set(self._size - size)

    def release(self) -> None:
        """Count everything out, at the end of the call."""
        self._set(0)
        if self._has_stream:
            self._has_stream = False
            self.streams.remove()

    def _set(self, size: int) -> None:
        """Set the bytes that the call holds."""
        counted = size if size >= LARGE else 0
        if counted > self._counted:
            self._in_flight.add(counted - self._counted)
        else:
            self._in_flight.remove(self._counted - counted)
        self._size, self._counted = size, counted


class HeldMessage(NamedTuple):
    """A message of a stream that stays counted when the next one is read.

    Attributes:
        size: bytes of the message.
        release: counts the message out.
    """

    size: int
    release: Callable[[], None]


class HoldingStream(Protocol):
    """A stream of messages. A message is counted until the next one is read, or until it is released."""

    def hold(self) -> HeldMessage:
        """Keep the latest message counted until it is released; to be called once for a message."""
