"""Records with a time to live exist until it is over, and are deleted afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage.store import Store
from index.support import Clock
from index_helpers import DIMENSIONS, records, vectors

#: Time to live of records in seconds, by the clock of the test.
LIFE = 2.0


def short_lived(*ids: str, seconds: float) -> list[NewRecord]:
    return [NewRecord(each, f"text of {each}", time_to_live=seconds) for each in ids]


def test_a_record_is_deleted_after_its_time_to_live_and_others_stay(
    index: Index, collection: Collection, clock: Clock
) -> None:
    matrix = vectors(3)
    collection.upsert(records("stays"), matrix[:1])
    collection.upsert(short_lived("goes", seconds=LIFE), matrix[1:2])
    collection.upsert(short_lived("goes later", seconds=3600), matrix[2:])
    (there,) = collection.get(["goes"])
    assert there.expire_time is not None
    assert there.expire_time.timestamp() == pytest.approx(clock.now + LIFE, abs=1e-3)
    sequence = collection.info().sequence
    clock.move_on(index, LIFE, lambda: not collection.get(["goes"]))
    assert collection.info().sequence == sequence + 1
    hits = collection.search(matrix[1:2], 3)[0].hits
    assert {record.id for record, _ in hits} == {"stays", "goes later"}
    assert collection.count() == 2
    assert not [problem for step in collection.verify() for problem in step.problems]


def test_an_upsert_replaces_the_time_to_live(index: Index, collection: Collection, clock: Clock) -> None:
    collection.upsert(short_lived("a", "b", seconds=LIFE), vectors(2))
    collection.upsert(records("a"), vectors(1))
    clock.move_on(index, LIFE, lambda: not collection.get(["b"]))
    assert collection.get(["a"])[0].expire_time is None


def test_records_that_expire_while_the_index_is_closed_are_not_found(tmp_path: Path, clock: Clock) -> None:
    matrix = vectors(20)
    index = Index(tmp_path, buffer_limit=8)
    collection = index.create(CollectionSpec("c", DIMENSIONS))
    collection.upsert(records("stays"), matrix[:1])
    collection.upsert(short_lived(*map(str, range(19)), seconds=LIFE), matrix[1:])
    index.close()
    clock.now += 2 * LIFE
    reopened = Index(tmp_path, buffer_limit=8)
    try:
        collection = reopened.get("c")
        assert [record.id for record, _ in collection.search(matrix[1:2], 10)[0].hits] == ["stays"]
    finally:
        reopened.close()


def test_records_expire_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("c", DIMENSIONS)).upsert(short_lived("a", seconds=LIFE), vectors(1))
    index.close()
    reopened = Index(tmp_path)
    try:
        clock.move_on(reopened, LIFE, lambda: reopened.get("c").count() == 0)
    finally:
        reopened.close()


def test_many_expired_records_are_deleted_in_writes_of_a_limited_size(
    index: Index, collection: Collection, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberpc.server.index.collection._EXPIRED_AT_ONCE", 100)
    ids = [str(i) for i in range(230)]
    collection.upsert(short_lived(*ids, seconds=LIFE), vectors(len(ids)))
    clock.move_on(index, LIFE, lambda: collection.count() == 0)
    assert collection.info().sequence == 4


def test_a_collection_with_expired_records_opens_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("c", DIMENSIONS)).upsert(records("a"), vectors(1))
    index.close()

    def full(*_: object) -> None:
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "the disk is full")

    monkeypatch.setattr(Store, "delete_expired", full)
    reopened = Index(tmp_path)
    try:
        assert reopened.get("c").count() == 1
    finally:
        reopened.close()
