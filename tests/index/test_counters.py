"""Damaged counters of a collection are reported, and writes and backups that need them are refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from index.backups import restored, taken
from index.damages import COUNT, VECTORS, WIDTH, damaged
from index.support import refused

LARGEST = 2**63 - 1
#: Writes that are refused for each damage: an upsert needs both counters, a delete only the sequence.
SEQUENCE, LABEL, NEITHER = ("upsert", "delete"), ("upsert",), ()


def problems(collection: Collection) -> list[tuple[str, str]]:
    return [(each.id, each.reason) for step in collection.verify() for each in step.problems]


def change(folder: Path, statement: str) -> None:
    with damaged(folder, "revision = revision") as collection:
        collection.upsert([NewRecord("last", "")], VECTORS[:1])  # revision 2
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize(
    ("statement", "refused_writes"),
    [
        (f"UPDATE state SET sequence = {LARGEST}", SEQUENCE),
        (f"UPDATE state SET sequence = {2**62 + 1}", SEQUENCE),
        ("UPDATE state SET sequence = -4", SEQUENCE),
        ("UPDATE state SET sequence = 1", NEITHER),
        (f"UPDATE sqlite_sequence SET seq = {LARGEST}", LABEL),
        (f"UPDATE sqlite_sequence SET seq = {LARGEST - 1}", LABEL),
        ("UPDATE sqlite_sequence SET seq = -4", LABEL),
        ("UPDATE sqlite_sequence SET seq = 5", NEITHER),
        ("INSERT INTO sqlite_sequence VALUES ('other', 5)", LABEL),
    ],
)
def test_a_damaged_counter_is_reported_and_writes_that_need_it_are_refused(
    tmp_path: Path, statement: str, refused_writes: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    change(tmp_path, statement)
    with closing(Index(tmp_path)) as index:
        collection = index.get("c")
        assert len(collection.search(VECTORS[:1], COUNT + 1)[0].hits) == COUNT + 1
        assert problems(collection) == [("", "DATABASE_DAMAGED")]
        with refused(Code.INTERNAL, "a counter", "'c'", "restore a backup") as caught:
            list(collection.backup(lambda: False))
        assert caught.value.reason == "DATABASE_DAMAGED"
        writes: dict[str, Callable[[], object]] = {
            "upsert": lambda: collection.upsert([NewRecord("new", "")], VECTORS[:1]),
            "delete": lambda: collection.delete(["r00003"]),
        }
        for name, write in writes.items():
            if name in refused_writes:
                with refused(Code.INTERNAL, "a counter", "restore a backup") as caught:
                    write()
                assert caught.value.reason == "DATABASE_DAMAGED"
            else:
                write()
        assert ("a counter" in caplog.text) is bool(refused_writes)


def test_a_record_with_the_greatest_label_does_not_prevent_upserts(tmp_path: Path) -> None:
    """A record with the greatest integer as its label must not make every upsert fail."""
    with damaged(tmp_path, f"label = {LARGEST}") as collection:
        collection.upsert([NewRecord("new", "")], VECTORS[:1])
        assert problems(collection) == [("r00007", "RECORD_DAMAGED")]
        collection.upsert([NewRecord("r00007", "text of r00007")], VECTORS[7:8])
        assert problems(collection) == []
        assert len(taken(collection)) > 0


def test_a_backup_of_sound_counters_is_restored(tmp_path: Path) -> None:
    with closing(Index(tmp_path)) as index:
        empty = index.create(CollectionSpec("c", WIDTH))
        assert problems(empty) == []
        assert restored(index, "d", taken(empty)).count() == 0
        empty.upsert([NewRecord("a", "")], VECTORS[:1])
        empty.delete(["a"])
        assert problems(empty) == []
        assert restored(index, "e", taken(empty)).info().sequence == 2
