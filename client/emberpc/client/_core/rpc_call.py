"""Descriptions of calls, for both clients to run: request, decoded response, pages and steps. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from emberpc.client._core import checks
from emberpc.client.exceptions import EmberpcError, Internal
from emberpc.wire.vectors import VectorFormatError

Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")
Item = TypeVar("Item")


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
        vector: the caller's name of the vector of an item, with `{}` for its index in the caller's list, such as
            `records[{}].vector`. It replaces the name `vectors[…]` in errors of the server. Empty: no name is replaced.
    """

    method: Method[Response]
    request: Message
    decode: Callable[[Response], Result]
    items: str = ""
    first: int = 0
    count: int = 1
    halves: Callable[[], Sequence[Call[Response, Result]]] | None = None
    vector: str = ""

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
            raise Internal(f"the server's response to {self.method.path} contradicts itself: {error}") from error


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
                f"the server's response to {self._call.method.path} is empty; it is another version, or broken"
            )
        return self._last.so_far


def check_count(got: int, wanted: int, what: str) -> None:
    """Raise Internal if a response has `got` items and not `wanted` items; `what` names the items in the message."""
    if got != wanted:
        raise Internal(f"the server answered with {got} {what} for {wanted}; it is another version, or broken")
