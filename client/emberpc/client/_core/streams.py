"""State of a stream: which items are read, sent and answered, and how long to wait. Nothing here does I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client._core.rpc_call import Call
from emberpc.client.exceptions import REQUEST_TOO_LARGE, EmberpcError, Internal, ResourceExhausted, Unavailable

#: Pauses before a broken stream is opened again, in seconds: the first pause, and the longest. A pause is twice the one
#: before, up to the longest.
_PAUSES = (0.1, 2.0)
#: Maximum number of connections that a stream opens until a server accepts one, as many as the tries of any other call.
_OPENINGS = 5

Item = TypeVar("Item")
Result = TypeVar("Result")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class StreamState(ABC, Generic[Item, Request, Response, Result]):
    """The items of one stream that are read and not yet answered, and the requests that send them.

    Args:
        batch_size: maximum number of items of a request.
        window: maximum number of items that are read and not yet answered.

    Attributes:
        call: the RPC, and how to decode its responses; set by the subclass.
        batch_size: maximum number of items of a request; `window` if that is less.
        exhausted: whether the caller has no more items; set by `read_items`.
        greeted: whether the server has answered the first request of the present connection.
        accepted: whether a server has answered the first request of any connection of this stream.

    Raises:
        InputTypeError: `batch_size` or `window` is not an int.
        InputError: `batch_size` or `window` is below 1, or not below 2**31.
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
        """Number of items that are read and not answered, without those that cannot be sent."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether the items that are read and not answered have reached their limit of bytes or characters."""

    @property
    @abstractmethod
    def unsent(self) -> int:
        """Number of items that are read and not yet sent.

        Items that cannot be sent count until `refused` returns them. It depends on the subclass whether items count
        that must be sent again over a new connection.
        """

    @abstractmethod
    def add(self, item: Item) -> None:
        """Add an item of the caller.

        An item that cannot be sent becomes a result with an error, which `refused` returns.

        Raises:
            InputTypeError: the item of a stream of texts is neither a text nor (id, text).
        """

    @abstractmethod
    def refused(self) -> list[Result]:
        """Return the results, with errors, of the items that cannot be sent.

        Only items that were added since the last call of this method count.
        """

    @abstractmethod
    def first_message(self) -> Request:
        """Return the first request of a connection, and mark all unanswered items as not sent."""

    @abstractmethod
    def further_messages(self) -> Iterator[Request]:
        """Yield the requests with the items that are not sent yet, and mark these items as sent.

        The iterator must be read to its end, since an item may be marked before its request is yielded.
        """

    @property
    def may_read(self) -> bool:
        """Whether to read items of the caller now.

        True if the server has answered the first request of the connection, the caller may have more items, the window
        has space for `batch_size` items, and `full` is false.
        """
        space = self.greeted and self._window - self.waiting >= self.batch_size and not self.full
        return space and not self.exhausted

    @property
    def read_enough(self) -> bool:
        """Whether reading stops: `unsent` is at least `batch_size`, the caller has no more items, or `full` is true."""
        return self.exhausted or self.unsent >= self.batch_size or self.full

    @property
    def sent(self) -> bool:
        """Whether no further request follows on this connection. Call this after `requests` was read to its end.

        True if the caller has no more items, and the server has answered the first request of the connection.
        """
        return self.exhausted and self.greeted

    @property
    def done(self) -> bool:
        """Whether the caller has no more items, and no item waits for a response (see `waiting`)."""
        return self.exhausted and not self.waiting

    def opening(self) -> list[Request]:
        """Return the first request of a new connection, and count the connection.

        Items follow only when the server has answered the first request, since the server may refuse the stream. If
        further requests were on their way at a refusal, grpc.aio might report that they could not be sent, and not the
        server's reason (grpc/grpc#36066).
        """
        self.greeted = False
        self._openings += 1
        return [self.first_message()]

    def requests(self) -> Iterator[Request]:
        """Return the iterator of `further_messages`.

        It is empty before the server has answered the first request of the connection.
        """
        return self.further_messages() if self.greeted else iter(())

    def may_go_on(self, error: EmberpcError) -> bool:
        """Return whether to open another connection after `error`.

        True for Unavailable, and for ResourceExhausted unless a request has more bytes than the server allows. After a
        server has accepted the stream (`accepted`), also true for an Internal without a reason, which does not come
        from an emberpc server but from gRPC itself. Before, at most 5 connections are opened; after that, their number
        has no limit.
        """
        # A request that is larger than the server's limit would be refused by every connection.
        passing = isinstance(error, (Unavailable, ResourceExhausted)) and error.reason != REQUEST_TOO_LARGE
        if not self.accepted:
            return passing and self._openings < _OPENINGS
        return passing or (isinstance(error, Internal) and not error.reason)

    def take(self, response: Any) -> Sequence[Result]:
        """Return the results in `response`, the next response of the present connection, and mark items as answered.

        The response to the first request has no results.

        Raises:
            Internal: the response contradicts itself, or answers an item that does not wait for a response.
            FailedPrecondition: the model is another one than when the stream began, so the stream cannot continue.
        """
        return self.call.read(response)


class Patience:
    """The timeout of a stream, and the pauses before the stream is opened again.

    `restart` must be called after each response with results, when the caller has taken the results, and after each
    reading of items. So the time that the caller takes does not count.

    Args:
        seconds: maximum seconds that may pass without a result.

    Attributes:
        reason: why a connection broke since the last restart, see `pause`; None if none broke.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Restart the timeout, and forget broken connections.

        The next pause before the stream is opened again is the shortest one, and `reason`, why a connection broke, is
        None.
        """
        self.reason: EmberpcError | None = None
        self._until = monotonic() + self._seconds
        self._pause = _PAUSES[0]

    @property
    def left(self) -> float:
        """Seconds until the timeout; 0 after it."""
        return max(self._until - monotonic(), 0.0)

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next connection; None if the timeout would pass during the wait.

        Call this once for each broken connection, since the next pause is then twice as long, up to the limit of
        `_PAUSES`. A pause is never shorter than `error.retry_after`.

        `error` is why the connection broke. The attribute `reason` is set to `error`, unless `error` is Internal and
        `reason` is set already.
        """
        # After a connection broke, grpc.aio may report only that a request could not be sent, as INTERNAL
        # (grpc/grpc#36066). That must not replace an earlier reason.
        if self.reason is None or not isinstance(error, Internal):
            self.reason = error
        pause = max(self._pause, error.retry_after or 0.0)
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None


def ended_early() -> Internal:
    """Return the error to raise if the server ended a stream before it had answered all items."""
    return Internal("the server ended the stream before it had answered all of it; it is another version, or broken")
