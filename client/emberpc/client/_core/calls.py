"""What the two clients run: calls, and jobs of several calls. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

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
    """A method of the API: its path, such as `/emberpc.v1.EmbeddingService/Embed`, and what it answers with."""

    path: str
    response: type[Response]


@dataclass(frozen=True)
class Call(Generic[Response, Result]):
    """One call, and how to read its answer.

    A call that carries one part of the caller's list says which: `count` items
    from `first` on, in the repeated field `items` of the request. `halves` makes
    two calls for the same items, which together have the same result; None: the
    call cannot be divided.
    """

    method: Method[Response]
    request: Message
    decode: Callable[[Response], Result]
    items: str = ""
    first: int = 0
    count: int = 1
    halves: Callable[[], Sequence[Call[Response, Result]]] | None = None

    def smaller(self, error: EmberpcError) -> Sequence[Call[Response, Result]]:
        """Return the calls to make instead of this one, which failed.

        Raises:
            EmberpcError: the error itself, unless the response would be too large and the call can be divided.
        """
        if error.reason != "RESPONSE_TOO_LARGE" or self.count < 2 or self.halves is None:
            raise error
        return self.halves()

    def read(self, response: Response) -> Result:
        """Return what the answer means.

        Raises:
            Internal: it contradicts itself, or has another number of items than the request.
        """
        try:
            return self.decode(response)
        except VectorFormatError as error:
            raise Internal(f"the server's answer to {self.method.path} contradicts itself: {error}") from error


@dataclass(frozen=True)
class Page(Generic[Item]):
    """One page of a list; an empty token says that it is the last."""

    items: Sequence[Item]
    next_token: str


@dataclass(frozen=True)
class Step(Generic[Item]):
    """One message of a call that tells how far it is: what is being done, and what there is so far."""

    stage: str
    so_far: Item


class Steps(Generic[Item]):
    """Takes the steps of a call, of which the last one holds its result.

    Args:
        call: the call.
        told: told what is being done.
    """

    def __init__(self, call: Call[Response, Step[Item]], told: Callable[[str], None] | None) -> None:
        self._call = call
        self._told = told
        self._last: Step[Item] | None = None

    def take(self, step: Step[Item]) -> None:
        """Take the next step."""
        self._last = step
        if self._told is not None:
            self._told(step.stage)

    def result(self) -> Item:
        """Return what the last step held.

        Raises:
            Internal: there was none.
        """
        if self._last is None:
            raise Internal(
                f"the server's answer to {self._call.method.path} is empty; it is another version, or broken"
            )
        return self._last.so_far


class Collector(Protocol[Part_contra, Result_co]):
    """Makes one result of the results of several calls."""

    def add(self, part: Part_contra) -> None:
        """Take the next call's result, in order."""

    def result(self) -> Result_co:
        """Return the whole."""


class Job(Generic[Part, Result]):
    """Calls that together make one result.

    Args:
        calls: the calls; produced as they are needed.
        collector: takes their results in the order of the calls.
        progress: told after each call how many items are done.
        ordered: whether a call may start only when the one before is answered,
            as writes must; otherwise a few are in flight at a time.
        partly_done: says in an error which items the calls before it have written; `{}` stands for their number.
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
        self.calls = calls
        self._partly_done = partly_done
        self.ordered = ordered
        self._collector = collector
        self._progress = progress
        self._done = 0

    def take(self, call: Call[Response, Part], part: Part) -> None:
        """Take the result of the next call."""
        self._collector.add(part)
        self._done += call.count
        if self._progress is not None:
            self._progress(self._done)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Add to an error that ends the job which items were written before it."""
        try:
            yield
        except (EmberpcError, InputError, InputTypeError) as error:
            if self._done and self._partly_done:
                add_done(error, self._done, self._partly_done.format(self._done))
            raise

    def result(self) -> Result:
        """Return the whole."""
        return self._collector.result()


class ListCollector(Generic[Item]):
    """Joins lists."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def add(self, part: Sequence[Item]) -> None:
        """Take the next items."""
        self._items.extend(part)

    def result(self) -> list[Item]:
        """Return all items."""
        return self._items


def divisible(
    make: Callable[[int, list[Item]], Call[Response, Result]], first: int, part: list[Item]
) -> Callable[[], Sequence[Call[Response, Result]]]:
    """Return `Call.halves` of the call for one part of a list.

    Args:
        make: makes the call for a part, from the place of the part's first item in the whole list, and the part.
        first: place of this part's first item.
        part: this part.
    """
    middle = len(part) // 2
    return lambda: [make(first, part[:middle]), make(first + middle, part[middle:])]


def check_count(got: int, wanted: int, what: str) -> None:
    """Raise Internal unless the answer has as many items as the request."""
    if got != wanted:
        raise Internal(f"the server answered with {got} {what} for {wanted}; it is another version, or broken")


#: Most bytes (UTF-8) of texts in one request, well below what a server takes.
_MAX_CHUNK_BYTES = 8 * 2**20


def chunks(items: Iterable[Item], size: int, weigh: Callable[[Item], int]) -> Iterator[tuple[int, list[Item]]]:
    """Cut items into lists of at most `size`, and of at most 8 MiB unless one item alone is larger.

    Args:
        items: what to cut; taken as needed.
        size: most items of a list.
        weigh: gives the bytes of an item.

    Yields:
        The place of the list's first item in the whole, and the list.
    """
    first, chunk, weight = 0, list[Item](), 0
    for item in items:
        bytes_of_item = weigh(item)
        if chunk and weight + bytes_of_item > _MAX_CHUNK_BYTES:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
        chunk.append(item)
        weight += bytes_of_item
        # Given out at once, so that a wrong item behind it does not hold it back.
        if len(chunk) == size:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
    if chunk:
        yield first, chunk
