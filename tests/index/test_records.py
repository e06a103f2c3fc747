"""Records: stored values, refused values, revisions, and the order of pages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from index.support import gaussian, numbered, refused

VECTOR = np.ones((1, 4), dtype=np.float32)


@pytest.fixture
def collection(index: Index) -> Collection:
    return index.create(CollectionSpec("c", 4))


def ids_of(collection: Collection, page_size: int) -> list[str]:
    ids, token = [], ""
    while True:
        page, token = collection.page(page_size, token)
        ids += [record.id for record in page]
        if not token:
            return ids


def put(collection: Collection, *new: NewRecord, expected: list[int] | None = None) -> int:
    return collection.upsert(list(new), gaussian(len(new), 4), expected).sequence


def test_get_keeps_the_order_of_ids_and_leaves_out_missing_records(collection: Collection) -> None:
    put(collection, *numbered(2000))
    ids = [f"r{i:05}" for i in (1999, 3, 0, 1000)]
    assert [record.id for record in collection.get([*ids, "nobody"])] == ids
    assert len(collection.get([record.id for record in numbered(2000)])) == 2000
    assert collection.get([]) == []


@pytest.mark.parametrize(
    ("record_id", "word"),
    [
        ("", "empty"),
        ("x" * 513, "513 bytes"),
        ("ü" * 257, "514 bytes"),
        ("a\nb", "control"),
        ("a\x7f", "control"),
        ("a\x00", "control"),
        ("a\ud800", "surrogate"),
    ],
)
def test_an_invalid_id_is_refused_and_nothing_is_written(collection: Collection, record_id: str, word: str) -> None:
    with refused(Code.INVALID_ARGUMENT, word, field="records[1].id"):
        put(collection, NewRecord("good"), NewRecord(record_id))
    assert collection.count() == 0


def test_the_longest_id_is_accepted(collection: Collection) -> None:
    put(collection, NewRecord("ü" * 256))
    assert ids_of(collection, 10) == ["ü" * 256]


def test_a_repeated_id_in_one_write_is_refused(collection: Collection) -> None:
    with refused(Code.INVALID_ARGUMENT, "records[0]", field="records[2].id"):
        put(collection, NewRecord("a"), NewRecord("b"), NewRecord("a"))


def deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(100_000):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": object()},
        {"a": "\ud800"},
        {"a": "x" * 65536},
        ["no", "object"],
        deep(),
    ],
    ids=["nan", "infinity", "object", "surrogate", "large", "list", "deep"],
)
def test_metadata_that_is_too_large_or_no_json_object_is_refused(collection: Collection, metadata: Any) -> None:
    with refused(Code.INVALID_ARGUMENT, field="records[0].metadata"):
        put(collection, NewRecord("a", metadata=metadata))
    assert collection.count() == 0


def test_metadata_of_64_kib_is_accepted(collection: Collection) -> None:
    size = 64 * 1024 - len(json.dumps({"a": ""}))
    put(collection, NewRecord("a", metadata={"a": "x" * size}))
    with refused(Code.INVALID_ARGUMENT, "65537 bytes"):
        put(collection, NewRecord("a", metadata={"a": "x" * (size + 1)}))


def test_a_text_or_label_of_invalid_unicode_is_refused(collection: Collection) -> None:
    with refused(Code.INVALID_ARGUMENT, field="records[0].text"):
        put(collection, NewRecord("a", text="\udfff"))
    with refused(Code.INVALID_ARGUMENT, field="records[0].label"):
        put(collection, NewRecord("a", label="\udfff"))


def test_an_empty_write_is_refused(collection: Collection) -> None:
    with refused(Code.INVALID_ARGUMENT, field="records"):
        put(collection)


def test_a_write_with_an_outdated_expected_revision_changes_nothing(collection: Collection) -> None:
    put(collection, NewRecord("a", "1"))
    put(collection, NewRecord("b", "1"))
    assert put(collection, NewRecord("a", "2"), NewRecord("c", "1"), expected=[1, 0]) == 3
    with refused(Code.ABORTED, "'b'", "revision 2", "not 1"):
        put(collection, NewRecord("a", "3"), NewRecord("b", "2"), expected=[3, 1])
    with refused(Code.ABORTED, "'a'", "revision 3", "not 0"):
        put(collection, NewRecord("a", "3"), expected=[0])
    with refused(Code.ABORTED, "'d'", "revision 0", "not 1"):
        put(collection, NewRecord("d"), expected=[1])
    assert [record.text for record in collection.get(["a", "b", "c", "d"])] == ["2", "1", "1"]
    assert collection.info().sequence == 3
    assert len(collection.search(VECTOR, 10)[0].hits) == 3
    with refused(Code.INVALID_ARGUMENT, field="expected_revisions"):
        put(collection, NewRecord("a"), expected=[3, 3])


def test_a_deleted_record_has_revision_0_and_a_new_one_a_new_create_time(collection: Collection) -> None:
    put(collection, NewRecord("a"))
    before = collection.get(["a"])[0].create_time
    collection.delete(["a"])
    put(collection, NewRecord("a"), expected=[0])
    after = collection.get(["a"])[0]
    assert after.revision == 3
    assert after.create_time > before


def test_records_are_listed_in_byte_order_with_any_page_size(collection: Collection) -> None:
    ids = ["a", "A", "b", "é", "z", "\U0001f600", "\uffee", "aa", "a b", "10", "9"]
    put(collection, *[NewRecord(record_id) for record_id in ids])
    expected = sorted(ids, key=str.encode)
    for size in (1, 2, 3, 11, 12):
        assert ids_of(collection, size) == expected


def test_paging_returns_each_staying_record_once_despite_writes_and_deletes(collection: Collection) -> None:
    put(collection, *[NewRecord(f"stays{i:03}") for i in range(100)])
    put(collection, *[NewRecord(f"stays{i:03}-goes") for i in range(100)])
    ids, token = [], ""
    for step in range(1000):
        page, token = collection.page(7, token)
        ids += [record.id for record in page]
        if not token:
            break
        # The record of the page token is deleted, others are inserted before and after it, and a staying one is
        # written again.
        collection.delete([page[-1].id] if page[-1].id.endswith("goes") else [])
        put(collection, NewRecord("aaa"), NewRecord(f"stays{step:03}-comes"), NewRecord("stays050", f"{step}"))
    assert [record_id for record_id in ids if record_id.removeprefix("stays").isdigit()] == [
        f"stays{i:03}" for i in range(100)
    ]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("size", [-1, 0, 1001])
def test_a_page_size_out_of_bounds_is_refused(collection: Collection, index: Index, size: int) -> None:
    with refused(Code.INVALID_ARGUMENT, field="page_size"):
        collection.page(size, "")
    with refused(Code.INVALID_ARGUMENT, field="page_size"):
        index.page(size, "")


def test_info_returns_counts_sequence_times_and_size(collection: Collection) -> None:
    before = collection.info()
    assert (before.record_count, before.sequence) == (0, 0)
    put(collection, *numbered(200))
    collection.delete(["r00000"])
    after = collection.info()
    assert (after.record_count, after.sequence, after.create_time) == (199, 2, before.create_time)
    assert after.size_bytes > before.size_bytes > 0


def test_metadata_is_decoded_on_each_access(collection: Collection) -> None:
    """The metadata of a response of 400 records, nested and held as Python objects, took 200 MB."""
    metadata = {"a": [{"k": 1}], "b": "ü"}
    put(collection, NewRecord("a", metadata=metadata), NewRecord("b"))
    first, second = collection.get(["a", "b"])
    assert (first.metadata_text, second.metadata_text) == (json.dumps(metadata, ensure_ascii=False), "{}")
    assert (first.metadata, second.metadata) == (metadata, {})
    first.metadata["a"].append(2)
    assert first.metadata == metadata
