"""Filters: the records that they match, and that the compiled SQL matches the same records."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import NewRecord
from emberpc.server.collections.filters import (
    MAX_KEYS,
    AllOf,
    AnyOf,
    Comparison,
    Existence,
    Filter,
    Membership,
    Not,
    Operator,
    Prefix,
    can_be_indexed,
    keys,
    matches,
    mismatches,
)
from emberpc.server.index import Collection
from emberpc.server.index.storage import store_reader
from emberpc.server.index.storage.filter_sql import compile_filter, index_statement
from index_helpers import vectors

KEYS = ["a", "b", "a.b", 'q"uote', "it's", "br[0]", "back\\slash", "ключ", "", "$", "new\nline", "7"]
#: Texts without NUL, at which SQLite ends a string; the service refuses NUL in filters and metadata.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3) | st.sampled_from(
    ["en", "enough", "e\U0010ffff", "\ud7ff", "\ue000", "1", "true", "null"]
)
NUMBERS = st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.1, 1e300, -0.0])
SCALARS = TEXTS | NUMBERS | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
METADATA = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)


def field(*path: str) -> str:
    return ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in path)


FIELDS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(lambda path: field(*path))


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    operator = draw(st.sampled_from(list(Operator)))
    ordered = operator not in (Operator.EQUAL, Operator.NOT_EQUAL)
    return Comparison(draw(FIELDS), operator, draw(TEXTS | NUMBERS if ordered else SCALARS))


CONDITIONS: st.SearchStrategy[Filter] = st.recursive(
    comparisons()
    | st.builds(Membership, FIELDS, st.lists(SCALARS, min_size=1, max_size=4).map(tuple))
    | st.builds(Prefix, FIELDS, TEXTS.filter(bool))
    | st.builds(Existence, FIELDS),
    lambda inner: (
        st.builds(AllOf, st.lists(inner, min_size=1, max_size=3).map(tuple))
        | st.builds(lambda one, two: AllOf((one, replace(two, field=one.field))), comparisons(), comparisons())
        | st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple))
        | st.builds(Not, inner)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    """A table like that of the store, with an index on each field that can have one."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE records (label INTEGER PRIMARY KEY, metadata TEXT NOT NULL, vector BLOB)")
    for key in ("a", "it's", "br[0]"):
        connection.execute(index_statement(field(key)))
    yield connection
    connection.close()


def matching(database: sqlite3.Connection, condition: Filter) -> list[int]:
    clause = compile_filter(condition)
    statement = f"SELECT label FROM records WHERE {clause.sql} ORDER BY label"
    return [row[0] for row in database.execute(statement, clause.parameters)]


@given(documents=st.lists(METADATA, max_size=4), conditions=st.lists(CONDITIONS, min_size=1, max_size=4))
def test_compiled_sql_matches_the_same_records_as_the_filter(
    database: sqlite3.Connection, documents: list[dict[str, Any]], conditions: list[Filter]
) -> None:
    database.execute("DELETE FROM records")
    database.executemany(
        "INSERT INTO records (label, metadata) VALUES (?, ?)",
        [(i, json.dumps(document, ensure_ascii=False)) for i, document in enumerate(documents)],
    )
    for condition in conditions:
        expected = [i for i, document in enumerate(documents) if matches(condition, document)]
        assert matching(database, condition) == expected, compile_filter(condition)


@given(documents=st.lists(METADATA, min_size=1, max_size=4), data=st.data())
def test_compiled_sql_finds_values_of_the_metadata(
    database: sqlite3.Connection, documents: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Random values are hardly ever equal, so these conditions use values of the metadata."""
    database.execute("DELETE FROM records")
    database.executemany(
        "INSERT INTO records (label, metadata) VALUES (?, ?)",
        [(i, json.dumps(document, ensure_ascii=False)) for i, document in enumerate(documents)],
    )
    found = [*leaves({"": documents[0]})]
    if not found:
        return
    path, value = data.draw(st.sampled_from(found))
    name = field(*path[1:])
    conditions: list[Filter] = [
        *(Comparison(name, operator, value) for operator in Operator if ordered(operator, value)),
        Membership(name, (value, "other")),
        *([Prefix(name, value[:1])] if isinstance(value, str) and value else []),
    ]
    for condition in conditions:
        expected = [i for i, document in enumerate(documents) if matches(condition, document)]
        assert matching(database, condition) == expected, condition
    assert 0 in matching(database, Comparison(name, Operator.EQUAL, value))


def ordered(operator: Operator, value: object) -> bool:
    return operator in (Operator.EQUAL, Operator.NOT_EQUAL) or (value is not None and not isinstance(value, bool))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        yield from ((path, item) for item in value if not isinstance(item, (dict, list)))
    elif len(path) > 1:
        yield path, value


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        (Comparison("lang", Operator.EQUAL, "en"), {"english", "both"}),
        (Comparison("lang", Operator.NOT_EQUAL, "en"), {"old", "empty", "nested"}),
        (Comparison("year", Operator.GREATER_OR_EQUAL, 2020), {"english"}),
        (Comparison("year", Operator.LESS, "3"), {"both"}),
        (AllOf((Comparison("lang", Operator.EQUAL, "en"), Comparison("lang", Operator.EQUAL, "de"))), {"both"}),
        (AllOf((Comparison("year", Operator.GREATER, 2019), Comparison("year", Operator.LESS, 2021))), {"english"}),
        (Comparison("year", Operator.EQUAL, None), {"old"}),
        (Comparison("year", Operator.EQUAL, True), set()),
        (Existence("year"), {"english", "both", "old"}),
        (Prefix("lang", "d"), {"both", "old"}),
        (Membership("lang", ("de", None)), {"both", "old"}),
        (Comparison("a.b", Operator.EQUAL, True), {"nested"}),
        (Comparison("a.b", Operator.EQUAL, 1), set()),
        (Not(Existence("lang")), {"empty", "nested"}),
        (AnyOf((Existence("a.b"), Existence("a\\.b"))), {"nested", "empty"}),
    ],
)
def test_filters_match_the_documented_records(database: sqlite3.Connection, condition: Filter, found: set[str]) -> None:
    documents: dict[str, dict[str, Any]] = {
        "english": {"lang": "en", "year": 2020},
        "both": {"lang": ["en", "de"], "year": "2020"},
        "old": {"lang": "de", "year": None},
        "empty": {"a.b": 1},
        "nested": {"a": {"b": True}},
    }
    assert {name for name, document in documents.items() if matches(condition, document)} == found
    database.execute("DELETE FROM records")
    database.executemany(
        "INSERT INTO records (label, metadata) VALUES (?, ?)",
        [(i, json.dumps(document)) for i, document in enumerate(documents.values())],
    )
    assert {list(documents)[label] for label in matching(database, condition)} == found


@pytest.mark.parametrize(
    "condition",
    [
        Comparison("a", Operator.EQUAL, "x"),
        Comparison("a", Operator.EQUAL, 1.5),
        Comparison("it's", Operator.EQUAL, True),
        Comparison("br[0]", Operator.GREATER, "x"),
        Membership("a", ("x", 3.0, None)),
        Prefix("a", "x"),
        AllOf((Comparison("a", Operator.GREATER, 1.0), Not(Existence("b")), Comparison("a", Operator.LESS, 3.0))),
        AllOf((Comparison("a", Operator.EQUAL, "x"), Comparison("b", Operator.LESS, 3.0))),
    ],
)
def test_filters_on_indexed_fields_use_the_index(database: sqlite3.Connection, condition: Filter) -> None:
    clause = compile_filter(condition)
    plan = database.execute(f"EXPLAIN QUERY PLAN SELECT label FROM records WHERE {clause.sql}", clause.parameters)
    details = [row[3] for row in plan]
    assert any("USING INDEX metadata_" in detail for detail in details), details
    assert not any(detail.startswith("SCAN records") for detail in details), details


def test_field_names_are_parsed_to_keys() -> None:
    assert keys("a") == ("a",)
    assert keys("a.b") == ("a", "b")
    assert keys("a\\.b.c\\\\") == ("a.b", "c\\")
    assert keys("a.") == ("a", "")
    assert can_be_indexed("a\\.b.c")
    assert not can_be_indexed('a"b')
    assert not can_be_indexed("a\\")


ODD = ".".join(['"'] * MAX_KEYS)
#: Conditions that each use as much of the limits of SQLite as one condition can.
LARGE = {
    kind: Membership(name, ("x", 1.0, True, False, None))
    for kind, name in {"plain": "plain", "odd": ODD, "long": "'" * 1000}.items()
}


def chain(levels: int, beside: int, leaf: Filter) -> Filter:
    """Return a condition inside nested lists; each list has other conditions before and after it."""
    found = leaf
    for level in range(levels):
        kind = AllOf if level % 2 else AnyOf
        found = kind((leaf,) * (beside // 2) + (found,) + (leaf,) * (beside - beside // 2))
    return found


def tree(levels: int, width: int, leaf: Filter) -> Filter:
    if not levels:
        return leaf
    return (AllOf if levels % 2 else AnyOf)((tree(levels - 1, width, leaf),) * width)


def negated(condition: Filter, times: int) -> Filter:
    for _ in range(times):
        condition = Not(condition)
    return condition


def largest(leaf: Filter) -> list[Filter]:
    """The largest filters of each shape; the first two are the deepest."""
    return [
        chain(31, 7, leaf),
        negated(leaf, 31),
        chain(15, 15, Not(leaf)),
        tree(7, 2, leaf),
        tree(4, 3, leaf),
        tree(2, 15, leaf),
        negated(tree(2, 15, negated(leaf, 14)), 14),
        AnyOf(tuple(chain(15, 1, leaf) for _ in range(8))),
    ]


@pytest.mark.parametrize(
    "filters",
    [
        pytest.param(largest(LARGE["plain"]), id="plain"),
        # The deepest filter, and the one with the most bytes and parameters.
        pytest.param(largest(LARGE["long"])[:3], id="long"),
        pytest.param(largest(LARGE["long"])[3:], id="long, others", marks=pytest.mark.slow),
        pytest.param(largest(LARGE["odd"])[1:2], id="odd, deepest"),
        # SQLite takes 1 s of CPU time to prepare a statement whose fields have `MAX_KEYS` keys each.
        pytest.param(largest(LARGE["odd"]), id="odd", marks=pytest.mark.slow),
    ],
)
def test_sqlite_accepts_the_largest_filters(filters: list[Filter]) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE records (metadata TEXT)")
        database.execute("INSERT INTO records VALUES (?)", (json.dumps({"plain": "x"}),))
        for each in filters:
            clause = compile_filter(each)
            # Nested like in the deepest statement of the index.
            statement = f"SELECT count(*) FROM records WHERE rowid IN (SELECT rowid FROM records WHERE ({clause.sql}))"
            found = database.execute(statement, clause.parameters).fetchone()
            assert found == (matches(each, {"plain": "x"}),)


def test_explaining_a_filter_reads_metadata_until_its_fields_are_found() -> None:
    def documents() -> Iterator[dict[str, Any]]:
        for i in range(10):
            read.append(i)
            yield {"a": "1", "last": 9} if i == 9 else {"a": "1"}

    read: list[int] = []
    assert mismatches(AllOf((Prefix("a", "1"), Comparison("a", Operator.EQUAL, "1"))), documents()) == []
    assert read == [0]
    assert mismatches(AllOf((Prefix("a", "1"), Existence("last"))), documents()) == []
    assert len(mismatches(Not(Comparison("a", Operator.LESS, 2)), documents())) == 1


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (
            Comparison("lenght", Operator.GREATER, 3),
            "'lenght', and none of the 2 records examined has",
        ),
        (Existence("x"), "check its spelling"),
        (Membership("label", ("a", "b")), "filters compare metadata only, not the label of a record"),
        (AllOf((Prefix("text", "a"), Existence("length"))), "not the text of a record"),
        (Comparison("length", Operator.GREATER, "3"), "compares 'length' with a string, and the records have numbers"),
        (Prefix("length", "3"), "compares 'length' with a string"),
        (Comparison("length", Operator.EQUAL, 7), ""),
        (Membership("length", ("3", 7)), ""),
        (Comparison("length", Operator.EQUAL, True), ""),
        (Comparison("lang", Operator.EQUAL, "de"), ""),
        (Not(Existence("x")), ""),
        (AllOf((Comparison("x", Operator.NOT_EQUAL, 1), Not(AnyOf((Prefix("y", "1"),))))), ""),
        (Existence("empty"), ""),
    ],
)
def test_the_reason_for_a_filter_without_matches_is_returned(condition: Filter, expected: str) -> None:
    documents = [{"length": 3, "lang": "en"}, {"length": 4, "empty": []}]
    found = mismatches(condition, documents)
    assert len(found) == bool(expected)
    assert expected in "".join(found)
    assert mismatches(condition, []) == []


def test_explaining_a_filter_reads_a_limited_amount_of_metadata(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.upsert([NewRecord(f"r{i}", "", {"a": "1" * 1000}) for i in range(20)], vectors(20))
    monkeypatch.setattr(store_reader, "_MAX_METADATA", 5000)
    with closing(collection._store.metadata(1000)) as documents:
        assert len(list(documents)) == 4
    with closing(collection._store.metadata(3)) as documents:
        assert len(list(documents)) == 3
    assert len(collection.mismatches(Comparison("a", Operator.LESS, 2))) == 1
