"""What records come from: a file of lines, a table, a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, TypeAlias

from emberpc.cli.errors import CliError

#: What a record that is to be written may have.
RECORD_KEYS = ("id", "text", "metadata", "label", "vector", "time_to_live")


class RecordError(CliError):
    """What should be a record is none; those after it can be read all the same."""


#: Told of what is no record.
Refused: TypeAlias = Callable[[RecordError], object]


def raising(error: RecordError) -> NoReturn:
    """Raise the error: what is no record ends the reading."""
    raise error


class Source(Protocol):
    """Something that holds records, read one after the other and once.

    Attributes:
        name: what messages call it.
    """

    name: str

    def records(self, refused: Refused = raising) -> Iterator[dict[str, Any]]:
        """Read records as they are taken: dicts with RECORD_KEYS, `id` among them.

        Args:
            refused: told of each thing that is no record; the others are read all the same if it returns.

        Raises:
            CliError: it cannot be read, or is of another kind.
        """

    def count(self) -> int | None:
        """Return about how many records there are, before they are read; None if that is not known.

        Raises:
            CliError: it cannot be read.
        """

    def place(self, item: int) -> str:
        """Say where the record stands that was read as number `item`, from 0, such as `records.jsonl:3`."""
