"""The data directory: collections by name, and one server at a time."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from emberpc.server.collections import CollectionSpec, Distance
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph import snapshots
from emberpc.server.index.graph.persistent_graph import PersistentGraph
from index.support import refused
from index_helpers import DIMENSIONS, records, vectors


def test_a_collection_has_its_spec_after_a_restart(tmp_path: Path) -> None:
    spec = CollectionSpec(
        "c", DIMENSIONS, model="m", model_fingerprint="f", distance=Distance.EUCLIDEAN, truncation="end", m=8,
        ef_construction=50, indexed_fields=("lang",),
    )  # fmt: skip
    index = Index(tmp_path)
    created = index.create(spec).info().create_time
    index.close()
    index = Index(tmp_path)
    assert index.get("c").spec == spec
    assert index.get("c").info().create_time == created
    index.close()


def test_collections_are_listed_in_order_of_names(index: Index) -> None:
    for name in ("b", "a", "d", "c", "e"):
        index.create(CollectionSpec(name, 3))
    first, token = index.page(2, "")
    rest, end = index.page(10, token)
    assert [each.name for each in (*first, *rest)] == list("abcde")
    assert end == ""


def test_a_name_can_be_used_again_after_the_collection_is_deleted(
    index: Index, collection: Collection, tmp_path: Path
) -> None:
    collection.upsert(records("a"), vectors(1))
    with pytest.raises(ServiceError) as refused:
        index.create(CollectionSpec("c", 3))
    assert refused.value.code is Code.ALREADY_EXISTS
    index.delete("c")
    with pytest.raises(ServiceError) as missing:
        index.get("c")
    assert missing.value.code is Code.NOT_FOUND
    assert list((tmp_path / "collections").iterdir()) == []
    assert index.create(CollectionSpec("c", 3)).count() == 0


def test_calls_on_a_deleted_collection_are_unavailable(index: Index, collection: Collection) -> None:
    index.delete("c")
    for call in (
        collection.count,
        lambda: collection.get(["a"]),
        lambda: collection.search(vectors(1), [1]),
        lambda: collection.upsert(records("a"), vectors(1)),
        lambda: collection.page(10, ""),
        collection.maintain,
    ):
        with pytest.raises(ServiceError) as refused:
            call()
        assert refused.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "collection.name"),
        ({"name": "-a"}, "collection.name"),
        ({"name": "a" * 129}, "collection.name"),
        ({"name": "a\n"}, "collection.name"),
        ({"dimensions": 0}, "collection.dimensions"),
        ({"dimensions": 16_001}, "collection.dimensions"),
        ({"m": 3}, "collection.hnsw.m"),
        ({"ef_construction": 2001}, "collection.hnsw.ef_construction"),
    ],
)
def test_an_invalid_spec_is_refused_with_its_field(index: Index, changes: dict[str, object], field: str) -> None:
    fields: dict[str, object] = {"name": "c", "dimensions": 3, **changes}
    with pytest.raises(ServiceError) as refused:
        index.create(CollectionSpec(**fields))  # type: ignore[arg-type]  # that is the point
    assert refused.value.violations[0].field == field


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from emberpc.server.index import Index; index = Index(pathlib.Path(sys.argv[1])); "
        "print('in', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == "in\n"
    with pytest.raises(ServiceError, match="another server") as refused:
        Index(tmp_path)
    assert refused.value.code is Code.FAILED_PRECONDITION
    assert str(tmp_path) in refused.value.message
    first.kill()
    first.wait(300)
    first.stdout.close()
    first.stdin.close()
    Index(tmp_path).close()


def test_a_folder_that_the_catalogue_does_not_name_is_removed(tmp_path: Path) -> None:
    """A crash leaves this folder if it happens before a new collection is in the catalogue, or during a deletion."""
    Index(tmp_path).close()
    orphan = tmp_path / "collections" / ("0123abcd" * 4)
    orphan.mkdir(parents=True)
    (orphan / "records.db").write_bytes(b"half")
    Index(tmp_path).close()
    assert not orphan.exists()


def test_the_error_for_an_unusable_data_directory_states_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ServiceError, match="--data-dir"):
        Index(file)
    Index(tmp_path / "data").close()
    with sqlite3.connect(tmp_path / "data" / "catalogue.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ServiceError, match="newer emberpc"):
        Index(tmp_path / "data")
    (tmp_path / "data" / "catalogue.db").write_bytes(os.urandom(8192))
    with pytest.raises(ServiceError, match="damaged"):
        Index(tmp_path / "data")


@pytest.mark.parametrize("tables", [("collections",), ("collections", "reembeddings")])
def test_an_incomplete_catalogue_of_a_failed_start_is_completed(tmp_path: Path, tables: tuple[str, ...]) -> None:
    Index(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as database:
        for table in {"collections", "reembeddings"} - set(tables):
            database.execute(f"DROP TABLE {table}")
        database.execute("PRAGMA user_version = 0")
    with closing(Index(tmp_path)) as index:
        index.create(CollectionSpec("c", DIMENSIONS))
        assert index.reembeddings() == []
    with closing(Index(tmp_path)) as index:
        assert index.get("c").count() == 0


def damage_catalogue(data_dir: Path, statement: str, *parameters: object) -> None:
    with sqlite3.connect(data_dir / "catalogue.db") as database:
        assert database.execute(statement, parameters).rowcount == 1
    database.close()


_DAMAGED_SPECS: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda spec: spec[1:],
    "no UTF-8": lambda spec: spec[:10] + b"\xff" + spec[11:],
    "another key": lambda spec: spec.replace(b"dimensions", b"dimensionr"),
    "another name": lambda spec: spec.replace(b'"b"', b'"c"'),
    "an unknown distance": lambda spec: spec.replace(b"cosine", b"cosinf"),
    "an unknown truncation": lambda spec: spec.replace(b"refuse", b"rdfuse"),
    "no dimensions": lambda spec: spec.replace(b'"dimensions": 16', b'"dimensions": -6'),
    "a fraction": lambda spec: spec.replace(b'"dimensions": 16', b'"dimensions": 1.6'),
    "a list": lambda spec: b"[]",
    "a number": lambda spec: b"7",
}


@pytest.mark.parametrize("kind", _DAMAGED_SPECS)
def test_a_damaged_catalogue_entry_hides_no_other_and_can_be_deleted(tmp_path: Path, kind: str) -> None:
    index = Index(tmp_path)
    for name in "abc":
        index.create(CollectionSpec(name, 16)).upsert(records("1"), vectors(1))
    index.close()
    with sqlite3.connect(tmp_path / "catalogue.db") as database:
        ((spec,),) = database.execute("SELECT spec FROM collections WHERE name = 'b'").fetchall()
    database.close()
    damaged = _DAMAGED_SPECS[kind](spec.encode())
    assert damaged != spec.encode()
    damage_catalogue(tmp_path, "UPDATE collections SET spec = CAST(? AS TEXT) WHERE name = 'b'", damaged)

    index = Index(tmp_path)
    try:
        assert [spec.name for spec in index.page(10, "")[0]] == ["a", "b", "c"]
        assert [index.get(name).count() for name in "ac"] == [1, 1]
        with refused(Code.INTERNAL, "'b'", "catalogue.db is damaged", "restore"):
            index.get("b")
        with refused(Code.ALREADY_EXISTS):
            index.create(CollectionSpec("b", 16))
        index.delete("b")
        index.create(CollectionSpec("b", 16))
        assert index.get("b").count() == 0
    finally:
        index.close()


@pytest.mark.parametrize("created", [1e300, float("inf"), "soon"])
def test_a_catalogue_entry_with_a_damaged_time_is_reported_as_damaged(tmp_path: Path, created: object) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("a", 16))
    index.close()
    damage_catalogue(tmp_path, "UPDATE collections SET created = ?", created)
    index = Index(tmp_path)
    with refused(Code.INTERNAL, "is damaged"):
        index.get("a")
    index.close()


@pytest.mark.parametrize("folder", ["0123abcd" * 4, "../elsewhere", b"\xff"])
def test_a_damaged_folder_name_in_the_catalogue_loses_no_data(tmp_path: Path, folder: str | bytes) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("a", 16)).upsert(records("1"), vectors(1))
    index.close()
    (there,) = (tmp_path / "collections").iterdir()
    damage_catalogue(tmp_path, "UPDATE collections SET folder = CAST(? AS TEXT)", folder)
    Index(tmp_path).close()
    damage_catalogue(tmp_path, "UPDATE collections SET folder = ?", there.name)
    index = Index(tmp_path)
    assert index.get("a").count() == 1
    index.close()


def test_a_damaged_catalogue_schema_raises_a_service_error(tmp_path: Path) -> None:
    Index(tmp_path).close()
    path = tmp_path / "catalogue.db"
    data = path.read_bytes()
    start = data.index(b"CREATE TABLE collections")
    failed = 0
    for place in range(start - 30, start + 110, 4):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        try:
            index = Index(tmp_path)
        except ServiceError as error:
            assert "catalogue" in error.message
            failed += 1
            continue
        with suppress(ServiceError):
            index.page(10, "")
        index.close()
    assert failed


# Root can write to read-only folders, so the process changes its user to nobody. It imports first, since nobody may not
# be able to read the files of Python.
READ_ONLY = """
import os, pathlib, sys
from emberpc.server.errors import ServiceError
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Index
from index_helpers import vectors
matrix = vectors(1)
if not os.getuid():
    os.setuid(65534)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
index = Index(folder)
collection = index.create(CollectionSpec("c", 16))
(folder / "collections").chmod(0o555)
for action in (lambda: index.create(CollectionSpec("d", 16)), lambda: collection.upsert([NewRecord("a")], matrix)):
    try:
        action()
        print("done")
    except ServiceError as error:
        print(error.code.name, error.message)
print([spec.name for spec in index.page(10, "")[0]], collection.count())
index.close()
for path in folder.iterdir():
    if path.is_file():
        path.chmod(0o444)
folder.chmod(0o555)
try:
    Index(folder)
except ServiceError as error:
    print(error.code.name, error.message)
finally:
    folder.chmod(0o755)
    (folder / "collections").chmod(0o755)
"""


def test_a_read_only_data_directory_is_reported_and_not_changed() -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o777)
        folder = Path(parent) / "data"
        found = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        assert found.stdout.splitlines() == [
            "INTERNAL the data directory cannot be written to; see to its permissions",
            "done",
            "['c'] 1",
            f"FAILED_PRECONDITION the data directory {folder} cannot be written to (Permission denied); "
            "choose another --data-dir",
        ]
        with closing(Index(folder)) as index:
            assert index.get("c").count() == 1


def test_opening_a_collection_does_not_block_other_collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path)
    for name in ("large", "small"):
        index.create(CollectionSpec(name, DIMENSIONS)).upsert(records("a"), vectors(1))
    index.close()
    index, opening, go_on = Index(tmp_path), threading.Event(), threading.Event()
    load = snapshots.load

    def slow(spec: CollectionSpec, identity: str, newest: int, folder: Path) -> PersistentGraph | None:
        if spec.name == "large":
            opening.set()
            assert go_on.wait(300)
        return load(spec, identity, newest, folder)

    monkeypatch.setattr(snapshots, "load", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(index.get, "large")
        assert opening.wait(300)
        second = pool.submit(index.get, "large")
        assert index.get("small").count() == 1
        assert [spec.name for spec in index.page(10, "")[0]] == ["large", "small"]
        assert not first.done()
        assert not second.done()
        go_on.set()
        assert first.result(300) is second.result(30)
    index.close()


def test_opening_a_collection_is_tried_again_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("c", DIMENSIONS)).upsert(records("a"), vectors(1))
    index.close()
    index = Index(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(snapshots, "load", Mock(side_effect=MemoryError))
        index.get("c")
    assert index.get("c").count() == 1
    index.close()
