"""A file that is no whole backup of a collection is refused with the reason, and leaves no files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs import backup_checks
from emberpc.server.index.jobs.backup import HEADROOM, LAST_LINE_SIZE
from index.backups import accept_all, changed, folders, restored, sealed, taken
from index.support import gaussian, make_checksums_right, make_older, numbered, refused
from index.test_safety import largest_file
from index_helpers import DIMENSIONS, records, vectors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The backup of a collection of 50 records."""
    with closing(Index(tmp_path_factory.mktemp("backed-up"))) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS, indexed_fields=("id",)))
        collection.upsert(records(*(f"r{i}" for i in range(50))), vectors(50))
        collection.delete(["r0"])
        return taken(collection)


@pytest.fixture(autouse=True)
def nothing_is_left(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that each test leaves only folders of existing collections, and closes the databases that it checks."""
    opened: list[sqlite3.Connection] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(sqlite3.connect(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(backup_checks, "sqlite3", SimpleNamespace(**{**vars(sqlite3), "connect": connect}))
    yield
    assert folders(tmp_path) == len(index.page(100, "")[0]) if (tmp_path / "collections").exists() else True
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")


def test_a_backup_cut_off_at_any_place_is_refused(index: Index, whole: bytes) -> None:
    for size in (0, 1, 50, 87, 88, 5000, len(whole) // 2, len(whole) - 88, len(whole) - 1):
        with refused(Code.INVALID_ARGUMENT, "cut off"):
            restored(index, "d", whole[:size])


def test_a_backup_with_a_flipped_bit_is_refused(index: Index, whole: bytes) -> None:
    chance = random.Random(0)
    places = [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        with refused(Code.INVALID_ARGUMENT, "restore another copy") as caught:
            restored(index, "d", bytes(flipped))
        assert caught.value.reason == "BACKUP_DAMAGED"


def test_a_backup_with_changed_pages_and_a_valid_last_line_is_refused_or_sound(index: Index, whole: bytes) -> None:
    """Such files can come from an attacker who knows the format: SQLite reads arbitrary pages."""
    chance = random.Random(1)
    page = 4096
    came_through = 0
    for _ in range(40):
        body = bytearray(whole[:-88])
        for _ in range(chance.randint(1, 40)):
            body[chance.randrange(page * 2, len(body))] = chance.randrange(256)
        try:
            collection = restored(index, "d", sealed(bytes(body)))
        except ServiceError as error:
            assert error.code is Code.INVALID_ARGUMENT
            continue
        # The changed bytes are in a text, or unused.
        came_through += 1
        assert collection.count() == 49
        assert [problem for step in collection.verify() for problem in step.problems] == []
        collection.search_lexical(["text"], [100])
        index.delete("d")
    assert came_through < 40


@pytest.mark.parametrize("body", [b"", b"x", b"no database at all" * 1000, b"SQLite format 3\0" + b"\0" * 4080])
def test_bytes_that_are_no_database_are_refused_despite_a_right_last_line(index: Index, body: bytes) -> None:
    with refused(Code.INVALID_ARGUMENT):
        restored(index, "d", sealed(body))


def test_a_database_of_another_program_is_refused(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    with refused(Code.INVALID_ARGUMENT, "something else") as caught:
        restored(index, "d", sealed(path.read_bytes()))
    assert caught.value.reason == "NOT_A_BACKUP"


@pytest.mark.parametrize("change", ["PRAGMA user_version = 99", "UPDATE backup SET format = 2"])
def test_a_backup_of_a_newer_version_is_refused_with_the_reason(
    index: Index, whole: bytes, tmp_path: Path, change: str
) -> None:
    with refused(Code.FAILED_PRECONDITION, "newer version"):
        restored(index, "d", changed(whole, tmp_path / "changed.db", change))


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE more (a)",
        "CREATE VIEW more AS SELECT 1",
        "CREATE TRIGGER more AFTER INSERT ON records BEGIN DELETE FROM records; END",
        "CREATE INDEX more ON records (text)",
        "CREATE INDEX more ON records (abs(label))",
        "CREATE VIRTUAL TABLE more USING fts5(a)",
        "DROP TRIGGER words_of_new",
        "ALTER TABLE records ADD COLUMN more",
        "PRAGMA user_version = 0",
        "PRAGMA user_version = -1",
        "PRAGMA application_id = 7",
        "DROP TABLE backup",
    ],
)
def test_unknown_tables_triggers_views_and_indexes_are_refused(
    index: Index, whole: bytes, tmp_path: Path, change: str
) -> None:
    with refused(Code.INVALID_ARGUMENT) as caught:
        restored(index, "d", changed(whole, tmp_path / "changed.db", change))
    assert caught.value.reason == "NOT_A_BACKUP"


def test_column_and_table_names_that_are_not_utf8_are_refused(index: Index, whole: bytes, tmp_path: Path) -> None:
    for name in (b"sequence", b"metadata", b"record"):
        body = changed(whole, tmp_path / "changed.db")[:-LAST_LINE_SIZE].replace(name, b"\xff\xfe" + name[2:])
        with refused(Code.INVALID_ARGUMENT):
            restored(index, "d", sealed(body))


def test_a_view_in_place_of_a_table_is_refused(index: Index, whole: bytes, tmp_path: Path) -> None:
    renamed = ("ALTER TABLE records RENAME TO hidden", "CREATE VIEW records AS SELECT * FROM hidden")
    with refused(Code.INVALID_ARGUMENT, "tables"):
        restored(index, "d", changed(whole, tmp_path / "changed.db", *renamed))


NAN = np.full(DIMENSIONS, np.nan, dtype="<f4").tobytes().hex()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE records SET vector = zeroblob(63) WHERE id = 'r7'",
        "UPDATE records SET vector = zeroblob(64) WHERE id = 'r7'",
        f"UPDATE records SET vector = x'{NAN}' WHERE id = 'r7'",
        "UPDATE records SET vector = 'text' WHERE id = 'r7'",
        "UPDATE records SET metadata = '[]' WHERE id = 'r7'",
        "UPDATE records SET metadata = '{' WHERE id = 'r7'",
        "UPDATE records SET metadata = '{\"a\": NaN}' WHERE id = 'r7'",
        "UPDATE records SET metadata = '{\"a\": \"\\ud800\"}' WHERE id = 'r7'",
        "UPDATE records SET id = '' WHERE id = 'r7'",
        "UPDATE records SET id = 'a' || char(10) WHERE id = 'r7'",
        "UPDATE records SET id = x'00' WHERE id = 'r7'",
        "UPDATE records SET text = CAST(x'ff' AS TEXT) WHERE id = 'r7'",
        "UPDATE records SET text = x'ff' WHERE id = 'r7'",
        "UPDATE records SET class_label = 7.5e0 || x'ff' WHERE id = 'r7'",
        "UPDATE records SET revision = 'seven' WHERE id = 'r7'",
        "UPDATE records SET revision = 9 WHERE id = 'r7'",
        "UPDATE records SET created = 9e999 WHERE id = 'r7'",
        "UPDATE records SET updated = 1e300 WHERE id = 'r7'",
        "UPDATE records SET label = -5 WHERE id = 'r7'",
        "UPDATE state SET sequence = 'x'",
        "UPDATE state SET sequence = 9223372036854775807",
        "DELETE FROM state",
        "UPDATE sqlite_sequence SET seq = 9223372036854775807",
        "UPDATE sqlite_sequence SET seq = 'x'",
        "UPDATE sqlite_sequence SET seq = 3",
        "DELETE FROM backup",
        "UPDATE backup SET spec = '{}'",
        "UPDATE backup SET spec = 'x'",
        "UPDATE backup SET spec = 7",
        "UPDATE backup SET created = 1e300",
        "UPDATE backup SET created = 'x'",
        "UPDATE backup SET format = 'x'",
    ],
)
def test_a_value_that_emberpc_never_writes_is_refused(index: Index, whole: bytes, tmp_path: Path, change: str) -> None:
    # An attacker would also set matching checksums.
    with refused(Code.INVALID_ARGUMENT) as caught:
        restored(index, "d", changed(whole, tmp_path / "changed.db", change, make_checksums_right))
    assert caught.value.reason == "BACKUP_DAMAGED"


def test_a_record_with_a_wrong_checksum_is_refused(index: Index, whole: bytes, tmp_path: Path) -> None:
    change = "UPDATE records SET text = 'another' WHERE id = 'r7'"
    with refused(Code.INVALID_ARGUMENT, "'r7' is not as it was written"):
        restored(index, "d", changed(whole, tmp_path / "changed.db", change))


@pytest.mark.parametrize(
    "setting",
    [
        {"dimensions": 17},
        {"dimensions": 16.0},
        {"dimensions": 0},
        {"m": 1},
        {"m": "16"},
        {"distance": "manhattan"},
        {"indexed_fields": [7]},
        {"indexed_fields": "id"},
        {"name": "../d"},
        {"unknown": 1},
    ],
)
def test_invalid_settings_of_a_collection_are_refused(
    index: Index, whole: bytes, tmp_path: Path, setting: dict[str, object]
) -> None:
    def change(database: sqlite3.Connection) -> None:
        (spec,) = database.execute("SELECT spec FROM backup").fetchone()
        database.execute("UPDATE backup SET spec = ?", (json.dumps(json.loads(spec) | setting),))

    with refused(Code.INVALID_ARGUMENT) as caught:
        restored(index, "d", changed(whole, tmp_path / "changed.db", change))
    assert caught.value.reason == "BACKUP_DAMAGED"


@pytest.mark.parametrize("created", ["1e17", "1e300", "-1e17"])
def test_an_impossible_create_time_is_refused(index: Index, whole: bytes, tmp_path: Path, created: str) -> None:
    with refused(Code.INVALID_ARGUMENT, "what it says of the collection") as caught:
        restored(index, "d", changed(whole, tmp_path / "changed.db", f"UPDATE backup SET created = {created}"))
    assert caught.value.reason == "BACKUP_DAMAGED"


def test_a_collection_that_the_service_refuses_is_not_restored(index: Index, whole: bytes) -> None:
    def refuse(spec: CollectionSpec) -> None:
        raise ValueError(spec.name)

    restoration = index.restore("d", 0, refuse)
    with closing(restoration):
        restoration.write(whole)
        with refused(Code.INVALID_ARGUMENT, "what it says of the collection"):
            restoration.finish(hashlib.sha256(whole).hexdigest())


def test_the_word_index_is_rebuilt_from_the_texts(index: Index, whole: bytes, tmp_path: Path) -> None:
    """The word index of the file is ignored: a lexical search uses the texts of the records."""
    gone = "INSERT INTO words (words) VALUES ('delete-all')"
    lie = "INSERT INTO words (rowid, text) VALUES (3, 'a lie')"
    other = "UPDATE records SET search_text = 'a lie'"
    collection = restored(index, "d", changed(whole, tmp_path / "changed.db", gone, lie, other))
    assert len(collection.search_lexical(["text"], [100])[0].hits) == 49
    assert collection.search_lexical(["lie"], [100])[0].hits == []


@pytest.mark.parametrize("column", ["text_checksum", "checksum", "row_checksum"])
def test_a_record_without_a_checksum_is_refused(index: Index, whole: bytes, tmp_path: Path, column: str) -> None:
    change = f"UPDATE records SET {column} = NULL WHERE id = 'r7'"
    with refused(Code.INVALID_ARGUMENT, "'r7' is not as it was written"):
        restored(index, "d", changed(whole, tmp_path / "changed.db", change))


@pytest.mark.parametrize("version", [0, 4, 6])
def test_a_backup_of_an_older_version_is_converted(index: Index, whole: bytes, tmp_path: Path, version: int) -> None:
    collection = restored(index, "d", changed(whole, tmp_path / "changed.db", partial(make_older, version=version)))
    assert len(collection.search_lexical(["text"], [100])[0].hits) == 49


def test_a_missing_or_wrong_sha256_is_refused(index: Index, whole: bytes) -> None:
    for sha256, words in (("", "is missing"), ("0" * 64, "send it again"), ("x" * 1000, "send it again")):
        with closing(index.restore("d", len(whole), accept_all)) as restoration:
            restoration.write(whole)
            with refused(Code.INVALID_ARGUMENT, "sha256", words):
                restoration.finish(sha256)


def test_a_used_or_invalid_name_is_refused_before_any_data(index: Index, collection: Collection, whole: bytes) -> None:
    with refused(Code.ALREADY_EXISTS, "'c'"):
        index.restore("c", 0, accept_all)
    for name in ("", "../c", "a/b", "x" * 129):
        with refused(Code.INVALID_ARGUMENT, field="name"):
            index.restore(name, 0, accept_all)


def test_the_later_of_two_restores_to_one_name_is_refused(index: Index, whole: bytes) -> None:
    slow = index.restore("d", len(whole), accept_all)
    with closing(slow):
        slow.write(whole)
        collection = restored(index, "d", whole)
        with refused(Code.ALREADY_EXISTS, "'d'"):
            slow.finish(hashlib.sha256(whole).hexdigest())
    assert collection.count() == 49
    assert index.get("d") is collection


def test_calls_on_a_closed_restore_are_refused(index: Index, whole: bytes) -> None:
    restoration = index.restore("d", len(whole), accept_all)
    restoration.write(whole)
    restoration.close()
    for call in (lambda: restoration.write(b"x"), lambda: restoration.finish(hashlib.sha256(whole).hexdigest())):
        with refused(Code.UNAVAILABLE, "given up"):
            call()


def test_a_restored_collection_survives_a_restart_and_can_be_deleted(tmp_path: Path, whole: bytes) -> None:
    data_dir = tmp_path / "data"
    with closing(Index(data_dir)) as first:
        restored(first, "d", whole, step=1000).upsert(records("new"), vectors(1))
    with closing(Index(data_dir)) as second:
        assert second.get("d").count() == 50
        assert second.get("d").spec.indexed_fields == ("id",)
        second.delete("d")
        assert folders(data_dir) == 0


def test_closing_the_index_ends_a_restore_in_progress(tmp_path: Path, whole: bytes) -> None:
    data_dir = tmp_path / "data"
    index = Index(data_dir)
    restoration = index.restore("d", 0, accept_all)
    restoration.write(whole)
    index.close()
    with closing(restoration), refused(Code.UNAVAILABLE, "closed"):
        restoration.finish(hashlib.sha256(whole).hexdigest())
    with closing(Index(data_dir)) as again:
        assert again.page(10, "") == ([], "")
        assert folders(data_dir) == 0


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_restore_without_space_on_the_disk_is_refused_with_the_needed_bytes(
    index: Index, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [64 * 2**20 + 150_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - free[0], free[0]))
    with refused(Code.RESOURCE_EXHAUSTED, f"needs {1_000_000 + HEADROOM} free bytes", "free some space"):
        index.restore("d", 1_000_000, accept_all)
    with closing(index.restore("d", 0, accept_all)) as restoration:
        restoration.write(whole)
        free[0] -= 149_000
        with refused(Code.RESOURCE_EXHAUSTED, f"needs {len(whole) + HEADROOM} free bytes", f"{free[0]} are free"):
            restoration.write(whole)


def test_a_file_size_limit_is_reported_as_a_full_disk_and_nothing_is_restored(index: Index, whole: bytes) -> None:
    with largest_file(20_000), refused(Code.RESOURCE_EXHAUSTED, "disk is full", "nothing was restored"):
        restored(index, "d", whole)
    with refused(Code.NOT_FOUND):
        index.get("d")


def test_collections_of_every_distance_are_restored(index: Index) -> None:
    for distance in Distance:
        collection = index.create(CollectionSpec(f"of-{distance.value}", 4, distance=distance))
        matrix = gaussian(20, 4)
        collection.upsert(numbered(20), matrix)
        copy = restored(index, f"copy-{distance.value}", taken(collection))
        for of_copy, of_original in zip(copy.search(matrix, 3), collection.search(matrix, 3), strict=True):
            assert [record for record, _ in of_copy.hits] == [record for record, _ in of_original.hits]
            # The graph and the buffer add the products in different orders.
            assert [score for _, score in of_copy.hits] == pytest.approx([score for _, score in of_original.hits])
