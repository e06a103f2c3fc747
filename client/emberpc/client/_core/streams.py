"""State of a stream of items: which are read, sent and answered, and how long to wait. Nothing here does I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client._core.calls import Call
from emberpc.client.exceptions import REQUEST_TOO_LARGE, EmberpcError, Internal, ResourceExhausted, Unavailable

#: Pauses before a broken stream is opened again, in seconds: the first, and the longest that they grow to.
_PAUSES = (0.1, 2.0)
#: How often a stream is opened until a server accepts it: as often as any other call is tried.
_OPENINGS = 5

Item = TypeVar("Item")
Result = TypeVar("Result")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class StreamJob(ABC, Generic[Item, Request, Response, Result]):
    """The items of one stream that are read and not yet answered, and the requests that send them.

    Args:
        batch_size: items per request.
        window: most items that are read and not yet answered.

    Attributes:
        call: the RPC, and how to decode its responses.
        exhausted: whether the caller has no more items.
        greeted: whether the server has answered the first request of this connection.
        accepted: whether a server has answered the first request of any connection.
    """

    call: Call[Response, Sequence[Result]]

    def __init__(self, batch_size: int, window: int) -> None:
        self._window = checks.count(window, "window", 1)
        self.batch_size = min(checks.count(batch_size, "batch_size", 1), self._window)
        self.exhausted = False
        self.greeted = False
        self.accepted = False
        self._openings = 0

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Number of items that are read and not answered."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether the items that are read and not answered have reached their limit of bytes or characters."""

    @property
    @abstractmethod
    def unsent(self) -> int:
        """Number of items that are read and not sent, those that cannot be sent included."""

    @abstractmethod
    def add(self, item: Item) -> None:
        """Add an item of the caller. An item that cannot be sent becomes a result with an error."""

    @abstractmethod
    def refused(self) -> list[Result]:
        """Return the results of items that cannot be sent, each once."""

    @abstractmethod
    def first_message(self) -> Request:
        """Return the first request of a connection, and mark all unanswered items as not sent."""

    @abstractmethod
    def further_messages(self) -> Iterator[Request]:
        """Return the requests that send the items that are not sent."""

    @property
    def may_read(self) -> bool:
        """Whether there is room for the items of another request."""
        room = self.greeted and self._window - self.waiting >= self.batch_size and not self.full
        return room and not self.exhausted

    @property
    def read_enough(self) -> bool:
        """Whether the items that are read and not sent are enough for a request."""
        return self.exhausted or self.unsent >= self.batch_size or self.full

    @property
    def sent(self) -> bool:
        """Whether `requests` has returned all requests."""
        return self.exhausted and self.greeted

    @property
    def done(self) -> bool:
        """Whether every item is answered, and the caller has no more."""
        return self.exhausted and not self.waiting

    def opening(self) -> list[Request]:
        """Return the first request of a connection.

        Items follow when the server has answered it. Until then the server may refuse the stream, and grpc.aio may
        report a request that could not be sent instead of the reason (grpc/grpc#36066).
        """
        self.greeted = False
        self._openings += 1
        return [self.first_message()]

    def requests(self) -> Iterator[Request]:
        """Return the requests that send the items that are not sent; none before the first request is answered."""
        return self.further_messages() if self.greeted else iter(())

    def may_go_on(self, error: EmberpcError) -> bool:
        """Return whether another connection may succeed: the server is away, starting, or out of room at present."""
        # A request that is larger than the server's limit would be refused again.
        passing = isinstance(error, (Unavailable, ResourceExhausted)) and error.reason != REQUEST_TOO_LARGE
        if not self.accepted:
            return passing and self._openings < _OPENINGS
        return passing or (isinstance(error, Internal) and not error.reason)

    def take(self, response: Any) -> Sequence[Result]:
        """Return the results in a response.

        Raises:
            Internal: the response contradicts itself, or answers an item that was not sent.
            FailedPrecondition: the server replaced the model, and the stream cannot continue.
        """
        return self.call.read(response)


class Patience:
    """How long a stream may go without a result, and how long to wait before it is opened again.

    Attributes:
        reason: why the last connection broke; None if no connection broke since the last result.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Restart the timeout after a result."""
        self.reason: EmberpcError | None = None
        self._until = monotonic() + self._seconds
        self._pause = _PAUSES[0]

    @property
    def left(self) -> float:
        """Seconds until the timeout."""
        return max(self._until - monotonic(), 0.0)

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next connection; None if there is no time for another one."""
        # grpc.aio may report a request that could not be sent, as INTERNAL, instead of the reason (grpc/grpc#36066).
        if self.reason is None or not isinstance(error, Internal):
            self.reason = error
        pause = max(self._pause, error.retry_after or 0.0)
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None


def ended_early() -> Internal:
    """Return the error for a server that ended a stream before it answered all items."""
    return Internal("the server ended the stream before it had answered all of it; it is another version, or broken")
