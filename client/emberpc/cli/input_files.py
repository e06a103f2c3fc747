"""Read texts and records from line files: plain text, JSON Lines and tables. An error about a line names the line."""

from __future__ import annotations

import csv
import json
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from emberpc.bundle.json_objects import RepeatedKeyError, unique_keys
from emberpc.cli.column_types import ColumnTypes
from emberpc.cli.content_ids import ContentIds
from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError
from emberpc.cli.output import note
from emberpc.cli.record_sources import RECORD_KEYS, OnRejected, RecordError, raise_error
from emberpc.client import InputError, InputTypeError, InvalidArgument

#: Fields that the server sets. A file may have them, since `collection records --json` prints them. They are not
#: written; `upsert --check-revisions` compares `revision`.
_OUTPUT_KEYS = ("revision", "create_time", "update_time")
#: Columns of a table that are not metadata fields.
_RECORD_COLUMNS = ("id", "text", "label", "metadata")
#: Extensions of the names of JSON Lines files.
JSON_LINES = (".jsonl", ".ndjson")
#: Delimiters of tables by the extensions of their names.
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
#: Names of an item in messages, by the field of the request that has the items.
_ITEMS = {"texts": "text", "records": "record", "queries": "query"}
#: Extensions of JSON Lines files and of tables.
LINE_FILES = (*JSON_LINES, *_DELIMITERS)


class LineFile:
    """A file of texts or records, or stdin, to read once. `texts` and `records` keep the line of each item, for errors.

    Args:
        path: the file; `-` for stdin.
        types: values of --types: the types of the metadata columns of a table.
        with_revisions: whether each record must have a `revision`; for JSON Lines only.

    Raises:
        CliError: a type is invalid, there are types and the file is not a table, or `with_revisions` is true and the
            file is a table. The file is not opened yet.

    Attributes:
        name: name of the file in messages.
        lines: item i, counted from 0, began in line `lines[i]`, counted from 1.
        revisions: with `with_revisions`, `revisions[i]` is the `revision` field of record i.
    """

    def __init__(self, path: str, types: Sequence[str] = (), *, with_revisions: bool = False) -> None:
        self.name = "stdin" if path == "-" else path
        self.lines: list[int] = []
        self.revisions: list[int] = []
        self._path = path
        self._types = ColumnTypes(types)
        self._with_revisions = with_revisions
        #: Makes the ids of a table without the column `id`; None for other files, and before the header is read.
        self._content_ids: ContentIds | None = None
        if self._types and Path(path).suffix.lower() not in _DELIMITERS:
            raise CliError(f"--types is for tables ({', '.join(_DELIMITERS)}), and {self.name} is none; leave it out")
        if with_revisions and Path(path).suffix.lower() in _DELIMITERS:
            raise CliError(f"--check-revisions is for JSON Lines, and {self.name} is a table; leave it out")

    def texts(self) -> list[str]:
        """Return the file's lines without line ends, one text each.

        Raises:
            CliError: the name has the extension of a file of records, the file is empty or cannot be read, or a line is
                empty, only white space or not UTF-8.
        """
        self._check_is_text()
        with self._opened() as file:
            texts = [self._decoded(number, line).rstrip("\r\n") for number, line in self._lines(file)]
        for number, text in enumerate(texts, 1):
            if not text.strip():
                self._refuse(number, "the line is empty; remove it: each line must be a text")
        self.lines = list(range(1, len(texts) + 1))
        if not texts:
            raise CliError(f"{self.name} is empty; give it one text a line")
        return texts

    def numbered(self) -> Iterator[tuple[str, str]]:
        """Return an iterator over (number from 1 as a str, text) of each line, read lazily; empty lines are included.

        `lines` is not filled.

        Raises:
            CliError: the name has the extension of a file of records; or, when a line is read, the file cannot be read
                or the line is not UTF-8.
        """
        self._check_is_text()
        return self._numbered()

    def _numbered(self) -> Iterator[tuple[str, str]]:
        with self._opened() as file:
            for number, line in self._lines(file):
                yield str(number), self._decoded(number, line).rstrip("\r\n")

    def count(self) -> int | None:
        """Return the number of lines, header and empty lines included; None for a pipe, which can be read only once.

        This reads a file from start to end.

        Raises:
            CliError: the file cannot be opened.
            OSError: the file cannot be read further.
        """
        if self._path == "-" or Path(self._path).is_fifo() or Path(self._path).is_char_device():
            return None
        with self._opened() as file:
            return sum(1 for _ in self._lines(file))

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield records as dicts, read lazily.

        Files named `.jsonl` or `.ndjson`, and stdin, have JSON Lines. Files named `.csv` or `.tsv` have a table with
        the columns `id` and any of `text`, `label` and `metadata` (a JSON object). Every other column is a metadata
        field, of strings or of the type that --types states; a column `vector` is refused. In a table with `text` and
        without `id`, each id is made of the text, and rows that repeat an earlier row are left out; see `ContentIds`.
        Empty lines are skipped.

        Args:
            refused: called with the error of each line that is not a record; if it returns, reading continues. By
                default the first error is raised.

        Raises:
            CliError: the file cannot be read, its name has another extension, the header of a table is wrong, or a
                table has a line that is not UTF-8 or wrong quotes, so that the next row cannot be found.
        """
        suffix = Path(self._path).suffix.lower()
        if self._path == "-" or suffix in JSON_LINES:
            parse = self._json_records
        elif suffix in _DELIMITERS:
            parse = self._table_records
        else:
            known = ", ".join(LINE_FILES)
            raise CliError(
                f"{self.name}: cannot tell what it holds by its name; name it with one of {known}, give - to "
                "read JSON Lines from stdin, or take `emberpc collection import` for Parquet and for folders"
            )
        with self._opened() as file:
            for number, record in parse(self._lines(file), refused):
                self.lines.append(number)
                yield record
        if self._content_ids is not None and self._content_ids.repeated:
            note(f"{self.name}: rows that repeat an earlier row and were left out: {self._content_ids.repeated}")

    def objects(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON object of each line of JSON Lines, read lazily. Empty lines are skipped.

        Raises:
            CliError: the file cannot be read, or a line is not UTF-8 or not a JSON object.
        """
        with self._opened() as file:
            for number, line in self._lines(file):
                if (text := self._decoded(number, line)).strip():
                    found = self._object(number, text)
                    self.lines.append(number)
                    yield found

    def place(self, item: int) -> str:
        """Return the file and the first line of an item that was read, such as `records.jsonl:3`; `item` is from 0."""
        return f"{self.name}:{self.lines[item]}"

    def locate(self, message: str, field: str) -> str:
        """Return an error message with each item of `field` that was read replaced by file and line.

        For example, if record 3 is in line 5, `records[3].text is empty` becomes `records.jsonl:5: text is empty`, and
        `records[3] has …` becomes `records.jsonl:5: the record has …`.
        """

        def place(found: re.Match[str]) -> str:
            item, end = int(found[1]), found[2]
            if item >= len(self.lines):
                return found[0]
            if end == " " and not found.start():
                return f"{self.place(item)}: the {_ITEMS[field]} "
            return self.place(item) + (": " if end in (".", ": ") else end)

        return re.sub(rf"\b{field}\[(\d+)\](\.|: | |)", place, message)

    @contextmanager
    def locating(self, field: str, collection: str = "") -> Iterator[None]:
        """Context manager that converts InvalidArgument, InputError and InputTypeError of its block to CliError.

        In the message, each item that was read is replaced by file and line, as by `locate`. The message is then put in
        the terms of the command line by `in_cli_terms`.

        Args:
            field: field of the request that has the items: a key of `_ITEMS`.
            collection: the collection that the items are written to; empty: they are not written.
        """
        try:
            yield
        except (InvalidArgument, InputError, InputTypeError) as error:
            raise CliError(in_cli_terms(self.locate(str(error), field), collection)) from error

    def _check_is_text(self) -> None:
        """Raise CliError if the name has the extension of a file of records, which must not be read as plain text."""
        suffix = Path(self._path).suffix.lower()
        if suffix in (*LINE_FILES, ".parquet"):
            command = f" such as `jq -r .text {self.name}`" if suffix in JSON_LINES else ""
            raise CliError(
                f"{self.name} is a file of records ({suffix}), but --file reads one text from each line; copy the "
                f"texts to a .txt file, or pass --file - and pipe in the output of a command{command} that prints them"
            )

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self._path == "-":
            yield sys.stdin.buffer
            return
        try:
            file = Path(self._path).open("rb")  # noqa: SIM115 - closed below; reading must not be inside this `try`
        except OSError as error:
            raise CliError(f"{self.name} cannot be read: {error.strerror}; check path and permissions") from error
        with file:
            yield file

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line with its line end) for each line; raise CliError if the file cannot be read."""
        lines = iter(file)
        for number in range(1, sys.maxsize):
            try:
                line = next(lines, None)
            except OSError as error:
                raise CliError(f"{self.name} cannot be read: {error.strerror or error}") from error
            if line is None:
                return
            yield number, line

    def _decoded(self, number: int, line: bytes) -> str:
        try:
            # `utf-8-sig` removes a byte order mark, which some programs write before the first line.
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self._refuse(number, f"byte {error.start + 1} of the line is not UTF-8; convert the file to it")

    def _json_records(
        self, lines: Iterable[tuple[int, bytes]], refused: OnRejected
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in lines:
            try:
                text = self._decoded(number, line)
                record = self._json_record(number, text) if text.strip() else None
            except RecordError as error:
                refused(error)
                continue
            if record is not None:
                yield number, record

    def _json_record(self, number: int, line: str) -> dict[str, Any]:
        record = self._object(number, line)
        for key in record:
            if key not in RECORD_KEYS + _OUTPUT_KEYS:
                self._refuse(number, f"there is a field {reprlib.repr(key)}; a record has {', '.join(RECORD_KEYS)}")
        if "id" not in record:
            self._refuse(number, "there is no id; give each record one")
        if self._with_revisions:
            revision = record.get("revision")
            if type(revision) is not int or revision < 0:
                shown = "missing" if revision is None else repr(revision)
                self._refuse(number, f"revision is {shown}; it must be a whole number, 0 for a new record")
            self.revisions.append(revision)
        return {key: value for key, value in record.items() if key in RECORD_KEYS}

    def _object(self, number: int, line: str) -> dict[str, Any]:
        return json_object(line, "the line", lambda problem: self._refuse(number, problem))

    def _table_records(
        self, lines: Iterable[tuple[int, bytes]], refused: OnRejected
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        last = ""

        def decoded() -> Iterator[str]:
            nonlocal last
            for number, line in lines:
                last = self._decoded(number, line)
                yield last

        reader = csv.reader(decoded(), delimiter=_DELIMITERS[Path(self._path).suffix.lower()], strict=True)
        header: list[str] = []
        before = 0
        while True:
            try:
                with _long_cells():
                    row = next(reader, None)
            except csv.Error:
                if "\r" in last.rstrip("\r\n"):
                    self._refuse(before + 1, "a line ends with CR alone, without LF; save the file again with both")
                self._refuse(before + 1, "the table is damaged here; check the quotes")
            if row is None:
                if not header and self._path != "-":
                    self._refuse(1, "the table is empty; its first line must name the columns")
                return
            number, before = before + 1, reader.line_num
            if not row:
                continue
            if not header:
                header = self._header(number, row)
                continue
            try:
                record = self._table_record(number, header, row)
            except RecordError as error:
                refused(error)
                continue
            if record is not None:
                yield number, record

    def _header(self, number: int, row: list[str]) -> list[str]:
        header = [title.strip() for title in row]
        wanted = _DELIMITERS[Path(self._path).suffix.lower()]
        other = next((sign for sign in _DELIMITER_NAMES if sign != wanted and len(row) == 1 and sign in row[0]), None)
        if other:
            self._refuse(
                number,
                f"the columns seem to be separated by {_DELIMITER_NAMES[other]}, but this kind of file needs "
                f"{_DELIMITER_NAMES[wanted]}; save the file again with {_DELIMITER_NAMES[wanted]} between the columns",
            )
        id_like = next((title for title in header if title.lower() == "id"), "id")
        if "id" not in header and "text" in header and id_like != "id":
            self._refuse(
                number,
                f"the column {id_like!r} may be meant as id: rename it to id; or rename or remove it, then ids are "
                "made from the texts",
            )
        if "id" not in header and "text" not in header:
            self._refuse(
                number,
                f"there is no column id; the columns are {', '.join(header)}; name a column id, or name the column of "
                "the texts text: then ids are made from the texts",
            )
        if "vector" in header:
            self._refuse(number, "there is a column vector, and a table has no vectors; write JSON Lines")
        for title in header:
            if not title or header.count(title) > 1:
                self._refuse(number, f"the column {title!r} is there twice, or has no name; give each its own")
        if problem := self._types.problem([title for title in header if title not in _RECORD_COLUMNS]):
            raise CliError(f"{self.name}:{number}: {problem}")
        if "id" not in header:
            self._content_ids = ContentIds()
            note(f"{self.name} has no column id: each id is made of the text, so the same text is one record")
        return header

    def _table_record(self, number: int, header: list[str], row: list[str]) -> dict[str, Any] | None:
        """Return the record of a row. None: the id is made of the text, and the row repeats an earlier row.

        Raises:
            RecordError: the row is not a valid record.
        """
        if len(row) != len(header):
            self._refuse(number, f"there are {len(row)} cells for {len(header)} columns; check the delimiters")
        cells = dict(zip(header, row, strict=True))
        metadata = cells.pop("metadata", "").strip()
        record: dict[str, Any] = {key: cells.pop(key) for key in ("id", "text", "label") if key in cells}
        fields: dict[str, Any] = {**self._types.convert(cells, lambda problem: self._refuse(number, problem))}
        if metadata:
            given = json_object(metadata, "metadata", lambda problem: self._refuse(number, problem))
            if both := next((key for key in given if key in cells), None):
                self._refuse(number, f"metadata has a field {both!r}, and there is a column of that name; keep one")
            fields |= given
        record["metadata"] = fields
        if self._content_ids is None:
            return record
        return self._content_ids.add(number, record, lambda problem: self._refuse(number, problem))

    def _refuse(self, number: int, problem: str) -> NoReturn:
        raise RecordError(f"{self.name}:{number}: {problem}")


def json_object(text: str, what: str, refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    """Parse a JSON object and return it as a dict. NaN and Infinity are not JSON.

    Args:
        text: the JSON.
        what: name of the object in messages.
        refuse: called with the problem if `text` is not a JSON object, is nested too deeply to parse, or repeats a key
            in one of its objects; must raise an exception.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        refuse(f"{what} has {error.key!r} twice; keep one")
    except (ValueError, RecursionError):
        refuse(f"{what} is not JSON")
    if not isinstance(value, Mapping):
        refuse(f"{what} is no JSON object; write {{…}}")
    return dict(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Context manager that raises the process-wide limit of characters in a CSV cell during its block.

    The default of the module `csv` is 131,072, and texts may be longer.
    """
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
