"""Labelled texts from CSV, TSV, JSONL or Parquet files, with errors that name the row."""

from __future__ import annotations

import csv
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberpc.export.errors import ExportError

_LOGGER = logging.getLogger(__name__)
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_FORMATS = ".csv, .tsv, .jsonl or .parquet"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts from a file, the labels of each, and where each stands there, such as `line 17`."""

    path: Path
    texts: list[str]
    labels: list[tuple[str, ...]]
    places: list[str]

    def conflicts(self) -> dict[str, list[str]]:
        """Return the texts that stand there with different labels, with where and which: `line 17: cancel`."""
        seen: dict[str, dict[tuple[str, ...], str]] = {}
        for text, labels, place in zip(self.texts, self.labels, self.places, strict=True):
            seen.setdefault(text, {}).setdefault(labels, f"{place}: {', '.join(labels) or 'no label'}")
        return {text: list(places.values()) for text, places in seen.items() if len(places) > 1}


def read_labelled(
    path: Path | str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    separator: str | None = None,
) -> LabelledTexts:
    """Read a file of labelled texts.

    Args:
        path: CSV or TSV with a header, JSONL, or Parquet (needs the extra `parquet`); UTF-8.
        text_column: the column with the texts.
        label_column: the column with the labels; space around a label is left out, and its Unicode form is made NFC.
        separator: what stands between the labels of a text that has several; in JSONL and Parquet they
            may also be a list, and may be missing. Default: every text has one label.

    Raises:
        ExportError: the file cannot be read, has no such column, or a row has no text or no label.
    """
    path = Path(path)
    texts: list[str] = []
    labels: list[tuple[str, ...]] = []
    places: list[str] = []
    for place, row in read_rows(path):
        texts.append(text_of(path, place, row, text_column))
        if separator is None:
            labels.append((label_of(path, place, row, label_column),))
        else:
            labels.append(_several(path, place, row, label_column, separator))
        places.append(place)
    return LabelledTexts(path, texts, labels, places)


def read_texts(path: Path | str, *, text_column: str = "text") -> list[str]:
    """Read a file of texts without labels, as `read_labelled` does.

    Raises:
        ExportError: the file cannot be read, has no such column, or a row has no text.
    """
    path = Path(path)
    return [text_of(path, place, row, text_column) for place, row in read_rows(path)]


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of a file, each with its place there.

    Raises:
        ExportError: the file cannot be read, or has no rows.
    """
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ExportError(f"{path}: its name must end in {_FORMATS}")
    try:
        rows = list(readers[path.suffix](path))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}, {_undecodable(path)}: it is not UTF-8; save the file as UTF-8") from error
    if not rows:
        raise ExportError(f"{path} has no rows")
    return rows


def text_of(path: Path, place: str, row: dict[str, Any], column: str) -> str:
    """Return a cell that must hold a text.

    Raises:
        ExportError: there is no such column, or it is empty or holds something else.
    """
    value = _cell(path, place, row, column)
    if value is None or not str(value).strip():
        raise ExportError(f"{path}, {place}: {column} is empty; fill it in or remove the row")
    if "\0" in str(value):
        raise ExportError(f"{path}, {place}: {column} holds a NUL character, which no text has; remove it")
    if type(value) not in (str, int):
        kind = type(value).__name__
        raise ExportError(f"{path}, {place}: {column} is of type {kind}; it must be a text, or a whole number")
    return str(value)


def label_of(path: Path, place: str, row: dict[str, Any], column: str) -> str:
    """Return a cell that must hold a label, without space around it and in Unicode's normal form NFC.

    Raises:
        ExportError: as `text_of`.
    """
    return _plain_label(text_of(path, place, row, column))


def _plain_label(value: str | int) -> str:
    """Return a label so that two that look alike are one."""
    return unicodedata.normalize("NFC", str(value)).strip()


def report_alike(path: Path, labels: Iterable[str]) -> None:
    """Warn of labels that differ only in case: they are different labels, and perhaps not meant so."""
    alike: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        alike.setdefault(label.casefold(), []).append(label)
    found = [same for same in alike.values() if len(same) > 1]
    if found:
        _LOGGER.warning(
            "%s: %d labels differ from another one only in case, such as %s; they are taken for different labels; "
            "write them alike if they are one",
            path,
            sum(map(len, found)) - len(found),
            " and ".join(map(repr, found[0])),
        )


def _undecodable(path: Path) -> str:
    """Return the line, and the byte in it, where a file stops being UTF-8; both count from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "its end"


def _several(path: Path, place: str, row: dict[str, Any], column: str, separator: str) -> tuple[str, ...]:
    """Return the labels of a cell that may hold several, each once, in alphabetical order."""
    value = _cell(path, place, row, column)
    parts = value if isinstance(value, list) else [] if value is None else str(value).split(separator)
    if wrong := [part for part in parts if type(part) not in (str, int)]:
        raise ExportError(f"{path}, {place}: {column} holds {wrong[0]!r}, which is no label; write texts")
    return tuple(sorted({_plain_label(part) for part in parts} - {""}))


def _cell(path: Path, place: str, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ExportError(f"{path}, {place}: there is no column {column!r}; there are: {', '.join(row)}")
    return row[column]


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_header(path, reader.fieldnames or (), delimiter)
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise ExportError(
                        f"{path}, {where}: it does not have {len(reader.fieldnames or ())} columns as the header has; "
                        "is a text with a comma not in quotes?"
                    )
                yield where, row
        except csv.Error as error:
            raise ExportError(
                f"{path}, line {reader.line_num + 1}: it cannot be read, nor what follows it; "
                f"mend the quotes there, and let no text have more than {csv.field_size_limit()} characters"
            ) from error


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Raise ExportError if a header has a name twice, or is one cell that another delimiter would cut."""
    if len(names) == 1 and (
        other := next((sign for sign in _DELIMITERS if sign != delimiter and sign in names[0]), "")
    ):
        raise ExportError(
            f"{path}, line 1: the columns seem to be separated by {_DELIMITERS[other]}, and {path.suffix} has "
            f"{_DELIMITERS[delimiter]} between them; save it again with those"
        )
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"{path}, line 1: the column {name!r} is there twice; give each column its own name")


def _tsv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return _csv(path, "\t")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except _TwiceError as error:
                raise ExportError(f"{path}, line {number}: the field {error.key!r} is there twice; keep one") from error
            except (ValueError, RecursionError) as error:
                raise ExportError(f"{path}, line {number}: it is not JSON; write one object a line") from error
            if not isinstance(row, dict):
                raise ExportError(f"{path}, line {number}: it is not a JSON object; write one object a line")
            yield f"line {number}", row


class _TwiceError(ValueError):
    """A JSON object has a key twice; `key` says which."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; json itself takes the last of two with the same key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return found


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ExportError(
            f"{path}: reading Parquet needs pyarrow, which is not installed; run: pip install 'emberpc[parquet]'"
        ) from error
    try:
        names = pq.read_schema(path).names
        for name in names:
            if names.count(name) > 1:
                raise ExportError(f"{path}: the column {name!r} is there twice; give each column its own name")
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ExportError(f"{path} is not Parquet; write it again") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row
