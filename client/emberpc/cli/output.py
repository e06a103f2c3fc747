"""Print results to stdout, and everything else to stderr.

On a terminal, tables are fitted to its width. Elsewhere they are tab-separated, and no cell is truncated. With
`--json`, a command prints JSON Lines: one object for each result. All functions that write to stdout raise the errors
of `flush`; further output is then discarded. Stdout is buffered, so a later function may raise the error of a write.
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
    """A column of a table: its title, the side that cells are aligned to on a terminal, and whether it is `wide`.

    If a table is too wide for the terminal, the cells of wide columns are truncated. Other columns never are.
    """

    title: str
    justify: Literal["left", "right"] = "left"
    wide: bool = False


#: Minimum width, in columns of the terminal, to which a wide column is truncated, even if the table then does not fit.
_MIN_WIDTH = 16
#: Space between two columns on a terminal.
_GAP = "  "


def print_json(objects: Iterable[Any]) -> None:
    """Print each object as a line of JSON, converted by `plain`.

    Raises CliError if stdout cannot be written, or typer.Exit if its reader closed the pipe.
    """
    # An encoding of stdout other than UTF-8 lacks some characters. They are written as JSON escapes, not replaced.
    ensure_ascii = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    for item in objects:
        _write(json_line(item, ensure_ascii=ensure_ascii))


def json_line(item: Any, *, ensure_ascii: bool = False) -> str:
    """Return an object as a line of JSON with its line end, converted by `plain`.

    `ensure_ascii`: whether to write characters beyond ASCII as JSON escapes.
    """
    return json.dumps(plain(item), ensure_ascii=ensure_ascii) + "\n"


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]], *, titles: bool = True) -> None:
    """Print a table: on a terminal aligned, with wide columns truncated to fit, elsewhere tab-separated.

    The first line has the titles of the columns, unless `titles` is false: the rows continue an earlier table. Each row
    has a value for each column, which is printed as by `one_line(str(value))`. Raises CliError if stdout cannot be
    written, or typer.Exit if its reader closed the pipe.
    """
    header = [column.title for column in columns]
    cells = [header, *([one_line(str(cell)) for cell in row] for row in rows)]
    _print_rows(columns, cells, first=0 if titles else 1)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a table with the columns `field` and `value`: titles, then a line for each field. No value is truncated.

    The value None is empty, a bool yes or no, and a tuple or mapping a list with commas. Raises the errors of `flush`.
    """
    columns = [Column("field"), Column("value")]
    _print_rows(columns, [[name, one_line(_field_text(value))] for name, value in fields.items()])


def print_lines(lines: Iterable[str]) -> None:
    """Print each text to stdout as one line, as `one_line` returns it. Raises the errors of `flush`."""
    for line in lines:
        _write(one_line(line) + "\n")


def print_script(script: str) -> None:
    """Print a text of several lines, without changes to its white space, and a line end, to stdout.

    Characters that the encoding of stdout lacks become `?`. Raises the errors of `flush`.
    """
    _write(script + "\n")


def to_terminal() -> bool:
    """Return whether stdout is a terminal. Commands shorten tables there: a person reads them, and no program."""
    return sys.stdout.isatty()


def print_blank_line() -> None:
    """Print an empty line to stdout. Raises the errors of `flush`."""
    _write("\n")


def _print_rows(columns: Sequence[Column], rows: Sequence[Sequence[str]], first: int = 0) -> None:
    """Print the rows from number `first`, from 0. On a terminal, the columns are wide enough for all rows."""
    if not to_terminal():
        for row in rows[first:]:
            _write("\t".join(row) + "\n")
        return
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(columns))]
    spare = shutil.get_terminal_size().columns - sum(widths) - len(_GAP) * (len(columns) - 1)
    for i, column in enumerate(columns):
        if column.wide and spare < 0:
            cut = max(widths[i] + spare, min(widths[i], _MIN_WIDTH))
            spare += widths[i] - cut
            widths[i] = cut
    for row in rows[first:]:
        cells = [_fitted(cell, column, width) for cell, column, width in zip(row, columns, widths, strict=True)]
        _write(_GAP.join(cells).rstrip() + "\n")


def _fitted(cell: str, column: Column, width: int) -> str:
    """Return a cell that takes `width` columns of the terminal: padded, or truncated with `…` at the end.

    A character may take two columns of the terminal.
    """
    if cell_len(cell) > width:
        cell = set_cell_size(cell, width - 1) + "…"
    padding = " " * (width - cell_len(cell))
    return padding + cell if column.justify == "right" else cell + padding


def note(message: str) -> None:
    """Print a message to stderr, as `one_line` returns it. Results go to stdout and not here. Errors are ignored."""
    write_stderr(one_line(message) + "\n")


def details_printer(wanted: bool) -> Callable[[Any], None] | None:
    """Return a function that prints the details of a response to stderr as a line of JSON; None unless `wanted`."""
    return (lambda details: write_stderr(json_line(details, ensure_ascii=True))) if wanted else None


def write_stderr(text: str) -> None:
    """Write a text to stderr unchanged. An OSError is ignored, since there is no other place to report it.

    After an OSError, all further output to stderr is discarded.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # The buffer still has the text. At exit, Python would flush it, fail, and exit with another code. With stderr
        # connected to /dev/null the flush succeeds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def counted(number: int, item: str) -> str:
    """Return a number of items in words, such as `1 hit` and `2 hits`; `item` is in the singular."""
    return f"{number} {item}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """Return a text in one line: each run of white space becomes one space, and none is left at start and end.

    Other unprintable characters become `�`, since a terminal would execute control characters.
    """
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def plain(value: Any) -> Any:
    """Convert a value to types that JSON can represent.

    A dataclass becomes a dict without the fields that are None, a mapping a dict with texts as keys, a tuple a list, a
    one-dimensional array of numbers a list of floats, a datetime an ISO 8601 text, and a path a text. The values in
    these, and in lists, are converted too. Other values are returned unchanged.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: plain(item) for name, item in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        # `str` returns the shortest digits of a float32. A float32 that is converted to a double directly has about
        # twice as many digits.
        return [float(str(item)) for item in value]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def flush() -> None:
    """Flush stdout.

    Raises:
        typer.Exit: the reader closed the pipe; the exit code is 0.
        CliError: stdout cannot be written for another reason.
    """
    _guarded(sys.stdout.flush)


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    writable = text.encode(encoding, "replace").decode(encoding)
    _guarded(lambda: sys.stdout.write(writable))


def _guarded(action: Callable[[], object]) -> None:
    """Run an action that writes to stdout, and convert an OSError. After it, further output to stdout is discarded.

    Raises:
        typer.Exit: the reader closed the pipe, as `| head` does; the exit code is 0.
        CliError: stdout cannot be written for another reason, such as a full disk.
    """
    try:
        action()
    except OSError as error:
        unwritable = discard_stdout(error)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(0) from None
        raise unwritable from error


def discard_stdout(error: OSError) -> CliError:
    """Make stdout discard all further output, after a write to it raised `error`. Return the CliError to report."""
    # The buffer still has text. At exit, Python would flush it and report the error a second time. With stdout
    # connected to /dev/null the flush succeeds.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CliError(f"stdout cannot be written: {error.strerror or error}; send it elsewhere")


def _field_text(value: object) -> str:
    if isinstance(value, Mapping):
        # A float32 has about seven significant digits. With the six of `:g`, a cosine of 0.9999998 would be shown as 1.
        return ", ".join(f"{key} {f'{item:.7g}' if isinstance(item, float) else item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    return "" if value is None else str(value)
