"""Filters: conditions on the metadata of records, and their meaning.

`matches` defines the meaning; `filter_sql` and other backends must agree with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

from emberpc.server import cancellation

#: A string, a number (a double), a boolean or null.
Value = str | float | bool | None

#: Limits of the nesting of conditions, and of their number in a filter. SQLite takes expressions of depth 1000.
MAX_DEPTH = 32
MAX_CONDITIONS = 256
MAX_LIST = 100
MAX_VALUES = 10_000
#: Limit of the characters of a field.
MAX_FIELD = 1000
#: Limit of the nested keys in a field. Metadata of a request cannot be nested deeper: a message may have 100 levels,
#: and each level of metadata takes three. SQLite joins at most 64 tables, and an unusual key takes one.
MAX_KEYS = 40

_FIELD = re.compile(r"(?:[^\\]|\\[.\\])*", re.DOTALL)
_PART = re.compile(r"\\([.\\])|(\.)", re.DOTALL)


class Operator(str, Enum):
    """Comparison of a field with a value."""

    EQUAL = "="
    NOT_EQUAL = "!="
    LESS = "<"
    LESS_OR_EQUAL = "<="
    GREATER = ">"
    GREATER_OR_EQUAL = ">="


@dataclass(frozen=True)
class AllOf:
    """Matches if all conditions match."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True)
class AnyOf:
    """Matches if at least one condition matches."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True)
class Not:
    """Matches if the condition does not."""

    condition: Filter


@dataclass(frozen=True)
class Comparison:
    """Compares the field with a value; NOT_EQUAL is the negation of EQUAL."""

    field: str
    operator: Operator
    value: Value


@dataclass(frozen=True)
class Membership:
    """Matches if the field equals one of several values."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Prefix:
    """Matches if the field is a string with this prefix."""

    field: str
    prefix: str


@dataclass(frozen=True)
class Existence:
    """Matches if the field exists, even if it is null."""

    field: str


Filter = AllOf | AnyOf | Not | Comparison | Membership | Prefix | Existence


def is_field(field: str) -> bool:
    """Return whether the syntax of a field is valid: a backslash must precede a dot or a backslash."""
    return bool(_FIELD.fullmatch(field))


@lru_cache(maxsize=1024)
def keys(field: str) -> tuple[str, ...]:
    """Return the nested keys of a field, which dots separate; an escaped dot or backslash belongs to the key."""
    found = [""]
    end = 0
    for part in _PART.finditer(field):
        found[-1] += field[end : part.start()] + (part[1] or "")
        if part[2]:
            found.append("")
        end = part.end()
    found[-1] += field[end:]
    return tuple(found)


def matches(condition: Filter, metadata: Mapping[str, Any]) -> bool:
    """Return whether a record's metadata meets a condition.

    A comparison with a field that is missing or of another type is false. A list meets a comparison if one of its items
    does; items that are lists or objects do not.
    """
    if isinstance(condition, AllOf):
        return all(matches(each, metadata) for each in condition.conditions)
    if isinstance(condition, AnyOf):
        return any(matches(each, metadata) for each in condition.conditions)
    if isinstance(condition, Not):
        return not matches(condition.condition, metadata)
    there, value = _look_up(metadata, keys(condition.field))
    if isinstance(condition, Existence):
        return there
    if not there:
        found = False
    elif isinstance(value, (list, tuple)):
        found = any(_meets(item, condition) for item in value)
    else:
        found = _meets(value, condition)
    negated = isinstance(condition, Comparison) and condition.operator is Operator.NOT_EQUAL
    return found is not negated


#: Number of records whose metadata callers pass to `mismatches`.
MISMATCH_RECORDS = 1000
#: Fields of a record that are not metadata, so that no filter compares them.
_RECORD_FIELDS = ("id", "text", "label")


def mismatches(condition: Filter, documents: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each field of a filter without matches that probably explains why nothing matches.

    Such a field is in no record, or it is compared with a number and has only strings, or the other way round. A field
    below a negation may be missing: that meets the negation.

    Args:
        condition: the condition.
        documents: the metadata of some records; read until all fields are found as the condition compares them.
    """
    compared = dict.fromkeys(_compared(condition))
    found: dict[str, set[str]] = {field: set() for field, _, _ in compared}
    count = 0
    for metadata in documents:
        count += 1
        cancellation.check()
        for field, seen in found.items():
            there, value = _look_up(metadata, keys(field))
            if there:
                seen.update(map(kind_of, value) if isinstance(value, (list, tuple)) else [kind_of(value)], ["any"])
        if all((kind if kind in ("number", "string") else "any") in found[field] for field, kind, _ in compared):
            return []
    sentences = [_mismatch(field, kind, found[field], count, needed=needed) for field, kind, needed in compared]
    return list(dict.fromkeys(filter(None, sentences))) if count else []


def _mismatch(field: str, kind: str, found: set[str], count: int, *, needed: bool) -> str:
    """Return why a comparison matches no record; empty: its field has values that it could match.

    Args:
        field: the field.
        kind: the kind of the values that it is compared with; empty: several kinds, or none.
        found: the kinds of its values in `count` records; empty: no record has it.
        count: number of records that were examined.
        needed: whether the comparison cannot match without the field.
    """
    shown = repr(field[:100])
    if not found and needed:
        absent = f"the filter names {shown}, and none of the {count} records examined has a metadata field of that name"
        if field in _RECORD_FIELDS:
            return f"{absent}; filters compare metadata only, not the {field} of a record: store it in the metadata too"
        return f"{absent}; check its spelling"
    if kind == "number" and "string" in found and "number" not in found:
        return (
            f"the filter compares {shown} with a number, and the records have strings there; compare with a string, "
            "or write the records with numbers (on the command line with --types)"
        )
    if kind == "string" and "number" in found and "string" not in found:
        return (
            f"the filter compares {shown} with a string, and the records have numbers there; compare with a number "
            "(without quotes)"
        )
    return ""


def _compared(condition: Filter, *, needed: bool = True) -> Iterator[tuple[str, str, bool]]:
    """Yield each comparison: its field, the kind of its values (empty: several kinds, or none), whether it is needed.

    A field is needed if the comparison matches no record without it. Below a negation, or with NOT_EQUAL, it is not.
    """
    if isinstance(condition, (AllOf, AnyOf)):
        for each in condition.conditions:
            yield from _compared(each, needed=needed)
    elif isinstance(condition, Not):
        yield from _compared(condition.condition, needed=False)
    elif isinstance(condition, Comparison):
        yield condition.field, kind_of(condition.value), needed and condition.operator is not Operator.NOT_EQUAL
    elif isinstance(condition, Membership):
        kinds = {kind_of(value) for value in condition.values}
        yield condition.field, kinds.pop() if len(kinds) == 1 else "", needed
    else:
        yield condition.field, "string" if isinstance(condition, Prefix) else "", needed


def _look_up(metadata: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    for key in path:
        if not isinstance(metadata, Mapping) or key not in metadata:
            return False, None
        metadata = metadata[key]
    return True, metadata


def _meets(value: Any, condition: Comparison | Membership | Prefix) -> bool:
    """Return whether a value that is not a list meets a condition; for NOT_EQUAL, whether it is equal."""
    if isinstance(condition, Membership):
        return any(_equal(value, each) for each in condition.values)
    if isinstance(condition, Prefix):
        return isinstance(value, str) and value.startswith(condition.prefix)
    if condition.operator in (Operator.EQUAL, Operator.NOT_EQUAL):
        return _equal(value, condition.value)
    if kind_of(value) != kind_of(condition.value) or kind_of(value) not in ("string", "number"):
        return False
    compared: dict[Operator, bool] = {
        Operator.LESS: value < condition.value,
        Operator.LESS_OR_EQUAL: value <= condition.value,
        Operator.GREATER: value > condition.value,
        Operator.GREATER_OR_EQUAL: value >= condition.value,
    }
    return compared[condition.operator]


def _equal(value: Any, other: Value) -> bool:
    return kind_of(value) == kind_of(other) != "other" and bool(value == other)


def kind_of(value: Any) -> str:
    """Return the kind of a value: `string`, `number`, `boolean`, `null`, or `other`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "other"


def can_be_indexed(field: str) -> bool:
    """Return whether SQLite can index a field: its paths cannot name every key."""
    return is_field(field) and sqlite_path(keys(field)) is not None


def sqlite_path(path: tuple[str, ...]) -> str | None:
    """Return SQLite's path to nested keys as an SQL literal, or None if a key has no path.

    A literal instead of a parameter: SQLite uses an expression index only for an identical expression.
    """
    if any(not key or any(c in '"\\' or ord(c) < 32 for c in key) for key in path):
        return None
    return "'$" + "".join(f'."{key}"' for key in path).replace("'", "''") + "'"
