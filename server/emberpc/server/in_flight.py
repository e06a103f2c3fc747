"""The bytes of large requests and responses that the server holds at a time."""

from __future__ import annotations

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


class HeldBytes:
    """The bytes of the request, or of the latest message of the stream of requests, that one call holds."""

    def __init__(self, in_flight: BytesInFlight) -> None:
        self._in_flight = in_flight
        self._size = 0

    def replace(self, size: int) -> None:
        """Count a message of `size` bytes instead of the one before; 0: none.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, see `BytesInFlight.add`; then none is counted.
        """
        before, self._size = self._size, 0
        self._in_flight.remove(before)
        if size >= LARGE:
            self._in_flight.add(size)
            self._size = size
