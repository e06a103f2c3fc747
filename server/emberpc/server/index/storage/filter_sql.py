"""Compilation of filters to SQL over the column `metadata`, the JSON text of a record's metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emberpc.server.collections.filters import (
    AllOf,
    AnyOf,
    Comparison,
    Existence,
    Filter,
    Membership,
    Not,
    Operator,
    Prefix,
    Value,
    keys,
    kind_of,
    sqlite_path,
)

_TYPES = {"string": "IS 'text'", "number": "IN ('integer', 'real')"}
_LAST_CHARACTER = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class Clause:
    """An SQL expression over the table `records` that is true for matching records, and false or null for others.

    Attributes:
        sql: the expression.
        parameters: values of the placeholders `?` of the expression, in order.
        depth: number of entries on the stack of SQLite's parser that the expression needs beyond those of a single
            comparison. By the depth, `_join` orders clauses so that they need few entries.
    """

    sql: str
    parameters: tuple[Any, ...] = ()
    depth: int = 0


#: The clause that every record meets. Callers compare with `is` to skip the condition.
EVERYTHING = Clause("TRUE")


def compile_filter(condition: Filter) -> Clause:
    """Return a clause that is true for the records that meet a validated filter.

    The clause may be wrong for records whose metadata contains NUL; see `nul_metadata.compiled`.
    """
    if isinstance(condition, AllOf):
        return _join(" AND ", _conjunction(condition.conditions))
    if isinstance(condition, AnyOf):
        return _join(" OR ", [compile_filter(each) for each in condition.conditions])
    if isinstance(condition, Not):
        return _negated(compile_filter(condition.condition))
    path = keys(condition.field)
    if isinstance(condition, Existence):
        return _value_clause(path, [_Test("{type} IS NOT NULL")], lists=False)
    if isinstance(condition, Membership):
        tests = _memberships(condition.values)
        if sqlite_path(path) is None:
            return _stepwise_clause(path, _any_of(tests), lists=True)
        return _join(" OR ", [_value_clause(path, [test]) for test in tests])
    if isinstance(condition, Comparison) and condition.operator is Operator.NOT_EQUAL:
        return _negated(compile_filter(Comparison(condition.field, Operator.EQUAL, condition.value)))
    return _value_clause(path, [_test(condition)])


def _conjunction(conditions: Sequence[Filter]) -> list[Clause]:
    """Return clauses, to be joined by AND, for conditions that must all hold.

    All comparisons (except NOT_EQUAL) and prefixes of the same field become one clause, so that SQLite can use an index
    for both ends of a range. Each other condition becomes a clause.
    """
    ends: dict[str, list[_Test]] = {}
    others = []
    for each in conditions:
        if isinstance(each, Prefix) or (isinstance(each, Comparison) and each.operator is not Operator.NOT_EQUAL):
            ends.setdefault(each.field, []).append(_test(each))
        else:
            others.append(compile_filter(each))
    return [*(_value_clause(keys(field), tests) for field, tests in ends.items()), *others]


#: Prefix of the names of metadata indexes. By this prefix, backups and the check of the tables leave them out.
INDEX_PREFIX = "metadata_"


def index_statement(field: str) -> str:
    """Return the SQL statement that creates the index on a metadata field, if the index is missing.

    `can_be_indexed` must be true for the field.
    """
    path = sqlite_path(keys(field))
    return (
        f"CREATE INDEX IF NOT EXISTS {_index_name(field)} ON records "
        f"(json_type(metadata, {path}), json_extract(metadata, {path}))"
    )


def drop_index_statement(field: str) -> str:
    """Return the SQL statement that drops the index on a metadata field, if there is one."""
    return f"DROP INDEX IF EXISTS {_index_name(field)}"


def _index_name(field: str) -> str:
    return INDEX_PREFIX + hashlib.sha256(field.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Test:
    """A test of one JSON value.

    Attributes:
        template: an SQL condition in which `{type}` stands for the value's JSON type, which is null if there is no
            value, and `{value}` for the value itself. `render` replaces them by SQL expressions.
        parameters: values of the placeholders `?` of the template, in order.
    """

    template: str
    parameters: tuple[Any, ...] = ()

    def render(self, type_of: str, value: str) -> str:
        return self.template.replace("{type}", type_of).replace("{value}", value)


def _test(condition: Comparison | Prefix) -> _Test:
    if isinstance(condition, Prefix):
        return _prefix(condition.prefix)
    return _comparison(condition.operator, condition.value)


def _comparison(operator: Operator, value: Value) -> _Test:
    kind = kind_of(value)
    if kind in ("null", "boolean"):
        # The operator is EQUAL: validation refuses the operators of order for null and booleans, and `compile_filter`
        # negates EQUAL for NOT_EQUAL. SQLite's names of these JSON types are `null`, `true` and `false`.
        return _Test("{type} IS ?", (json.dumps(value),))
    if kind == "number":
        # The number is passed as text, so that SQLite converts the digits of both the number and the metadata: Python's
        # conversion may differ in the last bit. The plus removes the type affinity of the cast, which would prevent
        # SQLite from using an index.
        return _Test(f"{{type}} {_TYPES[kind]} AND {{value}} {operator.value} +CAST(? AS REAL)", (repr(value),))
    return _Test(f"{{type}} {_TYPES[kind]} AND {{value}} {operator.value} ?", (value,))


def _memberships(values: Sequence[Value]) -> list[_Test]:
    """Return tests of which a JSON value meets one if, and only if, the value is among `values`.

    They are a test for all strings among `values`, one for all numbers, and one each for null, true and false. A kind
    that is not among `values` has no test.
    """
    tests = []
    for kind, types in _TYPES.items():
        if some := [value for value in values if kind_of(value) == kind]:
            # All values are one parameter, a JSON list, since SQLite limits the number of parameters.
            template = f"{{type}} {types} AND {{value}} IN (SELECT wanted.atom FROM json_each(?) AS wanted)"  # noqa: S608 - ours, values are parameters
            tests.append(_Test(template, (json.dumps(some, ensure_ascii=False),)))
    tests += [_comparison(Operator.EQUAL, each) for each in (None, True, False) if any(each is one for one in values)]
    return tests


def _any_of(tests: Sequence[_Test]) -> _Test:
    """Return a test that a value meets if it meets at least one of `tests`, which must not be empty."""
    template = " OR ".join(f"({test.template})" for test in tests)
    return _Test(f"({template})", tuple(value for test in tests for value in test.parameters))


def _prefix(prefix: str) -> _Test:
    """Return a test for the strings that start with `prefix`, as a range, for which SQLite can use an index.

    The range starts at the prefix and ends before the first string that is greater than all strings with the prefix.
    No string is greater if the prefix is empty or has only the character U+10FFFF. Then the range has no end, and the
    test also compares the first characters of a string with the prefix.
    """
    test = "{type} IS 'text' AND {value} >= ?"
    start = prefix.rstrip(chr(_LAST_CHARACTER))
    if not start:
        return _Test(f"{test} AND substr({{value}}, 1, ?) = ?", (prefix, len(prefix), prefix))
    after = ord(start[-1]) + 1
    end = start[:-1] + chr(_SURROGATES.stop if after in _SURROGATES else after)
    return _Test(f"{test} AND {{value}} < ?", (prefix, end))


def _value_clause(path: tuple[str, ...], tests: Sequence[_Test], *, lists: bool = True) -> Clause:
    """Return a clause that is true if the value at a path in the metadata meets all tests.

    If `lists` is true, a list meets a test if at least one of its items does. Different items may meet different tests.
    If `lists` is false, the list itself is tested, not its items. `path` has the nested keys, the outermost first.
    """
    json_path = sqlite_path(path)
    if json_path is None:
        return _join(" AND ", [_stepwise_clause(path, test, lists=lists) for test in tests])
    type_of, value = f"json_type(metadata, {json_path})", f"json_extract(metadata, {json_path})"
    alone = " AND ".join(test.render(type_of, value) for test in tests)
    parameters = tuple(value for test in tests for value in test.parameters)
    if not lists:
        return Clause(f"({alone})", parameters)
    items = " AND ".join(
        f"EXISTS (SELECT 1 FROM json_each(metadata, {json_path}) AS item "  # noqa: S608 - ours, values are parameters
        f"WHERE {test.render('item.type', 'item.atom')})"
        for test in tests
    )
    return Clause(f"(({alone}) OR ({type_of} IS 'array' AND {items}))", parameters * 2)


def _stepwise_clause(path: tuple[str, ...], test: _Test, *, lists: bool) -> Clause:
    """Return a clause that is true if the value at a path in the metadata meets a test, without a JSON path of SQLite.

    A JSON path of SQLite cannot name a key that is empty or contains a double quote, a backslash or a control
    character. So each key of `path` is compared by itself. If `lists` is true, a list also meets the test if at least
    one of its items does.
    """
    tables = ["json_each(metadata) AS step0"]
    conditions = ["step0.key = ?"]
    for i in range(1, len(path)):
        # Without CASE, json_each would fail for a value that is not an object, such as a string.
        tables.append(
            f"json_each(CASE step{i - 1}.type WHEN 'object' THEN step{i - 1}.value ELSE '{{}}' END) AS step{i}"
        )
        conditions.append(f"step{i}.key = ?")
    last = f"step{len(path) - 1}"
    found = f"({test.render(f'{last}.type', f'{last}.atom')})"
    parameters = (*path, *test.parameters)
    if lists:
        items = f"json_each(CASE {last}.type WHEN 'array' THEN {last}.value ELSE '[]' END) AS item"
        found = f"({found} OR EXISTS (SELECT 1 FROM {items} WHERE {test.render('item.type', 'item.atom')}))"  # noqa: S608 - ours, values are parameters
        parameters += test.parameters
    conditions.append(found)
    return Clause(f"EXISTS (SELECT 1 FROM {', '.join(tables)} WHERE {' AND '.join(conditions)})", parameters)  # noqa: S608 - ours, values are parameters


def _join(operator: str, clauses: Sequence[Clause]) -> Clause:
    """Join clauses, at least one, by `operator`, " AND " or " OR ", with the deepest clause first.

    The stack of SQLite's parser has 100 entries by default. A nested expression takes one entry if it is the first
    operand, and three otherwise. With the deepest clause first, a level of nesting takes more than one entry only if
    the depths of its two deepest clauses differ by at most 1. Since the number of conditions in a filter is limited,
    this is so on few levels.
    """
    ordered = sorted(clauses, key=lambda clause: -clause.depth)
    depth = max(clause.depth + (1 if i == 0 else 3) for i, clause in enumerate(ordered))
    parameters = tuple(value for clause in ordered for value in clause.parameters)
    return Clause(f"({operator.join(clause.sql for clause in ordered)})", parameters, depth)


def _negated(clause: Clause) -> Clause:
    # IS NOT TRUE instead of NOT: for a missing field the clause may be null, and then the negation must be true.
    return Clause(f"({clause.sql} IS NOT TRUE)", clause.parameters, clause.depth + 1)
