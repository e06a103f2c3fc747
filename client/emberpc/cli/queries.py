"""Read the queries of `emberpc search --file` in batches: JSON Lines, a query in each line."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.input_files import LineFile
from emberpc.cli.output import note
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
#: A batch ends with the query with which its hits, or the bytes of its texts and vectors, reach this number. The limits
#: bound the memory for a batch and its results.
_MAX_HITS, _MAX_BYTES = 20_000, 8 * 2**20
#: Matches the path of a query at the start of a message, with the index in the batch and the fields after the index.
_QUERY = re.compile(r"^queries\[(\d+)\]((?:\.\w+|\[\d+\])*)")
#: Matches the remedy for a record that is not found. The message starts with the id and names the query at the end.
_OTHER_RECORD = re.compile(r"\bgive another record in queries\[(\d+)\]$")
#: Remedies of the client or the server that name other searches than those of a file, with the remedies for a file.
_REMEDIES = (
    ("or search by a vector or a record id", "or search by vector or id"),
    ("split the request", "give a smaller --batch-size"),
)


class QueryFile:
    """The queries of a file, or of stdin, to read once. Only the queries of one batch are in memory.

    Args:
        path: the file; `-` for stdin. It is not opened yet.

    Attributes:
        answered: number of queries of the batches before.
    """

    def __init__(self, path: str) -> None:
        self._source = LineFile(path)
        self._batch: list[SearchQuery] = []
        #: The line of the last query of the batches before.
        self._last_line = 0
        self.answered = 0

    @property
    def lines(self) -> Sequence[int]:
        """The line, from 1, of each query of the batch."""
        return self._source.lines

    def count(self) -> int | None:
        """Return the number of lines, empty lines included; None for a pipe. Raises the errors of `LineFile.count`."""
        return self._source.count()

    def batches(self, size: int, top_k: int) -> Iterator[list[SearchQuery]]:
        """Yield the queries in batches, read lazily. When the next batch is taken, the batch before counts as answered.

        Args:
            size: maximum number of queries of a batch.
            top_k: maximum number of hits of a query without a `top_k` of its own.

        Raises:
            CliError: the file cannot be read or has no queries, or a line is not a query. The queries before this line
                that are not in a batch yet are left out.
        """
        hits = weight = 0
        for fields in self._source.objects():
            query = _query(fields, self._source.place(len(self.lines) - 1))
            self._batch.append(query)
            hits += top_k if query.top_k is None else query.top_k
            weight += _bytes_of(query)
            if len(self._batch) >= size or hits >= _MAX_HITS or weight >= _MAX_BYTES:
                yield self._batch
                self._end_batch()
                hits = weight = 0
        if self._batch:
            yield self._batch
            self._end_batch()
        if not self.answered:
            raise CliError(f"{self._source.name} holds no queries; give it one JSON object a line")

    def _end_batch(self) -> None:
        self.answered += len(self._batch)
        self._last_line = self.lines[-1]
        self._batch = []
        # Without this, the lines of all queries would stay in memory.
        self._source.lines.clear()

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Context manager that converts an EmberpcError, InputError, InputTypeError or CliError of its block.

        The CliError that is raised instead has the same exit code. Its message begins with file and line if the error
        names a query, and it has fields of a line and options of the command instead of names of the API. If batches
        were answered before, the message also states the number of their queries, and the line of the last of them. At
        Ctrl-C, a note on stderr states both.
        """
        try:
            yield
        except (EmberpcError, InputError, InputTypeError, CliError) as error:
            message = str(error) if isinstance(error, CliError) else self._translated(str(error))
            if self.answered:
                message += f"; {self._reached()}"
            raise CliError(message, exit_code(error) or ExitCode.INTERNAL) from error
        except KeyboardInterrupt:
            if self.answered:
                note(self._reached())
            raise

    def _reached(self) -> str:
        return f"answered queries of {self._source.name}: {self.answered}, up to line {self._last_line}"

    def _translated(self, message: str) -> str:
        """Return a message of the client or the server about the batch in the terms of the file and the command."""
        for remedy, translated in _REMEDIES:
            message = message.replace(remedy, translated)
        place = ""
        if found := _OTHER_RECORD.search(message):
            place, message = self._place(found), message[: found.start()] + "give another id"
        elif found := _QUERY.search(message):
            place, message = self._place(found), self._field(found) + message[found.end() :]
        return in_cli_terms(place + message, batches=True)

    def _place(self, found: re.Match[str]) -> str:
        return f"{self._source.place(int(found[1]))}: "

    def _field(self, found: re.Match[str]) -> str:
        """Return the name, in the terms of a line, of the field that a match of `_QUERY` names."""
        path = found[2].removeprefix(".")
        if not path:
            return "the query"
        if path in ("query", "query.id"):
            query = self._batch[int(found[1])].query
            return "text" if isinstance(query, str) else "id" if isinstance(query, RecordId) else "vector"
        first, _, rest = path.partition(".")
        name = {"record_id": "id", "filter": "where"}.get(first, first)
        return f"{name}: {rest}" if rest else name


def _bytes_of(query: SearchQuery) -> int:
    """Return about how many bytes the text, the id or the vector of a query has in memory."""
    if isinstance(query.query, np.ndarray):
        return query.query.nbytes
    return len(query.query.id if isinstance(query.query, RecordId) else query.query)


def _query(fields: dict[str, Any], place: str) -> SearchQuery:
    """Return the query of a line. A field that is null counts as absent.

    Args:
        fields: the JSON object of the line.
        place: file and line, for messages.

    Raises:
        CliError: the object is not a query. The client checks the range of the numbers, and the filter.
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
    if targets == ["id"]:
        wanted = RecordId(wanted)
    elif targets == ["vector"]:
        wanted = _vector(wanted, place)
    return SearchQuery(wanted, where=given.get("where"), top_k=given.get("top_k"), ef=given.get("ef", 0))


def _vector(values: list[Any], place: str) -> npt.NDArray[np.float64]:
    """Return a vector, float64 (dimensions,). Raise CliError if it is empty, or an item is not a number."""
    if not values:
        raise CliError(f"{place}: vector is empty; give the numbers of a vector")
    wrong = next((i for i, value in enumerate(values) if type(value) not in (int, float)), None)
    if wrong is not None:
        raise CliError(f"{place}: vector[{wrong}] is {reprlib.repr(values[wrong])}; it must be a number")
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        raise CliError(f"{place}: vector has a number beyond float32; give numbers up to 3.4e38") from None
