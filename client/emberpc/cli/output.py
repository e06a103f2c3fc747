"""What the command line prints: results to stdout, everything else to stderr.

Tables are for people: on a terminal they are fitted to its width; elsewhere
they are tab-separated and nothing is cut. `--json` is for programs: JSON Lines,
one object for each result, however many there are.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer
from rich.cells import cell_len, set_cell_size

from emberpc.cli.errors import CliError


@dataclass(frozen=True)
class Column:
    """A column of a table; a `wide` one is cut where the terminal ends."""

    title: str
    justify: Literal["left", "right"] = "left"
    wide: bool = False


#: What a wide column is never cut below, however narrow the terminal.
_LEAST_WIDTH = 16
_GAP = "  "


def print_json(objects: Iterable[Any]) -> None:
    """Print each object, a dataclass or plain values, as a line of JSON; a field that is None is left out."""
    # Where stdout cannot take every character, they are written as JSON's escapes, which say the same.
    ensure_ascii = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    for item in objects:
        _write(json_line(item, ensure_ascii=ensure_ascii))


def json_line(item: Any, *, ensure_ascii: bool = False) -> str:
    """Return an object, a dataclass or plain values, as a line of JSON; a field that is None is left out."""
    return json.dumps(plain(item), ensure_ascii=ensure_ascii) + "\n"


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    header = [column.title for column in columns]
    _print_rows(columns, [header, *([one_line(str(cell)) for cell in row] for row in rows)])


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing: a line for each field."""
    columns = [Column("field"), Column("value")]
    _print_rows(columns, [[name, one_line(_worded(value))] for name, value in fields.items()])


def print_lines(lines: Iterable[str]) -> None:
    """Print sentences, a line each."""
    for line in lines:
        _write(one_line(line) + "\n")


def for_people() -> bool:
    """Tell whether a table goes to a terminal, where it is fitted to people; elsewhere nothing is cut or rounded."""
    return sys.stdout.isatty()


def print_gap() -> None:
    """Print an empty line between two things."""
    _write("\n")


def _print_rows(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    if not for_people():
        for row in rows:
            _write("\t".join(row) + "\n")
        return
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(columns))]
    spare = shutil.get_terminal_size().columns - sum(widths) - len(_GAP) * (len(columns) - 1)
    for i, column in enumerate(columns):
        if column.wide and spare < 0:
            cut = max(widths[i] + spare, min(widths[i], _LEAST_WIDTH))
            spare += widths[i] - cut
            widths[i] = cut
    for row in rows:
        cells = [_fitted(cell, column, width) for cell, column, width in zip(row, columns, widths, strict=True)]
        _write(_GAP.join(cells).rstrip() + "\n")


def _fitted(cell: str, column: Column, width: int) -> str:
    """Return a cell cut or filled up to a width in terminal cells, of which some characters take two."""
    if cell_len(cell) > width:
        cell = set_cell_size(cell, width - 1) + "…"
    padding = " " * (width - cell_len(cell))
    return padding + cell if column.justify == "right" else cell + padding


def note(message: str) -> None:
    """Tell the user something that is no result."""
    complain(one_line(message) + "\n")


def complain(text: str) -> None:
    """Write to stderr; if it cannot be written to, there is nobody to tell."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # As in `give_up`: Python would exit with another code if it could not write what is in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def one_line(text: str) -> str:
    """Return a text in one line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        # By way of str, which is the shortest that names the same float32; as doubles they have twice the digits.
        return [float(str(item)) for item in value]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def flush() -> None:
    """Write out what is still held back.

    Raises:
        typer.Exit: nobody reads stdout any more.
        CliError: it cannot be written.
    """
    _in_peace(sys.stdout.flush)


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    writable = text.encode(encoding, "replace").decode(encoding)
    _in_peace(lambda: sys.stdout.write(writable))


def _in_peace(action: Callable[[], object]) -> None:
    """Do what writes to stdout; end the program without complaint if nobody reads on, as after `| head`.

    Raises:
        typer.Exit: nobody reads on.
        CliError: stdout cannot be written, because it is closed or its disk is full.
    """
    try:
        action()
    except OSError as error:
        unwritable = give_up(error)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(0) from None
        raise unwritable from error


def give_up(error: OSError) -> CliError:
    """Write no more to stdout after an error; return what to say of it."""
    # What is still in the buffer goes nowhere, or Python would complain of it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CliError(f"stdout cannot be written: {error.strerror or error}; send it elsewhere")


def _worded(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    return "" if value is None else str(value)
