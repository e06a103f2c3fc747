"""NUL characters are refused in metadata, compared correctly in records of older versions, and do not end texts."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.collections.filters import (
    AllOf,
    Comparison,
    Existence,
    Filter,
    Membership,
    Not,
    Operator,
    Prefix,
    matches,
)
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage import nul_metadata
from index.backups import restored, taken
from index.support import gaussian, make_checksums_right, refused

#: Metadata that older versions stored; some have no NUL.
DOCUMENTS: list[dict[str, Any]] = [
    {"tag": "a"},
    {"tag": "a\0b"},
    {"tag": "\0"},
    {"tag": ["a\0", "c"]},
    {"tag": "a", "other": "\0"},
    {"tag\0x": "a"},
    {'t"g\0x': "a"},
    {'t"g': "a\0b"},
    {'t"g': "a"},
    {"tag": "a\\u0000b"},
    {"in": {"tag": "a\0"}},
    {"n": 1, "tag": "a\0"},
]
VECTORS = gaussian(len(DOCUMENTS), 8)
CONDITIONS: list[Filter] = [
    *(Comparison("tag", operator, "a") for operator in Operator),
    Comparison('t"g', Operator.EQUAL, "a"),
    Existence('t"g'),
    Existence("tag"),
    Not(Comparison("tag", Operator.EQUAL, "a")),
    Membership("tag", ("", "a", "c")),
    Membership('t"g', ("", "a", "c")),
    Prefix("tag", "a"),
    Comparison("in.tag", Operator.EQUAL, "a"),
    AllOf((Comparison("n", Operator.EQUAL, 1), Comparison("tag", Operator.GREATER, "a"))),
]


def expected(condition: Filter) -> list[str]:
    return sorted(f"r{i}" for i, document in enumerate(DOCUMENTS) if matches(condition, document))


@pytest.fixture(params=[(), ("tag",)], ids=["", "indexed"])
def older(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Collection]:
    """A collection with the metadata `DOCUMENTS`, some with NUL, as an older version of emberpc stored them."""
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", 8, indexed_fields=request.param))
        collection.upsert([NewRecord(f"r{i}", "word", {}) for i in range(len(DOCUMENTS))], VECTORS)
    (path,) = tmp_path.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP INDEX metadata_nul")
        for i, document in enumerate(DOCUMENTS):
            text = json.dumps(document, ensure_ascii=False)
            connection.execute("UPDATE records SET metadata = ? WHERE id = ?", (text, f"r{i}"))
        make_checksums_right(connection)
    with closing(Index(tmp_path)) as index:
        yield index.get("c")


def test_filters_on_older_records_with_nul_are_right(older: Collection) -> None:
    for condition in CONDITIONS:
        wanted = expected(condition)
        assert older.count(condition) == len(wanted), condition
        assert [record.id for record in older.page(100, "", condition=condition)[0]] == wanted
        for outcome in (
            older.search(VECTORS[:1], 100, conditions=[condition])[0],
            older.search_lexical(["word"], [100], conditions=[condition])[0],
        ):
            assert sorted(record.id for record, _ in outcome.hits) == wanted


def test_a_filtered_delete_deletes_only_matching_records(older: Collection) -> None:
    condition = Comparison("tag", Operator.EQUAL, "a")
    assert older.delete_matching(condition).deleted == len(expected(condition))
    assert older.count() == len(DOCUMENTS) - len(expected(condition))
    assert older.count(condition) == 0


def test_older_records_with_nul_are_restored(older: Collection, tmp_path: Path) -> None:
    with closing(Index(tmp_path / "other")) as index:
        copy = restored(index, "d", taken(older))
        for condition in CONDITIONS:
            assert copy.count(condition) == len(expected(condition))


def test_filters_are_right_without_the_index_of_nul(older: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the case on a full disk, where the index cannot be created."""
    older._store._writer.execute("DROP INDEX metadata_nul")
    monkeypatch.setattr(nul_metadata, "_INDEX", "CREATE INDEX metadata_nul ON missing (a)")
    nul_metadata.make_index(older._store._writer, "collection 'c'")
    for condition in CONDITIONS:
        assert older.count(condition) == len(expected(condition))


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"tag": "a\0b"}, "'tag'"),
        ({"a": {"b": [1, {"c": "\0"}]}}, "'a.b.c'"),
        ({"a\0b": 1}, "a\\x00b"),
        ({"in": {"a\0b": 1}}, "in.a\\x00b"),
    ],
)
def test_metadata_with_nul_is_refused(collection: Collection, metadata: dict[str, Any], field: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "NUL", field, "leave it out", field="records[0].metadata"):
        collection.upsert([NewRecord("a", "", metadata)], gaussian(1, collection.spec.dimensions))
    assert collection.count() == 0


def test_an_escaped_backslash_is_not_read_as_nul(collection: Collection) -> None:
    metadata = {"tag": "a\\u0000b"}
    collection.upsert([NewRecord("a", "", metadata)], gaussian(1, collection.spec.dimensions))
    assert collection.count(Comparison("tag", Operator.EQUAL, "a\\u0000b")) == 1
    assert collection.count(Comparison("tag", Operator.EQUAL, "a")) == 0


def test_texts_and_labels_continue_after_a_nul(collection: Collection) -> None:
    texts = ["cat\0dog", "\0", "fish\0", "cat"]
    records = [NewRecord(f"r{i}", text, {}, f"label\0{i}") for i, text in enumerate(texts)]
    collection.upsert(records, gaussian(len(texts), collection.spec.dimensions))
    for query, wanted in {"dog": ["r0"], "cat\0dog": ["r0", "r3"], "cat": ["r0", "r3"], "fish": ["r2"]}.items():
        (outcome,) = collection.search_lexical([query], [10])
        assert sorted(record.id for record, _ in outcome.hits) == wanted, query
    (outcome,) = collection.search(gaussian(1, collection.spec.dimensions), 10)
    found = {record.id: (record.text, record.label) for record, _ in outcome.hits}
    assert found == {f"r{i}": (text, f"label\0{i}") for i, text in enumerate(texts)}
    assert collection.count_without_text() == 0
    assert [each for step in collection.verify() for each in step.problems] == []
