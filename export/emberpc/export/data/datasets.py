"""Read texts, with or without labels, from CSV, TSV, JSONL or Parquet files; the error of a row names the row."""

from __future__ import annotations

import csv
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from emberpc.bundle.json_objects import RepeatedKeyError, unique_keys
from emberpc.export.errors import ExportError

_LOGGER = logging.getLogger(__name__)
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_FORMATS = ".csv, .tsv, .jsonl, .ndjson or .parquet"
#: Code points of invisible characters that other programs leave at the ends of a cell and that `str.strip` does not
#: remove, such as the soft hyphen, zero width spaces and joiners, and bidirectional marks. The server's lexical search
#: ignores them, too. It also ignores characters that are not listed here, such as the variation selectors and tags
#: that are part of an emoji, and Hangul fillers, which are letters.
_INVISIBLE = (
    *(0xAD, 0x34F, 0x61C, 0x17B4, 0x17B5, 0xFEFF),
    *(*range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)),
    *(*range(0xFFF0, 0xFFF9), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B)),
)
#: White space (U+3000 is the last) and the characters of `_INVISIBLE`, which are removed at both ends of a label.
_AROUND = "".join([*filter(str.isspace, map(chr, range(0x3001))), *map(chr, _INVISIBLE)])
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of a file in their order, with the labels of each text, and its place in the file, such as `line 17`.

    `texts`, `labels` and `places` have the same length. The labels of a text are distinct and sorted.
    """

    path: Path
    texts: list[str]
    labels: list[tuple[str, ...]]
    places: list[str]

    def conflicts(self) -> dict[str, list[str]]:
        """Return the texts that occur with two or more different sets of labels.

        Returns:
            By text, the first place of each of its sets of labels, with the labels, such as `line 17: cancel`.
        """
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
        path: CSV or TSV with a header, JSONL, or Parquet (needs the extra `parquet`); UTF-8. See `read_rows`.
        text_column: name of the column with the texts.
        label_column: name of the column with the labels. White space and invisible characters around a label are
            removed, and the label is normalized to NFC.
        separator: separator between the labels of a text, which may have any number of labels. In JSONL and Parquet,
            the labels of a text may also be a list or null; in JSONL, they may be missing. None: every text has one
            label.

    Returns:
        The texts in the order of the file.

    Raises:
        ExportError: the file cannot be read (see `read_rows`) or lacks a column; a row has no text or (without
            separator) no label; a text or label is of another type than text or whole number, or has a NUL character or
            a lone surrogate; or the separator is empty.
    """
    path = Path(path)
    if separator == "":
        raise ExportError("the separator of labels is empty; give the text between two labels, such as ;")
    texts: list[str] = []
    labels: list[tuple[str, ...]] = []
    places: list[str] = []
    rows = read_rows(path)
    # With a separator, a row of JSONL may lack the label column. If all rows lack it, its name is wrong, and the first
    # row is an error.
    may_be_missing = separator is not None and any(label_column in row for _, row in rows)
    for place, row in rows:
        texts.append(text_of(path, place, row, text_column))
        if may_be_missing and label_column not in row:
            labels.append(())
        elif separator is None:
            labels.append((label_of(path, place, row, label_column),))
        else:
            labels.append(_several(path, place, row, label_column, separator))
        places.append(place)
    return LabelledTexts(path, texts, labels, places)


def read_texts(path: Path | str, *, text_column: str = "text") -> list[str]:
    """Return the texts of a CSV, TSV, JSONL or Parquet file, in their order; other columns are ignored.

    Args:
        path: the file, in UTF-8; CSV and TSV need a header.
        text_column: name of the column with the texts.

    Raises:
        ExportError: the file cannot be read (see `read_rows`), or `text_of` refuses the text of a row.
    """
    path = Path(path)
    return [text_of(path, place, row, text_column) for place, row in read_rows(path)]


def check_columns(path: Path, columns: Mapping[str, str]) -> None:
    """Check that the first row of a file can be read and has all of `columns`.

    Errors in later rows may not be found. A Parquet file is read as a whole.

    Args:
        path: the file.
        columns: for each column, what the user can do if the column has another name, as the end of a message.

    Raises:
        ExportError: the file cannot be read (see `read_rows`), or the row lacks a column.
    """
    ((place, row),) = read_rows(path, maximum=1)
    for column, remedy in columns.items():
        _cell(path, place, row, column, remedy)


def read_rows(path: Path, maximum: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a CSV, TSV, JSONL or Parquet file; empty lines are not rows.

    Args:
        path: the file; its suffix, in any case, says the format: `.csv`, `.tsv`, `.jsonl` or `.ndjson`, `.parquet`.
        maximum: maximum number of rows to return; None: all.

    Returns:
        For each row, its place in the file, and its cells by column. The place is the row's last line, such as
        `line 17`, or in Parquet the row's number, such as `row 17`; both count from 1.

    Raises:
        ExportError: the file cannot be read, has another suffix, is malformed or not UTF-8, or has no rows; or it is
            Parquet, and pyarrow is not installed.
    """
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ExportError(f"{path}: its name must end in {_FORMATS}")
    try:
        rows = list(islice(readers[suffix](path), maximum))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}; check path and permissions") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}, {_undecodable(path)}: it is not UTF-8; save the file as UTF-8") from error
    if not rows:
        raise ExportError(f"{path} has no rows; give it the names of the columns, and at least one row")
    return rows


def text_of(path: Path, place: str, row: dict[str, Any], column: str) -> str:
    """Return the text of a cell, unchanged; a whole number becomes text.

    Args:
        path: the file, for errors.
        place: place of the row, for errors.
        row: cells of the row by column.
        column: name of the column.

    Raises:
        ExportError: there is no such column; or the cell is empty or white space only, is neither text nor a whole
            number, or holds a NUL character or a lone surrogate.
    """
    return _filled(path, place, column, _text(path, place, column, _cell(path, place, row, column)))


def _text(path: Path, place: str, column: str, value: Any) -> str:
    """Return the text of a cell; an empty text for None. An int becomes text.

    Raises:
        ExportError: the cell holds another type (a bool and a float such as 3.0, too), a NUL character or a lone
            surrogate.
    """
    if value is None:
        return ""
    if type(value) not in (str, int):
        kind = type(value).__name__
        raise ExportError(f"{path}, {place}: {column} is of type {kind}; it must be a text, or a whole number")
    text = str(value)
    if "\0" in text:
        raise ExportError(f"{path}, {place}: {column} holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ExportError(
            f"{path}, {place}: {column} holds a lone surrogate, which is not a character; remove it"
        ) from error
    return text


def _filled(path: Path, place: str, column: str, text: str) -> str:
    if not text.strip():
        raise ExportError(f"{path}, {place}: {column} is empty; fill it in or remove the row")
    return text


def label_of(path: Path, place: str, row: dict[str, Any], column: str) -> str:
    """Return the label in a cell, normalized to NFC, without white space and invisible characters around it.

    Args:
        path: the file, for errors.
        place: place of the row, for errors.
        row: cells of the row by column.
        column: name of the column.

    Raises:
        ExportError: there is no such column, `text_of` refuses the cell, or nothing of it is left.
    """
    return _filled(path, place, column, _plain_label(text_of(path, place, row, column)))


def _plain_label(text: str) -> str:
    """Return a label normalized to NFC, without white space and invisible characters around it."""
    return unicodedata.normalize("NFC", text).strip(_AROUND)


def report_alike(path: Path, labels: Iterable[str]) -> None:
    """Log a warning if labels have the same form by `_comparable`, so that they hardly differ.

    These labels count as different, which may be unintended. `path` is the file, for the warning.
    """
    alike: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        alike.setdefault(_comparable(label), []).append(label)
    found = [same for same in alike.values() if len(same) > 1]
    if found:
        _LOGGER.warning(
            "%s: labels that differ from another one only in case, space, invisible characters or how a number is "
            "written: %d, such as %s; they count as different labels; write them alike if they are the same",
            path,
            sum(map(len, found)) - len(found),
            " and ".join(map(repr, found[0])),
        )


def _comparable(label: str) -> str:
    """Return a form of a label that is equal for labels that hardly differ.

    Case, the amount of space, characters of the Unicode category Cf (most are invisible), compatibility forms (such as
    full-width letters), and how a number is written (`1`, `+1` or `1.0`) make no difference. Of a number, 28 digits
    count.
    """
    visible = "".join(" " if each.isspace() else each for each in label if unicodedata.category(each) != "Cf")
    form = " ".join(unicodedata.normalize("NFKC", visible).casefold().split())
    return str(Decimal(form).normalize()) if _NUMBER.fullmatch(form) else form


def _undecodable(path: Path) -> str:
    """Return the place of the first bytes of a file that are not UTF-8, such as `line 3, byte 7`.

    Lines, and the bytes of a line, are counted from 1. If all lines are UTF-8, the result is `its end`.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "its end"


def _several(path: Path, place: str, row: dict[str, Any], column: str, separator: str) -> tuple[str, ...]:
    """Return the distinct labels in a cell, which may be none, in the order of their code points.

    The cell is a list of labels, or a text with `separator` between labels; None has no labels. Each label is cleaned
    as by `label_of`, and empty labels are dropped. Raises ExportError if there is no such column; or a label is neither
    a text nor a whole number, or has a NUL character or a lone surrogate.
    """
    value = _cell(path, place, row, column)
    parts = value if isinstance(value, list) else _text(path, place, column, value).split(separator)
    if wrong := [part for part in parts if type(part) not in (str, int)]:
        raise ExportError(f"{path}, {place}: {column} holds {wrong[0]!r}, which is not a label; write texts")
    return tuple(sorted({_plain_label(_text(path, place, column, part)) for part in parts} - {""}))


def _cell(path: Path, place: str, row: dict[str, Any], column: str, remedy: str = "choose another column") -> Any:
    if column not in row:
        # In CSV, TSV and Parquet, all rows have the same columns, so the error names no row.
        where = f"{path}, {place}" if path.suffix.lower() in (".jsonl", ".ndjson") else path
        raise ExportError(
            f"{where}: there is no column {column!r}; there are: {', '.join(row)}; rename one, or {remedy}"
        )
    return row[column]


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            _check_header(path, names, delimiter)
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row or None in row.values():
                    raise ExportError(
                        f"{path}, {where}: it does not have {len(names)} columns as the header has; "
                        "put texts with a comma in quotes"
                    )
                yield where, row
        except csv.Error as error:
            raise ExportError(
                f"{path}, line {reader.line_num + 1}: the rest of the file cannot be read; correct the quotes there, "
                f"and give no text more than {csv.field_size_limit()} characters"
            ) from error


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Raise ExportError if a header repeats a name, or is a single cell that has another of `_DELIMITERS` in it."""
    if len(names) == 1 and (
        other := next((sign for sign in _DELIMITERS if sign != delimiter and sign in names[0]), "")
    ):
        raise ExportError(
            f"{path}, line 1: the columns seem to be separated by {_DELIMITERS[other]}, but this kind of file needs "
            f"{_DELIMITERS[delimiter]}; save the file again with {_DELIMITERS[delimiter]} between the columns"
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
                row = json.loads(line, object_pairs_hook=unique_keys)
            except RepeatedKeyError as error:
                raise ExportError(f"{path}, line {number}: the field {error.key!r} is there twice; keep one") from error
            except (ValueError, RecursionError) as error:
                raise ExportError(f"{path}, line {number}: it is not JSON; write one object a line") from error
            if not isinstance(row, dict):
                raise ExportError(f"{path}, line {number}: it is not a JSON object; write one object a line")
            yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ExportError(
            f"{path}: reading Parquet needs pyarrow, which is not installed; run, in a checkout: "
            "pip install '.[parquet]'; or, once it is published: pip install 'emberpc[parquet]'"
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
