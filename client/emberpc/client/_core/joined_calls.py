"""Several calls whose results are joined to one result, for both clients to run. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from emberpc.client._core import checks
from emberpc.client._core.rpc_call import Call, Item, Response, Result
from emberpc.client.exceptions import EmberpcError, InputError, InputTypeError, add_done
from emberpc.client.types import Progress

Part = TypeVar("Part")
Part_contra = TypeVar("Part_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


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
