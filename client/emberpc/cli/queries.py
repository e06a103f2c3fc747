"""Read the queries of `emberpc search --file`: JSON Lines, a query in each line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.input_files import LineFile
from emberpc.client import EmberpcError, InputError, InputTypeError, RecordId, SearchQuery

#: Fields of a query, with their types. The first three state what to search for.
_KINDS: dict[str, tuple[type, str]] = {
    "text": (str, "a string"),
    "vector": (list, "a list of numbers"),
    "id": (str, "a string, the id of a record"),
    "where": (str, "a string, a filter"),
    "top_k": (int, "a whole number"),
    "ef": (int, "a whole number"),
}
_TARGETS = ("text", "vector", "id")


class QueryFile:
    """The queries of a file, or of stdin, with the line of each for messages.

    Args:
        path: the file; `-` for stdin.

    Attributes:
        queries: the queries, at least one.

    Raises:
        CliError: the file cannot be read or has no queries, or a line is not a query.
    """

    def __init__(self, path: str) -> None:
        self._source = LineFile(path)
        self.queries = [_query(fields, self._source.place(i)) for i, fields in enumerate(self._source.objects())]
        if not self.queries:
            raise CliError(f"{self._source.name} holds no queries; give it one JSON object a line")

    def line(self, number: int) -> int:
        """Return the line, from 1, of a query; `number` is its index, from 0."""
        return self._source.lines[number]

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Context manager that puts file and line into the message of an error of its block that names a query.

        An EmberpcError, InputError or InputTypeError with such a message becomes a CliError with the same exit code.
        """
        try:
            yield
        except (EmberpcError, InputError, InputTypeError) as error:
            located = self._source.locate(str(error), "queries")
            if located == str(error):
                raise
            raise CliError(in_cli_terms(located), exit_code(error) or ExitCode.INTERNAL) from error


def _query(fields: dict[str, Any], place: str) -> SearchQuery:
    """Return the query of a line. A field that is null counts as absent.

    Args:
        fields: the JSON object of the line.
        place: file and line, for messages.

    Raises:
        CliError: the object is not a query. The client checks the numbers, the filter and the vector.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in _KINDS:
            raise CliError(f"{place}: there is a field {reprlib.repr(name)}; a query has {', '.join(_KINDS)}")
        kind, words = _KINDS[name]
        if type(value) is not kind:
            raise CliError(f"{place}: {name} is {reprlib.repr(value)}; it must be {words}")
    targets = [name for name in _TARGETS if name in given]
    if len(targets) != 1:
        found = " and ".join(targets) or "none of them"
        raise CliError(f"{place}: give one of text, vector and id; there is {found}")
    wanted = given[targets[0]]
    return SearchQuery(
        RecordId(wanted) if targets == ["id"] else wanted,
        where=given.get("where"),
        top_k=given.get("top_k"),
        ef=given.get("ef", 0),
    )
