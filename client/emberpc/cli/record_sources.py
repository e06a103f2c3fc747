"""The Protocol of record sources (line files, Parquet files, folders), and the error for an invalid record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeAlias

from emberpc.cli.errors import CliError

#: Fields that a record to write may have.
RECORD_KEYS = ("id", "text", "metadata", "label", "vector", "time_to_live")


class RecordError(CliError):
    """An item of a source is not a valid record. The source can still read the items that follow."""


#: Called with the error of each item that is not a valid record.
OnRejected: TypeAlias = Callable[[RecordError], object]


def raise_error(error: RecordError) -> NoReturn:
    """Raise `error`; as the `refused` of a source, this ends the reading at the first invalid item."""
    raise error


class Source(Protocol):
    """A source of records, which are read once and in order.

    Attributes:
        name: name of the source in messages.
    """

    name: str

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield records, read lazily: dicts whose keys are in RECORD_KEYS, and with `id` in any case.

        Args:
            refused: called with the error of each item that is not a record; if it returns, reading continues. By
                default the first error is raised.

        Raises:
            CliError: the source cannot be read, or has another format.
        """

    def count(self) -> int | None:
        """Return the approximate number of records before they are read; None if it is unknown.

        Raises:
            CliError: the source cannot be read.
        """

    def place(self, item: int) -> str:
        """Return the place in the source of the record that was yielded as number `item`, from 0.

        A place is, for example, `records.jsonl:3`.
        """
