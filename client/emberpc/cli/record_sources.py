"""The Protocol of record sources (line files, Parquet files, folders), and the error for an invalid record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeAlias

from emberpc.cli.errors import CliError

#: Fields that a record to write may have. Only `id` is required.
RECORD_KEYS = ("id", "text", "metadata", "label", "vector", "time_to_live")


class RecordError(CliError):
    """An item of a source is not a valid record.

    If a source calls `refused` with this error, it can read the items that follow. If it raises the error, it cannot.
    """


#: Called with the error of each item that is not a valid record. If it returns, the source reads the next item.
OnRejected: TypeAlias = Callable[[RecordError], object]


def raise_error(error: RecordError) -> NoReturn:
    """Raise `error`. As `refused` of `RecordSource.records`, this ends the reading at the first invalid item."""
    raise error


class RecordSource(Protocol):
    """A source of records. Its user calls `records` once.

    Attributes:
        name: name of the source in messages.
    """

    name: str

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield records, read lazily: dicts with the key `id` and any other keys of RECORD_KEYS.

        Args:
            refused: called with the error of each item that is not a record; if it returns, reading continues. By
                default the first error is raised.

        Raises:
            CliError: the source cannot be read further, or has another format.
        """

    def count(self) -> int | None:
        """Return about how many records the source has, read or not, to show progress; None if it is unknown.

        Raises:
            CliError: the source cannot be read.
        """

    def place(self, item: int) -> str:
        """Return the place of a record in the source, such as `records.jsonl:3`.

        `item`: number of the record among those that `records` has yielded, from 0.
        """
