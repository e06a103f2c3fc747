"""What a stream of any kind has read, sent and got back, and how long it waits; nothing here does I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client._core.calls import Call
from emberpc.client.exceptions import EmberpcError, Internal, ResourceExhausted, Unavailable

#: Pauses before a broken stream is opened again, in seconds: the first, and the longest that they grow to.
_PAUSES = (0.1, 2.0)
#: So often a stream is opened that no server has taken yet, as often as any other call is tried.
_OPENINGS = 5

Item = TypeVar("Item")
Result = TypeVar("Result")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class StreamJob(ABC, Generic[Item, Request, Response, Result]):
    """The items of one stream that are read and not yet answered, and what is to be sent of them.

    Args:
        batch_size: items of one request.
        window: most items that are read and not yet answered.

    Attributes:
        call: for errors, and to read answers with.
        exhausted: whether the caller has no more items.
        greeted: whether the server has answered the first message of this connection.
        taken: whether a server has answered the first message of any.
    """

    call: Call[Response, Sequence[Result]]

    def __init__(self, batch_size: int, window: int) -> None:
        self._window = checks.count(window, "window", 1)
        self.batch_size = min(checks.count(batch_size, "batch_size", 1), self._window)
        self.exhausted = False
        self.greeted = False
        self.taken = False
        self._openings = 0

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Items that are read and not answered."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether what is read and not answered is as large as it may be."""

    @property
    @abstractmethod
    def unsent(self) -> int:
        """Items that are read and not sent, and those that cannot be."""

    @abstractmethod
    def add(self, item: Item) -> None:
        """Take in one item of the caller's; one that cannot be sent is a result already."""

    @abstractmethod
    def refused(self) -> list[Result]:
        """Return the results of items that cannot be sent, once."""

    @abstractmethod
    def first_message(self) -> Request:
        """Return the first message of a connection; what other ones left unanswered is to be sent again."""

    @abstractmethod
    def further_messages(self) -> Iterator[Request]:
        """Return the messages that send what was not sent yet."""

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
        """Whether `requests` has given all that there is to send."""
        return self.exhausted and self.greeted

    @property
    def done(self) -> bool:
        """Whether every item was answered, and there are no more."""
        return self.exhausted and not self.waiting

    def opening(self) -> list[Request]:
        """Return the first message of a connection.

        Items follow when the server has answered this one. Until then it may refuse the stream, and grpc.aio may
        report a request that fails to be sent in place of the reason (grpc/grpc#36066).
        """
        self.greeted = False
        self._openings += 1
        return [self.first_message()]

    def requests(self) -> Iterator[Request]:
        """Return the messages that send what was not sent yet, once the server has answered the first one."""
        return self.further_messages() if self.greeted else iter(())

    def may_go_on(self, error: EmberpcError) -> bool:
        """Whether another connection may do better: the server went away, has not come yet, or has no room now."""
        passing = isinstance(error, (Unavailable, ResourceExhausted))
        if not self.taken:
            return passing and self._openings < _OPENINGS
        return passing or (isinstance(error, Internal) and not error.reason)

    def take(self, response: Any) -> Sequence[Result]:
        """Return the results in a message of the server.

        Raises:
            Internal: it contradicts itself, or answers what was not asked.
            FailedPrecondition: what the server serves has changed, and the stream cannot go on.
        """
        return self.call.read(response)


class Patience:
    """How long a stream may go without a result, and how long to wait before it is opened again.

    Attributes:
        reason: why the last connection broke; None if none has since the last result.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Begin anew: there was a result."""
        self.reason: EmberpcError | None = None
        self._until = monotonic() + self._seconds
        self._pause = _PAUSES[0]

    @property
    def left(self) -> float:
        """Seconds that may still pass."""
        return max(self._until - monotonic(), 0.0)

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next try after an error; None if there is no time for one."""
        # grpc.aio may report a request that failed to be sent, as INTERNAL, in place of why (grpc/grpc#36066).
        if self.reason is None or not isinstance(error, Internal):
            self.reason = error
        pause = max(self._pause, error.retry_after or 0.0)
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None


def ended_early() -> Internal:
    """Return the error for a server that ended a stream without having answered all of it."""
    return Internal("the server ended the stream before it had answered all of it; it is another version, or broken")
