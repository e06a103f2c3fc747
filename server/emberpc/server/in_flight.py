"""Limit the memory that all calls hold together: bytes of large requests and responses, and open request streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from emberpc.server.errors import Code, ServiceError

#: Minimum number of bytes that are counted: of a response, or of all requests that one call holds. Smaller ones are not
#: counted, so that short calls are not refused for their bytes; `_CALLS` in `app` limits the calls of a connection.
LARGE = 64 * 1024
#: Seconds after which a refused caller is asked to retry.
_RETRY_SECONDS = 1.0


class BytesInFlight:
    """Counts the bytes of the requests in progress and of the responses that callers have not read.

    A response is added only if it has `LARGE` bytes or more, the requests of a call only if they have that many
    together. gRPC keeps a response until its caller has read it, and a call that waits keeps its request. Without a
    limit, 100 calls with responses of 30 MB took 8.7 GB. Use an object from one event loop only.

    Args:
        limit: maximum number of bytes of all messages together. A message may have more if nothing else is counted. A
            response is counted when the request of its call no longer is.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = 0

    def add(self, size: int) -> None:
        """Add a message of `size` bytes to the count.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, to be retried after 1 s, if the count is not 0 and would exceed the limit;
                the count then stays unchanged.
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
        """Subtract a message of `size` bytes from the count."""
        self.total -= size


class Streams:
    """Counts the open request streams. Use an object from one event loop only.

    Args:
        limit: maximum number of streams that are open at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.open = 0
        #: Held by the stream whose message is being decoded. If all streams decoded a message in the same iteration of
        #: the event loop, other calls would wait for all of them: with 60 streams, health checks took 11 seconds on a
        #: busy host.
        self.turn = asyncio.Semaphore(1)

    def add(self) -> None:
        """Add one stream to the count.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, to be retried after 1 s, if as many streams are open as the limit allows.
        """
        if self.open >= self._limit:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"{self.open} streams of requests are open, the limit of this server (its max_streams); try again in "
                f"{_RETRY_SECONDS:g} s, or open fewer streams at a time",
                reason="TOO_MANY_STREAMS",
                retry_after=_RETRY_SECONDS,
            )
        self.open += 1

    def remove(self) -> None:
        """Subtract one stream from the count."""
        self.open -= 1


class Held:
    """Counts what one call holds: the bytes of its request, or its request stream and the bytes of the messages.

    All these bytes are in the count `in_flight` while they are at least `LARGE`, and none of them while they are less.

    Args:
        in_flight: the count of the bytes of all calls.
        streams: the count of the streams of all calls.
    """

    def __init__(self, in_flight: BytesInFlight, streams: Streams) -> None:
        self._in_flight = in_flight
        self.streams = streams
        self._size = 0
        self._counted = 0
        self._has_stream = False

    def open_stream(self) -> None:
        """Add the request stream of the call to the count of streams.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too many streams are open.
        """
        self.streams.add()
        self._has_stream = True

    def add(self, size: int) -> None:
        """Add a message of `size` bytes to the bytes that the call holds.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if all calls would hold too many bytes; the message is not counted then.
        """
        self._set(self._size + size)

    def remove(self, size: int) -> None:
        """Subtract a message of `size` bytes from the bytes that the call holds."""
        self._set(self._size - size)

    def release(self) -> None:
        """Remove the bytes and the stream of the call from the counts; to be called at the end of the call."""
        self._set(0)
        if self._has_stream:
            self._has_stream = False
            self.streams.remove()

    def _set(self, size: int) -> None:
        """Set the number of bytes that the call holds, and adjust the count of all calls.

        If the number grows, the errors are those of `add`, and nothing is changed then.
        """
        counted = size if size >= LARGE else 0
        if counted > self._counted:
            self._in_flight.add(counted - self._counted)
        else:
            self._in_flight.remove(self._counted - counted)
        self._size, self._counted = size, counted


class HeldMessage(NamedTuple):
    """A message of a request stream whose bytes stay counted until `release` is called, or the call ends.

    Attributes:
        size: bytes of the message.
        release: subtracts the bytes of the message from those that the call holds. To be called at most once.
    """

    size: int
    release: Callable[[], None]


class HoldingStream(Protocol):
    """A request stream whose messages are counted by their bytes.

    The bytes of a message are counted until the next message is read, or after `hold` until the message is released; at
    most until the call ends.
    """

    def hold(self) -> HeldMessage:
        """Keep the latest message counted until its `release` or the call's end. Hold a message at most once."""
