"""Convert the metadata cells of a table (CSV or TSV) from text to the types that --types states for their columns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NoReturn

import typer

from emberpc.cli.errors import CliError
from emberpc.cli.options import listed

#: Greatest absolute value of a cell of the type `int`. Metadata stores numbers as doubles, which cannot represent every
#: whole number beyond this one.
_MAX_WHOLE = 2**53
#: Number of first characters of a cell that an error message shows.
_SHOWN = 60
#: Valid cells of the types `int`, `float` and `bool`. `_int` and `_float` also limit the number. `_bool` compares the
#: cell in small letters.
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}

Types = Annotated[
    list[str] | None,
    typer.Option(
        "--types",
        metavar="COLUMN=TYPE,…",
        help="For a table: types of metadata columns: text (the default), int, float or bool; may be given several "
        "times. An empty cell of a type other than text is left out.",
        show_default=False,
    ),
]


def _int(cell: str) -> int | None:
    if not _INT.fullmatch(cell) or len(cell) > 20:
        return None
    number = int(cell)
    return number if abs(number) <= _MAX_WHOLE else None


def _float(cell: str) -> float | None:
    if not _FLOAT.fullmatch(cell):
        return None
    number = float(cell)
    return number if math.isfinite(number) else None


def _bool(cell: str) -> bool | None:
    return _BOOLS.get(cell.lower())


#: For each type: the function that parses a cell (None: the cell is invalid), and the expected form for messages.
_TYPES: dict[str, tuple[Callable[[str], int | float | bool | None], str]] = {
    "int": (_int, f"a whole number from -{_MAX_WHOLE} to {_MAX_WHOLE}"),
    "float": (_float, "a number, such as -1.5 or 2e3"),
    "bool": (_bool, "true, false, 1 or 0"),
}
_TEXT = "text"


class ColumnTypes:
    """Types of the metadata columns of a table. A column without a type is text. False if no column has a type.

    Args:
        values: the values of --types, each a list such as `year=int,price=float`.

    Raises:
        CliError: an item is empty, not COLUMN=TYPE, has an unknown type, or repeats a column.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self._types: dict[str, str] = {}
        for item in listed("--types", values):
            column, equals, kind = (part.strip() for part in item.rpartition("="))
            if not (column and equals):
                raise CliError(f"--types has {item!r}; it must be COLUMN=TYPE, such as year=int")
            if kind not in (*_TYPES, _TEXT):
                raise CliError(f"--types has {item!r}; a type is one of {', '.join((*_TYPES, _TEXT))}")
            if column in self._types:
                raise CliError(f"--types names the column {column} twice; give it one type")
            self._types[column] = kind

    def __bool__(self) -> bool:
        return bool(self._types)

    def problem(self, columns: Sequence[str]) -> str:
        """Return the message of an error if --types names a column that is not in `columns`; otherwise "".

        `columns` are the titles of the table's metadata columns.
        """
        missing = next((column for column in self._types if column not in columns), None)
        if missing is None:
            return ""
        return f"--types names {missing}, which is no metadata column; those are {', '.join(columns) or '(none)'}"

    def convert(
        self, cells: Mapping[str, str], refuse: Callable[[str], NoReturn]
    ) -> dict[str, str | int | float | bool]:
        """Return the values of a row's metadata cells by column.

        A text cell is kept unchanged. A cell of another type is parsed without outer white space, and is left out if
        nothing remains.

        Args:
            cells: the cells by column.
            refuse: called with the message of an error if a cell is not valid for its type; must raise an exception.
        """
        found: dict[str, str | int | float | bool] = {}
        for column, cell in cells.items():
            kind = self._types.get(column, _TEXT)
            if kind == _TEXT:
                found[column] = cell
            elif stripped := cell.strip():
                make, wanted = _TYPES[kind]
                if (value := make(stripped)) is None:
                    refuse(f"the column {column} holds {cell[:_SHOWN]!r}; by --types it must be {wanted}")
                found[column] = value
        return found
