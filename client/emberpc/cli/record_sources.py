"""The Protocol of record sources (line files, Parquet files, folders), and the error for an invalid record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeAlias

from emberpc.cli.errors import CliError

#: Fields of a record to write.
RECORD_KEYS = ("id", "text", "metadata", "label", "vector", "time_to_live")


class RecordError(CliError):
    """An item of a source is not a valid record. The items after it can still be read."""


#: Called with the error of each item that is not a valid record.
OnRejected: TypeAlias = Callable[[RecordError], object]


def raise_error(error: RecordError) -> NoReturn:
    """Raise the error, which ends the reading."""
    raise error


class Source(Protocol):
    """A source of records, which are read once and in order.

    Attributes:
        name: name of the source in messages.
    """

    name: str

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield records, read lazily: dicts whose keys are from RECORD_KEYS; `id` is always present.

        Args:
            refused: called with the error of each item that is not a record; if it returns, reading continues.

        Raises:
            CliError: the source cannot be read, or has another format.
        """

    def count(self) -> int | None:
        """Return the approximate number of records before they are read; None if it is unknown.

        Raises:
            CliError: the source cannot be read.
        """

    def place(self, item: int) -> str:
        """Return the place of record number `item`, from 0, in the source, such as `records.jsonl:3`."""
