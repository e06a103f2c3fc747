"""Descriptions of calls, and of calls with one joined result, for both clients to run. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client.exceptions import EmberpcError, InputError, InputTypeError, Internal, add_done
from emberpc.client.types import Progress
from emberpc.wire.vectors import VectorFormatError

Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")
Item = TypeVar("Item")
Part = TypeVar("Part")
Part_contra = TypeVar("Part_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class Method(Generic[Response]):
    """An RPC: its path, such as `/emberpc.v1.EmbeddingService/Embed`, and the type of its responses."""

    path: str
    response: type[Response]


@dataclass(frozen=True)
class Call(Generic[Response, Result]):
    """One call, and how to decode its response.

    Attributes:
        method: the RPC.
        request: the request. For a call with several requests, which are passed separately: a message that states the
            type of the requests.
        decode: returns the result for a response.
        items: name of the repeated field of the request that has one part of the caller's list; empty: there is no
            list.
        first: index, in the caller's list, of the first item of this part; 0 without a list.
        count: number of items of this part; 1 without a list.
        halves: returns two calls for the same items, whose joined results are the result of this call. The call
            must have at least two items. None: the call cannot be divided.
    """

    method: Method[Response]
    request: Message
    decode: Callable[[Response], Result]
    items: str = ""
    first: int = 0
    count: int = 1
    halves: Callable[[], Sequence[Call[Response, Result]]] | None = None

    def smaller(self, error: EmberpcError) -> Sequence[Call[Response, Result]]:
        """Return the smaller calls that replace this call, which failed with `error`: those of `halves`.

        Raises:
            EmberpcError: `error` itself, unless its reason is RESPONSE_TOO_LARGE, the call has at least two items, and
                `halves` is not None.
        """
        if error.reason != "RESPONSE_TOO_LARGE" or self.count < 2 or self.halves is None:
            raise error
        return self.halves()

    def read(self, response: Response) -> Result:
        """Return the result of `decode` for a response.

        Raises:
            Internal: the vectors in the response contradict their description, or the response has another number of
                items than the request.
            Exception: another error of `decode`, for example of a function that the caller gave.
        """
        try:
            return self.decode(response)
        except VectorFormatError as error:
            raise Internal(f"the server's answer to {self.method.path} contradicts itself: {error}") from error


@dataclass(frozen=True)
class Page(Generic[Item]):
    """One page of a list: its items, and the token that requests the next page; empty token: this is the last page."""

    items: Sequence[Item]
    next_token: str


@dataclass(frozen=True)
class Step(Generic[Item]):
    """One decoded response of a call that reports progress: name of the present stage, and the result so far."""

    stage: str
    so_far: Item


class Steps(Generic[Item]):
    """Takes the steps of one call, and keeps the last one, which contains the result.

    Args:
        call: the call; errors name its method.
        progress: called with the name of the stage of each step; None: no calls.

    Raises:
        InputTypeError: `progress` is not a function.
    """

    def __init__(self, call: Call[Response, Step[Item]], progress: Callable[[str], None] | None) -> None:
        checks.function(progress, "progress")
        self._call = call
        self._progress = progress
        self._last: Step[Item] | None = None

    def take(self, step: Step[Item]) -> None:
        """Keep `step`, the next step, in place of the step before, and call `progress` with its stage."""
        self._last = step
        if self._progress is not None:
            self._progress(step.stage)

    def result(self) -> Item:
        """Return the result in the last step.

        Raises:
            Internal: there was no step.
        """
        if self._last is None:
            raise Internal(
                f"the server's answer to {self._call.method.path} is empty; it is another version, or broken"
            )
        return self._last.so_far


class Collector(Protocol[Part_contra, Result_co]):
    """Joins the results of `JoinedCalls` to one result."""

    def add(self, part: Part_contra) -> None:
        """Add `part`, the result of the next call. Results must be added in the order of the calls."""

    def result(self) -> Result_co:
        """Return the joined result of all calls whose results were added."""


class JoinedCalls(Generic[Part, Result]):
    """Calls whose joined results are one result. They can be run once.

    Args:
        calls: the calls; each may be built when it is needed.
        collector: joins the results, in the order of the calls.
        progress: called after each call with the number of items that all calls so far have done; None: no calls.
        ordered: whether a call may start only after the response to the call before, as for writes. Otherwise the
            `in_flight` of the client limits the calls at a time.
        partly_done: text that is added to the message of an error if earlier calls wrote items; `{}` in the text is
            replaced by the number of these items. Empty: errors are not changed.

    Raises:
        InputTypeError: `progress` is not a function.
    """

    def __init__(
        self,
        calls: Iterable[Call[Response, Part]],
        collector: Collector[Part, Result],
        *,
        progress: Progress | None = None,
        ordered: bool = False,
        partly_done: str = "",
    ) -> None:
        checks.function(progress, "progress")
        self.calls = calls
        self._partly_done = partly_done
        self.ordered = ordered
        self._collector = collector
        self._progress = progress
        self._done = 0

    def take(self, call: Call[Response, Part], part: Part) -> None:
        """Add `part`, the result of `call`, which is the next call, and report the items done so far to `progress`."""
        self._collector.add(part)
        self._done += call.count
        if self._progress is not None:
            self._progress(self._done)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Context manager that adds to an error of its block the number of items that earlier calls wrote.

        It changes an EmberpcError, InputError or InputTypeError in place (see `add_done`), and raises it again. Errors
        are not changed if no item is done, or if `partly_done` is empty.
        """
        try:
            yield
        except (EmberpcError, InputError, InputTypeError) as error:
            if self._done and self._partly_done:
                add_done(error, self._done, self._partly_done.format(self._done))
            raise

    def result(self) -> Result:
        """Return the joined result of the calls whose results `take` added."""
        return self._collector.result()


class ListCollector(Generic[Item]):
    """Joins the lists that several calls return to one list, in the order of the calls."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def add(self, part: Sequence[Item]) -> None:
        """Append `part`, the items that the next call returned."""
        self._items.extend(part)

    def result(self) -> list[Item]:
        """Return the items that were added, in this order."""
        return self._items


def divisible(
    make: Callable[[int, list[Item]], Call[Response, Result]], first: int, part: list[Item]
) -> Callable[[], Sequence[Call[Response, Result]]]:
    """Return a function, for `Call.halves`, that divides the call for one part of a list into two calls.

    Args:
        make: builds the call for a part. Its arguments are the caller's index of the first item, and the part.
        first: the caller's index of the first item of `part`.
        part: the part to divide, of at least two items.
    """
    middle = len(part) // 2
    return lambda: [make(first, part[:middle]), make(first + middle, part[middle:])]


def check_count(got: int, wanted: int, what: str) -> None:
    """Raise Internal if a response has `got` items and not `wanted` items; `what` names the items in the message."""
    if got != wanted:
        raise Internal(f"the server answered with {got} {what} for {wanted}; it is another version, or broken")


#: Most bytes of the items in one request, unless the request has a single item. Half of a server's default limit
#: (`max_message_bytes`, 16 MiB), since the rest of the request needs room too.
_MAX_CHUNK_BYTES = 8 * 2**20


def chunks(items: Iterable[Item], size: int, weigh: Callable[[Item], int]) -> Iterator[tuple[int, list[Item]]]:
    """Divide items into lists of at most `size` items and 8 MiB. An item of more than 8 MiB gets its own list.

    Args:
        items: the items; read as needed.
        size: most items of a list, at least 1.
        weigh: returns the bytes of an item, exactly or as an upper limit.

    Yields:
        The index of the list's first item among all items, and the list.
    """
    first, chunk, weight = 0, list[Item](), 0
    for item in items:
        bytes_of_item = weigh(item)
        if chunk and weight + bytes_of_item > _MAX_CHUNK_BYTES:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
        chunk.append(item)
        weight += bytes_of_item
        # A list of `size` items is yielded before the next item is read. So the list is sent even if reading the next
        # item raises an error.
        if len(chunk) == size:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
    if chunk:
        yield first, chunk
