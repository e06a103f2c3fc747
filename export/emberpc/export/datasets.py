"""Labelled texts from CSV, TSV, JSONL or Parquet files, with errors that name the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberpc.export.errors import ExportError

_FORMATS = ".csv, .tsv, .jsonl or .parquet"


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels, one for each, from a file."""

    path: Path
    texts: list[str]
    labels: list[str]

    def conflicts(self) -> dict[str, set[str]]:
        """Return the texts that stand there with different labels."""
        seen: dict[str, set[str]] = {}
        for text, label in zip(self.texts, self.labels, strict=True):
            seen.setdefault(text, set()).add(label)
        return {text: labels for text, labels in seen.items() if len(labels) > 1}


def read_labelled(path: Path | str, *, text_column: str = "text", label_column: str = "label") -> LabelledTexts:
    """Read a file of labelled texts.

    Args:
        path: CSV or TSV with a header, JSONL, or Parquet (needs pyarrow); UTF-8.
        text_column: the column with the texts.
        label_column: the column with the labels.

    Raises:
        ExportError: the file cannot be read, has no such column, or a row has no text or no label.
    """
    path = Path(path)
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ExportError(f"{path}: its name must end in {_FORMATS}")
    texts, labels = [], []
    try:
        for where, row in readers[path.suffix](path):
            values = []
            for column in (text_column, label_column):
                if column not in row:
                    raise ExportError(f"{path}, {where}: there is no column {column!r}; there are: {', '.join(row)}")
                value = row[column]
                if value is None or not str(value).strip():
                    raise ExportError(f"{path}, {where}: {column} is empty; fill it in or remove the row")
                if type(value) not in (str, int):
                    kind = type(value).__name__
                    raise ExportError(
                        f"{path}, {where}: {column} is of type {kind}; it must be a text, or a whole number"
                    )
                values.append(str(value))
            texts.append(values[0])
            labels.append(values[1])
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not texts:
        raise ExportError(f"{path} has no rows")
    return LabelledTexts(path, texts, labels)


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
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


def _tsv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return _csv(path, "\t")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
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
        raise ExportError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ExportError(f"{path} is not Parquet; write it again") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row
