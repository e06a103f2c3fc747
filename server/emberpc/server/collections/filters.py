"""Filters: conditions on the metadata of records.

`matches` defines which records meet a filter. `filter_sql`, which translates filters to SQL, and other index backends
must select the same records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

from emberpc.server import cancellation

#: Value that a condition compares a metadata field with: a string, a number (a double), a boolean or null.
Value = str | float | bool | None

#: Maximum number of levels of nested conditions in a filter; the filter itself is the first. The limits of a filter
#: keep its SQL expression below SQLite's limits: 1000 nested levels, and 100 entries of the parser's stack (see
#: `filter_sql._join`).
MAX_DEPTH = 32
#: Maximum number of conditions in a filter: the filter itself and all nested conditions, also each `all`, `any` and
#: `not`.
MAX_CONDITIONS = 256
#: Maximum number of conditions directly in one `all` or `any` of a filter.
MAX_LIST = 100
#: Maximum number of values in one membership.
MAX_VALUES = 10_000
#: Maximum number of characters of the name of a field, dots and backslashes included.
MAX_FIELD = 1000
#: Maximum number of nested keys in a field. The metadata of a request cannot be nested deeper, since a protobuf message
#: may have 100 levels and each level of metadata takes three of them. SQLite joins at most 64 tables, and each key of a
#: field takes a table if SQLite has no path to the field (see `sqlite_path`).
MAX_KEYS = 40

_FIELD = re.compile(r"(?:[^\\]|\\[.\\])*", re.DOTALL)
_PART = re.compile(r"\\([.\\])|(\.)", re.DOTALL)


class Operator(str, Enum):
    """How a field is compared with a value."""

    EQUAL = "="
    NOT_EQUAL = "!="
    LESS = "<"
    LESS_OR_EQUAL = "<="
    GREATER = ">"
    GREATER_OR_EQUAL = ">="


@dataclass(frozen=True)
class AllOf:
    """A filter that a record meets if it meets all of its conditions (one or more)."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True)
class AnyOf:
    """A filter that a record meets if it meets at least one of the conditions."""

    conditions: tuple[Filter, ...]


@dataclass(frozen=True)
class Not:
    """A filter that a record meets if it does not meet the condition."""

    condition: Filter


@dataclass(frozen=True)
class Comparison:
    """A filter that compares a metadata field with a value.

    NOT_EQUAL is the negation of EQUAL: a record without the field, or with a value of another kind (`kind_of`), meets
    it. Such a record meets no other operator. Only strings and numbers have an order: with an operator of order and a
    boolean or null as value, no record meets the filter. For a field that is a list, see `matches`.
    """

    field: str
    operator: Operator
    value: Value


@dataclass(frozen=True)
class Membership:
    """A filter that a record meets if the field, or an item of its list, equals one of the values."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Prefix:
    """A filter that a record meets if the field, or an item of its list, is a string that starts with the prefix."""

    field: str
    prefix: str


@dataclass(frozen=True)
class Existence:
    """A filter that a record meets if it has the field, even with the value null."""

    field: str


Filter = AllOf | AnyOf | Not | Comparison | Membership | Prefix | Existence


def is_field(field: str) -> bool:
    """Return whether the syntax of a field is valid: after each backslash comes a dot or a second backslash.

    An empty field and empty keys are valid.
    """
    return bool(_FIELD.fullmatch(field))


@lru_cache(maxsize=1024)
def keys(field: str) -> tuple[str, ...]:
    """Return the nested keys that a valid field names, the outermost first.

    Dots separate the keys. A backslash before a dot or a backslash makes that character a part of the key.
    """
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
    """Return whether the metadata of a record meets a filter.

    A missing field meets NOT_EQUAL, but no other comparison, membership or prefix. Values of different kinds, see
    `kind_of`, are not equal and have no order. A list meets NOT_EQUAL if none of its items equals the value. It meets
    another comparison, a membership or a prefix if at least one item does. Objects, and lists in a list, equal nothing.
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


#: Maximum number of records whose metadata the index backends pass to `mismatches`.
MISMATCH_RECORDS = 1000
#: Fields of a record that are not metadata. Filters do not compare them, so `mismatches` gives a hint if a filter names
#: one of them and no metadata has a field of that name.
_RECORD_FIELDS = ("id", "text", "label")


def mismatches(condition: Filter, all_metadata: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return sentences with the probable reasons why no record meets a filter; empty: no reason was found.

    There is a sentence for each field that no record has, and for each field that is compared with a number and has
    strings but no numbers, or the other way round. There is none for the absence of a field that is below a negation or
    compared by NOT_EQUAL, since records without the field may match. Without records there are no sentences.

    Args:
        condition: a filter that no record meets.
        all_metadata: the metadata of some records. The rest is not read, and no sentence is returned, as soon as each
            field has had a value: a number or string if the field is compared with this kind, else any value.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if the call that this thread runs is cancelled.
    """
    compared = dict.fromkeys(_compared(condition))
    found: dict[str, set[str]] = {field: set() for field, _, _ in compared}
    count = 0
    for metadata in all_metadata:
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
    """Return a sentence that says why a condition on a field probably matches no record; empty: no reason is known.

    A reason is known if no record has a needed field, or if the field is compared with a number and has strings but no
    numbers, or the other way round.

    Args:
        field: the field.
        kind: the kind (see `kind_of`) of the values that the field is compared with; empty: several kinds, or none.
        found: the kinds of the field's values, and of items of lists, in `count` records, with `any` if a record has
            the field; empty: no record has it.
        count: number of records that were examined.
        needed: whether a missing field is a reason, see `_compared`.
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
    """Yield for each condition on a field: the field, the kind of the condition's values, and whether it is needed.

    The kind is a result of `kind_of`, or empty if the values have several kinds or there are none. A field is needed
    unless its condition is below a negation or is NOT_EQUAL: a record without the field may meet these.

    Args:
        condition: the filter.
        needed: False if `condition` is below a negation, so that none of its fields is needed.
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
    """Return whether a single value meets a condition: the value of a field, or an item of a field that is a list.

    For NOT_EQUAL, return whether the value is equal: the caller negates the result.
    """
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
    """Return the kind of a value: `string`, `number`, `boolean`, `null`, or `other` for lists and objects."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "other"


def can_be_indexed(field: str) -> bool:
    """Return whether SQLite can index a metadata field: the field is valid, and SQLite has a path to its keys."""
    return is_field(field) and sqlite_path(keys(field)) is not None


def sqlite_path(path: tuple[str, ...]) -> str | None:
    """Return SQLite's path to nested keys as an SQL literal; None if SQLite's paths cannot name one of the keys.

    They cannot name a key that is empty or has a double quote, a backslash or a character below U+0020. The path is a
    literal and no parameter, since SQLite uses an index of an expression only for the identical expression.

    Args:
        path: the keys, the outermost first.
    """
    if any(not key or any(c in '"\\' or ord(c) < 32 for c in key) for key in path):
        return None
    return "'$" + "".join(f'."{key}"' for key in path).replace("'", "''") + "'"
