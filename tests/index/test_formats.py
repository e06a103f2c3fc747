"""Data directories and backups of earlier versions of emberpc are read whole; those of newer versions are refused."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.server.collections import Distance
from emberpc.server.collections.filters import Comparison, Operator
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph import snapshots
from emberpc.server.index.jobs import backup
from emberpc.server.index.search import recall
from emberpc.server.index.storage import data_directory, schema
from format_fixtures import description, missing, names, record_fields, unpack, versions
from index.backups import changed, restored
from index.support import refused
from index_helpers import true_scores

CURRENT = {
    "database": range(len(schema.STEPS) + 1),
    "catalogue": range(1, data_directory.FORMAT + 1),
    "snapshot": range(1, snapshots.FORMAT + 1),
    "recall": range(1, recall.FORMAT + 1),
    "backup": range(1, backup.FORMAT + 1),
}
FIXTURES, BACKUPS = names("database"), names("backup")
NEWEST = next(name for name in FIXTURES if versions(name)["database"] == len(schema.STEPS))


@pytest.fixture
def data(name: str, tmp_path: Path) -> Path:
    """A copy of the data directory of a fixture."""
    return unpack(name, "data.zip", tmp_path / "fixture")


@pytest.fixture
def opened(data: Path) -> Iterator[Collection]:
    """The collection of the fixture, with a buffer that is large enough for all its records."""
    with closing(Index(data, buffer_limit=1000)) as index:
        yield index.get("fixture")


def the(data: Path, file: str) -> Path:
    """Return the only file in a data directory whose name equals `file` or matches it as a pattern."""
    (found,) = data.rglob(file)
    return found


def user_version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def whole_backup(name: str, tmp_path: Path) -> bytes:
    return (unpack(name, "backup.zip", tmp_path / "fixture") / "fixture.backup").read_bytes()


def check(collection: Collection, name: str) -> None:
    """Check records, searches and the verification of a collection against the expected values of its fixture."""
    expected = description(name)["expected"]
    check_records(collection, expected)
    check_searches(collection, expected)
    assert [problem for step in collection.verify(full=True) for problem in step.problems] == []


def check_records(collection: Collection, expected: dict[str, Any]) -> None:
    records, _ = collection.page(1000, "", with_vectors=True)
    found = [record_fields(each) for each in records]
    wanted = [dict(each) for each in expected["records"]]
    ends = [each.pop("expire_time") for each in wanted]
    assert found == wanted
    for record, end in zip(records, ends, strict=True):
        assert (record.expire_time is None) == (end is None)
        if record.expire_time is not None:
            # Earlier versions rounded the time to microseconds in another way.
            assert abs(record.expire_time - datetime.fromisoformat(end)) <= timedelta(microseconds=1)
    assert collection.get(expected["deleted"]) == []
    info = collection.info()
    assert (info.sequence, info.record_count) == (expected["sequence"], len(found))
    assert info.create_time.isoformat() == expected["create_time"]
    spec = json.loads(collection.spec.to_json())
    assert {key: spec[key] for key in expected["spec"]} == expected["spec"]


def check_searches(collection: Collection, expected: dict[str, Any]) -> None:
    for query, ids in expected["lexical"].items():
        (outcome,) = collection.search_lexical([query], [100])
        assert sorted(record.id for record, _ in outcome.hits) == ids, query
    queries = np.random.default_rng(1).standard_normal((3, 8), dtype=np.float32)
    odd = Comparison("parity", Operator.EQUAL, "odd")
    for condition in (None, odd):
        wanted = [each for each in expected["records"] if condition is None or each["metadata"]["parity"] == "odd"]
        vectors = np.array([each["vector"] for each in wanted])
        for query, outcome in zip(queries, collection.search(queries, 5, conditions=[condition] * 3), strict=True):
            scores = true_scores(query, vectors, Distance.COSINE)
            by_id = dict(zip([each["id"] for each in wanted], scores.tolist(), strict=True))
            found = [score for _, score in outcome.hits]
            assert found == pytest.approx(np.sort(scores)[:-6:-1], abs=1e-5)
            assert found == pytest.approx([by_id[record.id] for record, _ in outcome.hits], abs=1e-5)


def test_each_format_has_a_fixture() -> None:
    assert missing(CURRENT) == [], "run tools/make_format_fixtures.py"


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_has_the_formats_that_it_names(name: str, data: Path, tmp_path: Path) -> None:
    found = {
        "database": user_version(the(data, "records.db")),
        "catalogue": user_version(data / "catalogue.db"),
        "snapshot": json.loads(the(data, "graph-*.json").read_text(encoding="utf-8"))["facts"]["format"],
    }
    if "recall" in versions(name):
        found["recall"] = json.loads(the(data, "recall.json").read_text(encoding="utf-8"))["format"]
    if "backup" in versions(name):
        (tmp_path / "backup.db").write_bytes(whole_backup(name, tmp_path)[: -backup.LAST_LINE_SIZE])
        with closing(sqlite3.connect(tmp_path / "backup.db")) as database:
            (found["backup"],) = database.execute("SELECT format FROM backup").fetchone()
    assert found == versions(name)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_data_directory_of_each_version_is_read(name: str, data: Path, opened: Collection) -> None:
    assert the(data, "records.db-wal").stat().st_size > 0, "the last writes are in the write-ahead log"
    check(opened, name)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_snapshot_is_used_if_it_has_the_current_format(
    name: str, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = versions(name)["snapshot"]
    with closing(Index(data, buffer_limit=1000)) as index:
        size = index.get("fixture")._neighbours.graph_size
    if version == snapshots.FORMAT:
        assert size > 0
        assert "left aside" not in caplog.text
    else:
        assert size == 0
        assert f"it has the format {version}, and this emberpc uses the format {snapshots.FORMAT}" in caplog.text


@pytest.mark.parametrize("name", FIXTURES)
def test_a_graph_is_filled_and_saved_from_a_data_directory(name: str, data: Path) -> None:
    for _ in range(2):  # the second time with the snapshot that the first time saved
        with closing(Index(data, buffer_limit=4)) as index:
            collection = index.get("fixture")
            collection.maintain()
            assert collection._neighbours.graph_size > 0
            check(collection, name)


@pytest.mark.parametrize("name", names("recall"))
def test_recall_figures_of_each_version_are_read(data: Path) -> None:
    found = recall.load(the(data, "recall.json").parent)
    assert found is not None
    assert found.points


@pytest.mark.parametrize("name", BACKUPS)
def test_a_backup_of_each_version_is_restored(name: str, index: Index, tmp_path: Path) -> None:
    check(restored(index, "fixture", whole_backup(name, tmp_path)), name)


@pytest.mark.parametrize("version", CURRENT["database"])
def test_a_database_of_each_version_is_converted_to_the_current_schema(version: int) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as older:
        schema.make(older, version)
        older.execute(f"PRAGMA user_version = {version}")
        schema.prepare(older, "collection 'c'", create=False)
        assert older.execute("PRAGMA user_version").fetchone() == (len(schema.STEPS),)
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as newest:
            schema.prepare(newest, "collection 'c'", create=True)
            assert schema.objects(older) == schema.objects(newest)


@pytest.mark.parametrize("name", [NEWEST])
def test_a_newer_catalogue_is_refused(data: Path) -> None:
    newer = data_directory.FORMAT + 1
    with closing(sqlite3.connect(data / "catalogue.db")) as database:
        database.execute(f"PRAGMA user_version = {newer}")
    with refused(Code.FAILED_PRECONDITION, f"format {newer} ", f"up to {newer - 1}", "install the newer one"):
        Index(data)


@pytest.mark.parametrize("name", [NEWEST])
def test_a_newer_database_is_refused(data: Path) -> None:
    newer = len(schema.STEPS) + 1
    with closing(sqlite3.connect(the(data, "records.db"))) as database:
        database.execute(f"PRAGMA user_version = {newer}")
    words = (f"format {newer},", f"up to {newer - 1}", "serve it with that")
    with closing(Index(data)) as index, refused(Code.INTERNAL, *words) as caught:
        index.get("fixture")
    assert caught.value.reason == "NEWER_FORMAT"


@pytest.mark.parametrize(
    ("change", "newer"),
    [
        (f"UPDATE backup SET format = {backup.FORMAT + 1}", backup.FORMAT + 1),
        (f"PRAGMA user_version = {len(schema.STEPS) + 1}", len(schema.STEPS) + 1),
    ],
)
def test_a_newer_backup_is_refused(index: Index, tmp_path: Path, change: str, newer: int) -> None:
    whole = changed(whole_backup(NEWEST, tmp_path), tmp_path / "changed", change)
    words = (f"format {newer},", f"up to {newer - 1}", "restore it with the newer version")
    with refused(Code.FAILED_PRECONDITION, *words) as caught:
        restored(index, "fixture", whole)
    assert caught.value.reason == "NEWER_FORMAT"


@pytest.mark.parametrize("name", [NEWEST])
def test_a_snapshot_of_a_newer_format_is_not_used(name: str, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer, path = snapshots.FORMAT + 1, the(data, "graph-*.json")
    facts = {**json.loads(path.read_text(encoding="utf-8"))["facts"], "format": newer}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"facts": facts, "facts_sha256": digest}), encoding="utf-8")
    with closing(Index(data, buffer_limit=1000)) as index:
        collection = index.get("fixture")
        assert collection._neighbours.graph_size == 0
        assert f"it has the format {newer}, and this emberpc uses the format {newer - 1}" in caplog.text
        check(collection, name)


@pytest.mark.parametrize("name", [NEWEST])
def test_recall_figures_of_a_newer_format_are_not_read(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer, path = recall.FORMAT + 1, the(data, "recall.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "format": newer}), encoding="utf-8")
    assert recall.load(path.parent) is None
    assert f"it has the format {newer}, and this emberpc reads 1 and {recall.FORMAT}" in caplog.text
