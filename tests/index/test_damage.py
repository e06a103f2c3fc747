"""A record that is damaged on disk does not affect other records."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.collections.filters import Comparison, Not, Operator
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.reembedding import Reembedding
from emberpc.server.index.storage import schema
from index.damages import COUNT, EVEN, LOST, NEAR, QUERIES, TRUTH, VECTORS, WIDTH, check_pages, damaged
from index.support import gaussian, recall, refused


def check_all_but_the_lost(collection: Collection, *, maintained: bool) -> None:
    """Check that searches of every kind, pages and counts return the other records with their own values."""
    if maintained:
        collection.maintain()
    others = {key: vector for key, vector in TRUTH.items() if key != LOST}
    assert recall(collection, others, VECTORS, 10) == 1
    conditions = [EVEN if i % 2 == 0 else Not(EVEN) for i in range(COUNT)]
    ones = [1] * len(QUERIES[NEAR])
    for rows, found in (
        (slice(COUNT), collection.search(VECTORS, 1)),
        (slice(COUNT), collection.search(VECTORS, 1, with_vectors=True)),
        (slice(COUNT), collection.search(VECTORS, 1, min_recall=1)),
        (slice(COUNT), collection.search(VECTORS, 1, conditions=conditions)),
        (NEAR, collection.search_lexical(QUERIES[NEAR], ones)),
        (NEAR, collection.search_hybrid(VECTORS[NEAR], QUERIES[NEAR], ones, dense_weight=0.5)),
    ):
        hits = [outcome.hits[0][0].id for outcome in found]
        pairs = zip(hits, list(TRUTH)[rows], strict=True)
        assert all(hit == wanted for hit, wanted in pairs if wanted != LOST)
        assert LOST not in hits
    (outcome,) = collection.search(VECTORS[:1], 100)
    assert sorted(record.id for record, _ in outcome.hits) == list(others)


METADATA = {
    "cut": ("metadata = ?", "["),
    "no object": ("metadata = ?", "7"),
    "blob": ("metadata = ?", b"\xff\xfe"),
    "no UTF-8": ("metadata = CAST(? AS TEXT)", b'{"even": "\xff"}'),
}
TEXTS = {
    "text no UTF-8": ("text = CAST(? AS TEXT)", b"text \xff"),
    "label blob": ("class_label = ?", b"\xff"),
}
BLOBS = {
    "empty": b"",
    "cut": b"123",
    "text": "text",
    "NaN": np.full(WIDTH, np.nan, dtype="<f4").tobytes(),
    "zero": bytes(4 * WIDTH),
    "huge": np.full(WIDTH, 1e38, dtype="<f4").tobytes(),
}


@pytest.mark.parametrize(
    ("change", "maintained"),
    [*((change, True) for change in (METADATA | TEXTS).values()), (METADATA["cut"], False)],
    ids=[*METADATA, *TEXTS, "cut, not in the graph"],
)
def test_an_unreadable_record_is_left_out_of_results(
    tmp_path: Path, change: tuple[str, object], maintained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with damaged(tmp_path, *change) as collection:
        check_all_but_the_lost(collection, maintained=maintained)
        check_pages(collection, with_vectors=False)
        check_pages(collection, with_vectors=True)
        assert collection.count(EVEN) == COUNT // 2
        assert sum(cluster.record_count for cluster in collection.clusters(3, 50, lambda: False)) >= COUNT - 1
        assert collection.duplicates(0.999, lambda: False) == []
        with refused(Code.DATA_LOSS, LOST):
            collection.get(["r00001", LOST])
        assert [record.id for record in collection.get(["r00001"])] == ["r00001"]
        assert caplog.text.count("damaged on disk") == 1
        found = [problem.id for step in collection.verify() for problem in step.problems]
        assert found == [LOST]
        with refused(Code.DATA_LOSS, LOST):
            list(collection.backup(lambda: False))


#: Changes that give a readable record; only the checksum shows the damage.
FLIPPED = VECTORS[7] * np.where(np.arange(WIDTH) == 3, -1, 1)
READABLE = {
    "text": ("text = ?", f"text of {LOST[:-1]}6"),
    "label": ("class_label = ?", "a"),
    "metadata": ("metadata = ?", '{"even": false, "n": 1}'),
    "vector": ("vector = ?", FLIPPED.astype("<f4").tobytes()),
}
#: Damaged numbers and times, also values that are no number or no time.
NUMBERS = {
    "revision": ("revision = ?", 1_000_001),
    "revision text": ("revision = ?", "abc"),
    "revision fraction": ("revision = ?", 1.5),
    "revision blob": ("revision = ?", b"\1"),
    "created": ("created = created - ?", 86400),
    "created text": ("created = ?", "abc"),
    "updated": ("updated = ?", 1e300),
    "expires": ("expires = ?", 4e9),
    "expires text": ("expires = ?", "abc"),
    "number": ("label = ?", 5000),
    "negative number": ("label = ?", -5),
    "no number": ("label = ?", 0),
    "smallest number": ("label = ?", -(2**63)),
    "greatest number": ("label = ?", 2**63 - 1),
}
CHECKSUMS = {
    "text checksum": ("text_checksum = ?", 7),
    "text checksum of another type": ("text_checksum = ?", "x"),
    "checksum of another type": ("checksum = ?", "x"),
    "row checksum": ("row_checksum = ?", 7),
    "no text checksum": ("text_checksum = ?", None),
    "no checksum": ("checksum = ?", None),
    "no row checksum": ("row_checksum = ?", None),
}


@pytest.mark.parametrize(
    ("change", "older"),
    [
        *((change, False) for change in (READABLE | NUMBERS | CHECKSUMS).values()),
        *((change, True) for change in READABLE.values()),
    ],
    ids=[*READABLE, *NUMBERS, *CHECKSUMS, *(f"{name}, older" for name in READABLE)],
)
def test_a_readable_record_with_a_wrong_checksum_is_left_out_of_results(
    tmp_path: Path, change: tuple[str, object], older: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # A record with a damaged vector is right if the vector is not read.
    right_without_vector = change[0].startswith("vector") and not older
    with damaged(tmp_path, *change, older=4 if older else None) as collection:
        for with_vectors in (False, True):
            (found,) = collection.search(VECTORS[7:8], COUNT, with_vectors=with_vectors)
            assert sorted(record.id for record, _ in found.hits) == [each for each in TRUTH if each != LOST]
        check_pages(collection, with_vectors=True)
        if not right_without_vector:
            check_all_but_the_lost(collection, maintained=False)
            check_pages(collection, with_vectors=False)
        examples = [each.id for cluster in collection.clusters(3, 50, lambda: False) for each in cluster.examples]
        assert sorted(examples) == [each for each in TRUTH if each != LOST]
        for with_vectors in (False, True):
            if with_vectors or not right_without_vector:
                with refused(Code.DATA_LOSS, LOST, "upsert it again"):
                    collection.get(["r00001", LOST], with_vectors=with_vectors)
        assert caplog.text.count("damaged on disk") == 1
        with refused(Code.DATA_LOSS, LOST):
            list(collection.backup(lambda: False))
        assert [problem.id for step in collection.verify() for problem in step.problems] == [LOST]
        collection.upsert([NewRecord(LOST, f"text of {LOST}", {"even": False})], VECTORS[7:8])
        assert collection.search(VECTORS[7:8], 1)[0].hits[0][0].id == LOST
        assert [problem for step in collection.verify() for problem in step.problems] == []


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
def test_a_record_with_a_changed_id_is_left_out_of_results(tmp_path: Path, older: bool) -> None:
    with damaged(tmp_path, "id = ?", "changed", older=4 if older else None) as collection:
        for found in (
            collection.search(VECTORS[7:8], COUNT)[0],
            collection.search_lexical(["text"], [COUNT])[0],
        ):
            assert sorted(record.id for record, _ in found.hits) == [each for each in TRUTH if each != LOST]
        assert "changed" not in {record.id for record in collection.page(100, "")[0]}
        with refused(Code.DATA_LOSS, "changed"):
            collection.get(["changed"])
        assert collection.duplicates(-1, lambda: False)
        assert not any(
            "changed" in (pair.first_id, pair.second_id) for pair in collection.duplicates(-1, lambda: False)
        )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("id = ?", b"r00008"), "b'r00008'"),
        (("id = CAST(? AS TEXT)", b"r\xc3'7\n"), 'b"r\\xc3\'7\\n"'),
        (("id = ?", "r\n7"), "r\n7"),
    ],
    ids=["blob", "no UTF-8", "text"],
)
def test_a_record_with_a_damaged_id_is_deleted_by_the_id_that_verify_states(
    tmp_path: Path, change: tuple[str, object], name: str
) -> None:
    with damaged(tmp_path, *change) as collection:
        assert [problem.id for step in collection.verify() for problem in step.problems] == [name]
        assert collection.delete([name, "b'r00009'", "b'"]).deleted == 1
        assert [problem for step in collection.verify() for problem in step.problems] == []
        assert [record.id for record in collection.page(100, "")[0]] == [each for each in TRUTH if each != LOST]


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
def test_reembedding_refuses_damaged_records(tmp_path: Path, older: bool) -> None:
    with (
        damaged(tmp_path / "source", "text = 'another'", older=4 if older else None) as source,
        closing(Index(tmp_path / "target")) as index,
    ):
        target = index.create(CollectionSpec("c", WIDTH))
        way = Reembedding(source, target, datetime.now(timezone.utc))
        with refused(Code.DATA_LOSS, LOST):
            way.next(COUNT)
        source.upsert([NewRecord(LOST, f"text of {LOST}")], VECTORS[7:8])
        while records := way.next(7):
            way.take(records, VECTORS[: len(records)])
        assert way.is_complete()
        assert target.get([LOST])[0].text == f"text of {LOST}"


@pytest.mark.parametrize("older", [0, 4])
@pytest.mark.parametrize("change", (METADATA | TEXTS).values(), ids=[*METADATA, *TEXTS])
def test_an_unreadable_record_does_not_prevent_the_opening_of_an_older_collection(
    tmp_path: Path, change: tuple[str, object], older: int
) -> None:
    """Version 0 wrote no checksums, so a record gets them even if its metadata is no JSON object."""
    with damaged(tmp_path, *change, older=older) as collection:
        check_all_but_the_lost(collection, maintained=True)
        check_pages(collection, with_vectors=False)
        with refused(Code.DATA_LOSS, LOST):
            collection.get([LOST])
        assert collection.delete([LOST]).deleted == 1
        assert [problem for step in collection.verify() for problem in step.problems] == []


def checksums(connection: sqlite3.Connection) -> list[tuple[int, ...]]:
    statement = "SELECT count(text_checksum), count(checksum), count(row_checksum), count(*) FROM records"
    return connection.execute(statement).fetchall()


@pytest.mark.parametrize("version", [0, 4, 6])
def test_rows_of_an_older_version_get_checksums(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are converted in batches; converted rows stay converted if the server dies."""
    monkeypatch.setattr(schema, "_CONVERTED_AT_ONCE", 7)
    with damaged(tmp_path, "revision = revision", older=version) as collection:
        assert checksums(collection._store._writer) == [(COUNT, COUNT, COUNT, COUNT)]
        assert recall(collection, TRUTH, VECTORS, 10) == 1
        assert len(collection.page(100, "", with_vectors=True)[0]) == COUNT
        assert [problem for step in collection.verify() for problem in step.problems] == []
        assert checksums(collection._store._writer) == [(COUNT, COUNT, COUNT, COUNT)]
    assert "damaged" not in caplog.text


@pytest.mark.parametrize(
    ("version", "change"),
    [
        (4, "text = 'another'"),
        (4, "checksum = NULL"),
        (4, "revision = 0"),
        (4, "created = 'x'"),
        (6, "text = 'another'"),
        (6, "checksum = NULL"),
        (6, "text_checksum = NULL, checksum = NULL, text = 'another'"),
    ],
)
def test_a_damaged_row_of_an_older_version_gets_no_checksum(
    tmp_path: Path, version: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checksum, the damaged row would count as whole. All other rows get one."""
    monkeypatch.setattr(schema, "_CONVERTED_AT_ONCE", 7)
    with damaged(tmp_path, change, older=version) as collection:
        connection = collection._store._writer
        lost = connection.execute("SELECT id FROM records WHERE row_checksum IS NULL").fetchall()
        assert lost == [(LOST,)]
        assert connection.execute("SELECT unconverted FROM state").fetchall() == [(0,)]


@pytest.mark.parametrize("statement", ["UPDATE state SET sequence = 'x'", "UPDATE state SET unconverted = 'x'"])
def test_opening_a_collection_with_a_damaged_counter_states_the_damage(tmp_path: Path, statement: str) -> None:
    with damaged(tmp_path, "revision = revision"):
        pass
    (path,) = tmp_path.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    with closing(Index(tmp_path)) as index, refused(Code.INTERNAL, "damaged", "restore a backup"):
        index.get("c")


def test_a_damaged_expire_time_deletes_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with damaged(tmp_path, "expires = ?", 1.0) as collection:
        collection.upsert(
            [NewRecord("due", "", time_to_live=1e-6), NewRecord("later", "", time_to_live=1e6)], VECTORS[:2]
        )
        (later,) = collection.get(["later"])
        # Without the checksum, the damaged record would expire immediately.
        assert later.expire_time is not None
        assert collection.expire() == pytest.approx(later.expire_time.timestamp())
        assert collection.count() == COUNT + 1
        with refused(Code.DATA_LOSS, LOST, "upsert it again"):
            collection.get([LOST])
        assert LOST in caplog.text
        assert [problem.id for step in collection.verify() for problem in step.problems] == [LOST]


def test_an_upsert_keeps_no_values_of_a_damaged_record(tmp_path: Path) -> None:
    with damaged(tmp_path, "created = ?, revision = ?", 1e9, 5) as collection:
        again = [NewRecord(LOST, f"text of {LOST}")]
        with refused(Code.DATA_LOSS, LOST, "upsert it again"):
            collection.upsert(again, VECTORS[7:8], [5])
        collection.upsert(again, VECTORS[7:8])
        (record,) = collection.get([LOST])
        assert record.create_time == record.update_time


def test_checksums_of_times_are_right_for_all_fractions_of_seconds(tmp_path: Path) -> None:
    """SQLite and Python compute equal microseconds for all last digits of the stored seconds."""
    lives = [10.0 ** (i % 11) + i / 7 for i in range(COUNT)]
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        collection.upsert([NewRecord(f"r{i}", "", time_to_live=live) for i, live in enumerate(lives)], VECTORS)
        (found,) = collection.search(VECTORS[:1], COUNT)
        assert len(found.hits) == COUNT
        records = [record for record, _ in found.hits]
        assert collection.get([record.id for record in records]) == records


def test_damaged_metadata_gives_no_filter_warning(tmp_path: Path) -> None:
    with damaged(tmp_path, *METADATA["cut"]) as collection:
        assert collection.mismatches(Comparison("even", Operator.EQUAL, 1)) == []


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_upserting_a_damaged_record_repairs_it(tmp_path: Path, change: tuple[str, object]) -> None:
    with damaged(tmp_path, *change) as collection:
        check_all_but_the_lost(collection, maintained=True)
        collection.upsert([NewRecord(LOST, f"text of {LOST}", {"even": False})], VECTORS[7:8])
        assert collection.search(VECTORS[7:8], 1)[0].hits[0][0].id == LOST
        assert collection.search(VECTORS[7:8], 1, conditions=[Not(EVEN)])[0].hits[0][0].id == LOST
        assert collection.delete([LOST]).deleted == 1
        assert [problem for step in collection.verify() for problem in step.problems] == []


@pytest.mark.parametrize(
    ("blob", "distance"), [*((blob, Distance.COSINE) for blob in BLOBS), ("huge", Distance.EUCLIDEAN)]
)
def test_a_damaged_vector_does_not_affect_other_records(tmp_path: Path, blob: str, distance: Distance) -> None:
    """Filtered searches cache labels and vectors in parallel arrays, which must not shift against each other."""
    with damaged(tmp_path, "vector = ?", BLOBS[blob], distance=distance) as collection:
        collection.maintain()
        check_pages(collection, with_vectors=True)
        conditions = [EVEN if i % 2 == 0 else Not(EVEN) for i in range(COUNT)]
        for _ in range(2):  # the second time with the cached arrays
            for found in (collection.search(VECTORS, 1, conditions=conditions), collection.search(VECTORS, 1)):
                hits = [(outcome.hits[0][0].id, outcome.hits[0][1]) for outcome in found]
                assert np.isfinite([score for _, score in hits]).all()
                assert [hit for (hit, _), wanted in zip(hits, TRUTH, strict=True) if wanted != LOST] == [
                    each for each in TRUTH if each != LOST
                ]
            # The cached arrays are updated after a write.
            collection.upsert([NewRecord("new", "new", {"even": True})], gaussian(1, WIDTH, seed=5))
        found_problems = [problem.id for step in collection.verify() for problem in step.problems]
        assert found_problems == [LOST]


def test_a_damaged_vector_of_zeros_is_not_searched(tmp_path: Path) -> None:
    """A lost page reads as zeros: the vector has no direction, and normalizing it gives NaN."""
    with damaged(tmp_path, "vector = ?", bytes(4 * WIDTH)) as collection:
        assert collection._neighbours.count == COUNT - 1
        collection.maintain()
        assert LOST not in {record.id for record, _ in collection.search(VECTORS[:1], 100)[0].hits}


def test_explaining_a_filter_skips_incomplete_metadata(tmp_path: Path) -> None:
    with damaged(tmp_path, "metadata = ?", '{"even": "x"') as collection:
        assert collection.mismatches(Comparison("even", Operator.EQUAL, 1.0)) == []


def test_an_index_on_damaged_metadata_does_not_prevent_writes(tmp_path: Path) -> None:
    """SQLite reads the metadata of a deleted row to remove it from the index."""
    index = Index(tmp_path, buffer_limit=8)
    index.create(CollectionSpec("c", WIDTH, indexed_fields=("n",))).upsert(
        [NewRecord(each, "", {"n": i}) for i, each in enumerate(TRUTH)], VECTORS
    )
    index.close()
    (path,) = tmp_path.rglob("records.db")
    data = path.read_bytes()
    for number in (b"7", b"8"):
        entry = b'{"n": ' + number + b"}"
        assert data.count(entry) == 1
        data = data.replace(entry, b'{"n"X ' + number + b"}")
    path.write_bytes(data)
    index = Index(tmp_path, buffer_limit=8)
    collection = index.get("c")
    assert collection.delete([LOST]).deleted == 1
    # The second damaged record prevents SQLite from building the index again.
    below = Comparison("n", Operator.LESS, 20)
    assert len(collection.search(VECTORS[:1], 100, conditions=[below])[0].hits) == 18
    index.close()
    index = Index(tmp_path, buffer_limit=8)
    collection = index.get("c")
    assert len(collection.search(VECTORS[:1], 100, conditions=[below])[0].hits) == 18
    assert collection.upsert([NewRecord("r00008", "", {"n": 8})], VECTORS[8:9]).updated == 1
    assert len(collection.search(VECTORS[:1], 100, conditions=[below])[0].hits) == 19
    assert [problem for step in collection.verify() for problem in step.problems] == []
    index.close()


@pytest.mark.parametrize("metadata", ["'{'", "CAST(x'ff' AS TEXT)", "'[1]'", "7"])
def test_the_warning_of_a_numeric_filter_skips_damaged_metadata(tmp_path: Path, metadata: str) -> None:
    records = [NewRecord(each, metadata={"year": "1999"}) for each in TRUTH]
    with damaged(tmp_path, f"metadata = {metadata}") as collection:
        collection.upsert(records[8:], VECTORS[8:])
        (sentence,) = collection.mismatches(Comparison("year", Operator.EQUAL, 1999))
        assert sentence.startswith("the filter compares 'year' with a number")
