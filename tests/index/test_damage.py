"""A record that is damaged on disk costs no other its service."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.server.errors import Code
from emberpc.server.index import Collection, CollectionSpec, Distance, Index, NewRecord, damage, rows, schema
from emberpc.server.index.filters import Comparison, Not, Operator
from emberpc.server.index.reembedding import Reembedding
from index.support import gaussian, make_older, recall, refused
from index_helpers import true_scores

COUNT, WIDTH = 60, 8
LOST = "r00007"
EVEN = Comparison("even", Operator.EQUAL, True)
QUESTIONS = [f"text of r{i:05}" for i in range(COUNT)]
VECTORS = gaussian(COUNT, WIDTH)
TRUTH = {f"r{i:05}": VECTORS[i] for i in range(COUNT)}


def new_records() -> list[NewRecord]:
    return [NewRecord(each, f"text of {each}", {"even": i % 2 == 0}) for i, each in enumerate(TRUTH)]


@contextmanager
def damaged(
    folder: Path, assignment: str, *parameters: object, distance: Distance = Distance.COSINE, older: int | None = None
) -> Iterator[Collection]:
    """Make a collection, change one of its records behind the index's back, and open it again.

    With `older`, a version wrote it that had done that many steps.
    """
    index = Index(folder, buffer_limit=8)
    index.create(CollectionSpec("c", WIDTH, distance=distance)).upsert(new_records(), VECTORS)
    index.close()
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        if older is not None:
            make_older(connection, older)
        connection.execute(f"UPDATE records SET {assignment} WHERE id = '{LOST}'", parameters)
        connection.commit()
    for graph in folder.rglob("graph-*"):
        graph.unlink()
    with closing(Index(folder, buffer_limit=8)) as index:
        yield index.get("c")


def check_all_but_the_lost(collection: Collection, *, maintained: bool) -> None:
    """Check that searches of every kind, pages and counts give the other records, each with what is its own."""
    if maintained:
        collection.maintain()
    others = {key: vector for key, vector in TRUTH.items() if key != LOST}
    assert recall(collection, others, VECTORS, 10) == 1
    for found in (
        collection.search(VECTORS, 1),
        collection.search(VECTORS, 1, with_vectors=True),
        collection.search(VECTORS, 1, min_recall=1),
        collection.search(VECTORS, 1, conditions=[EVEN if i % 2 == 0 else Not(EVEN) for i in range(COUNT)]),
        collection.search_words(QUESTIONS, [1] * COUNT),
        collection.search_both(VECTORS, QUESTIONS, [1] * COUNT, dense_weight=0.5),
    ):
        hits = [outcome.hits[0][0].id for outcome in found]
        assert [hit for hit, wanted in zip(hits, TRUTH, strict=True) if wanted != LOST] == list(others)
        assert LOST not in hits
    (most,) = collection.search(VECTORS[:1], 100)
    assert sorted(record.id for record, _ in most.hits) == list(others)


def check_pages(collection: Collection, *, with_vectors: bool) -> None:
    token, found = "", []
    for _ in range(COUNT):
        page, token = collection.page(7, token, with_vectors=with_vectors)
        found += [record.id for record in page]
        if not token:
            break
    assert found == [each for each in TRUTH if each != LOST]


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
def test_a_record_that_cannot_be_read_is_left_out(
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


#: What was changed reads well; only the checksum shows it.
FLIPPED = VECTORS[7] * np.where(np.arange(WIDTH) == 3, -1, 1)
READABLE = {
    "text": ("text = ?", f"text of {LOST[:-1]}6"),
    "label": ("class_label = ?", "a"),
    "metadata": ("metadata = ?", '{"even": false, "n": 1}'),
    "vector": ("vector = ?", FLIPPED.astype("<f4").tobytes()),
}
#: Of a revision that is no number and a time that is none, nothing can be served.
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
def test_a_record_that_was_changed_on_disk_is_left_out_though_it_reads_well(
    tmp_path: Path, change: tuple[str, object], older: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # Without its vector such a record is as it was written.
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
def test_an_id_that_was_changed_on_disk_is_never_given_out(tmp_path: Path, older: bool) -> None:
    with damaged(tmp_path, "id = ?", "changed", older=4 if older else None) as collection:
        for found in (
            collection.search(VECTORS[7:8], COUNT)[0],
            collection.search_words(["text"], [COUNT])[0],
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
def test_a_record_whose_id_is_damaged_is_deleted_by_the_name_that_it_is_given(
    tmp_path: Path, change: tuple[str, object], name: str
) -> None:
    with damaged(tmp_path, *change) as collection:
        assert [problem.id for step in collection.verify() for problem in step.problems] == [name]
        assert collection.delete([name, "b'r00009'", "b'"]).deleted == 1
        assert [problem for step in collection.verify() for problem in step.problems] == []
        assert [record.id for record in collection.page(100, "")[0]] == [each for each in TRUTH if each != LOST]


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
def test_reembedding_does_not_make_a_damaged_record_look_whole(tmp_path: Path, older: bool) -> None:
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


@pytest.mark.parametrize("change", [*TEXTS.values(), METADATA["blob"]], ids=[*TEXTS, "metadata blob"])
def test_a_record_that_cannot_be_read_does_not_keep_an_older_collection_from_being_opened(
    tmp_path: Path, change: tuple[str, object]
) -> None:
    with damaged(tmp_path, *change, older=4) as collection:
        check_all_but_the_lost(collection, maintained=True)
        assert collection.delete([LOST]).deleted == 1
        assert [problem for step in collection.verify() for problem in step.problems] == []


def checksums(connection: sqlite3.Connection) -> list[tuple[int, ...]]:
    statement = "SELECT count(text_checksum), count(checksum), count(row_checksum), count(*) FROM records"
    return connection.execute(statement).fetchall()


@pytest.mark.parametrize("version", [0, 4, 6])
def test_rows_of_an_older_version_are_given_checksums(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some at a time: what was done when the server dies stays done."""
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
def test_a_damaged_row_of_an_older_version_is_given_no_checksum(
    tmp_path: Path, version: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one it would pass for whole; and no other row goes without."""
    monkeypatch.setattr(schema, "_CONVERTED_AT_ONCE", 7)
    with damaged(tmp_path, change, older=version) as collection:
        connection = collection._store._writer
        lost = connection.execute("SELECT id FROM records WHERE row_checksum IS NULL").fetchall()
        assert lost == [(LOST,)]
        assert connection.execute("SELECT unconverted FROM state").fetchall() == [(0,)]


@pytest.mark.parametrize("statement", ["UPDATE state SET sequence = 'x'", "UPDATE state SET unconverted = 'x'"])
def test_a_counter_that_is_damaged_is_said_to_be(tmp_path: Path, statement: str) -> None:
    with damaged(tmp_path, "revision = revision"):
        pass
    (path,) = tmp_path.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()
    with closing(Index(tmp_path)) as index, refused(Code.INTERNAL, "damaged", "restore a backup"):
        index.get("c")


def test_a_damaged_time_deletes_no_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with damaged(tmp_path, "expires = ?", 1.0) as collection:
        collection.upsert(
            [NewRecord("due", "", time_to_live=1e-6), NewRecord("later", "", time_to_live=1e6)], VECTORS[:2]
        )
        (later,) = collection.get(["later"])
        # The damaged one would be due at once, again and again.
        assert later.expire_time is not None
        assert collection.expire() == pytest.approx(later.expire_time.timestamp())
        assert collection.count() == COUNT + 1
        with refused(Code.DATA_LOSS, LOST, "upsert it again"):
            collection.get([LOST])
        assert LOST in caplog.text
        assert [problem.id for step in collection.verify() for problem in step.problems] == [LOST]


def test_a_write_takes_nothing_over_from_a_damaged_record(tmp_path: Path) -> None:
    with damaged(tmp_path, "created = ?, revision = ?", 1e9, 5) as collection:
        again = [NewRecord(LOST, f"text of {LOST}")]
        with refused(Code.DATA_LOSS, LOST, "upsert it again"):
            collection.upsert(again, VECTORS[7:8], [5])
        collection.upsert(again, VECTORS[7:8])
        (record,) = collection.get([LOST])
        assert record.create_time == record.update_time


def damage_words(folder: Path, statement: str) -> None:
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("dense_weight", [None, 0.5])
def test_a_search_that_meets_damage_in_the_word_index_has_it_built_again(
    tmp_path: Path, dense_weight: float | None
) -> None:
    with damaged(tmp_path, "revision = revision") as collection:
        damage_words(tmp_path, "DELETE FROM words_docsize WHERE id = 8")

        def search() -> list[str]:
            if dense_weight is None:
                (found,) = collection.search_words(["text"], [COUNT])
            else:
                (found,) = collection.search_both(VECTORS[:1], ["text"], [COUNT], dense_weight=dense_weight)
            return sorted(record.id for record, _ in found.hits)

        with refused(Code.DATA_LOSS, "word index of collection 'c'", "search again"):
            search()
        collection.maintain()
        assert search() == list(TRUTH)
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_write_that_meets_damage_in_the_word_index_has_it_built_again(tmp_path: Path) -> None:
    with damaged(tmp_path, "revision = revision") as collection:
        damage_words(tmp_path, "UPDATE words_data SET block = x'00'")
        assert collection.delete([LOST]).deleted == 1
        collection.upsert([NewRecord("new", "text of mine")], VECTORS[7:8])
        (found,) = collection.search_words(["text"], [COUNT + 1])
        assert sorted(record.id for record, _ in found.hits) == sorted({*TRUTH, "new"} - {LOST})
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_collection_opens_though_its_word_index_does_not(tmp_path: Path) -> None:
    with damaged(tmp_path, "revision = revision"):
        pass
    damage_words(tmp_path, "DELETE FROM words_config")
    with closing(Index(tmp_path)) as index:
        assert len(index.get("c").search_words(["text"], [COUNT])[0].hits) == COUNT


def test_a_damaged_text_leaves_no_words_behind(tmp_path: Path) -> None:
    """They would be found without a record, which FTS5 takes for damage."""
    with damaged(tmp_path, "text = 'another'") as collection:
        assert collection.delete([LOST]).deleted == 1
        collection.maintain()
        (found,) = collection.search_words(["text"], [COUNT])
        assert len(found.hits) == COUNT - 1
        assert collection.search_words([LOST], [COUNT])[0].hits == []
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_times_are_checked_as_they_are_served(tmp_path: Path) -> None:
    """Microseconds from SQLite and from Python are the same, whatever the last digits of the stored seconds are."""
    lives = [10.0 ** (i % 11) + i / 7 for i in range(COUNT)]
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        collection.upsert([NewRecord(f"r{i}", "", time_to_live=live) for i, live in enumerate(lives)], VECTORS)
        (found,) = collection.search(VECTORS[:1], COUNT)
        assert len(found.hits) == COUNT
        records = [record for record, _ in found.hits]
        assert collection.get([record.id for record in records]) == records


def test_damaged_metadata_costs_no_warning_of_a_filter(tmp_path: Path) -> None:
    with damaged(tmp_path, *METADATA["cut"]) as collection:
        assert collection.mismatches(Comparison("even", Operator.EQUAL, 1)) == []


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_it_is_whole_again_once_it_is_written_anew(tmp_path: Path, change: tuple[str, object]) -> None:
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
def test_a_damaged_vector_shifts_no_other(tmp_path: Path, blob: str, distance: Distance) -> None:
    """With filters labels and vectors are kept side by side."""
    with damaged(tmp_path, "vector = ?", BLOBS[blob], distance=distance) as collection:
        collection.maintain()
        check_pages(collection, with_vectors=True)
        conditions = [EVEN if i % 2 == 0 else Not(EVEN) for i in range(COUNT)]
        for _ in range(2):  # the second time by what was kept
            for found in (collection.search(VECTORS, 1, conditions=conditions), collection.search(VECTORS, 1)):
                hits = [(outcome.hits[0][0].id, outcome.hits[0][1]) for outcome in found]
                assert np.isfinite([score for _, score in hits]).all()
                assert [hit for (hit, _), wanted in zip(hits, TRUTH, strict=True) if wanted != LOST] == [
                    each for each in TRUTH if each != LOST
                ]
            # What was kept is brought past a write.
            collection.upsert([NewRecord("new", "new", {"even": True})], gaussian(1, WIDTH, seed=5))
        found_problems = [problem.id for step in collection.verify() for problem in step.problems]
        assert found_problems == [LOST]


def test_a_vector_of_zeros_is_never_searched(tmp_path: Path) -> None:
    """A page that was lost reads as zeros: no direction, and NaN once it is made of length 1."""
    with damaged(tmp_path, "vector = ?", bytes(4 * WIDTH)) as collection:
        assert collection._neighbours.count == COUNT - 1
        collection.maintain()
        assert LOST not in {record.id for record, _ in collection.search(VECTORS[:1], 100)[0].hits}


def test_damaged_metadata_is_passed_over_where_a_filter_is_explained(tmp_path: Path) -> None:
    with damaged(tmp_path, "metadata = ?", '{"even": "x"') as collection:
        assert collection.mismatches(Comparison("even", Operator.EQUAL, 1.0)) == []


def test_an_index_on_damaged_metadata_keeps_nobody_from_writing(tmp_path: Path) -> None:
    """It reads the metadata of a row that is deleted, to let go of it."""
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
    # The other one keeps the index from being made again.
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
def test_the_warning_of_a_numeric_filter_reads_past_damaged_metadata(tmp_path: Path, metadata: str) -> None:
    records = [NewRecord(each, metadata={"year": "1999"}) for each in TRUTH]
    with damaged(tmp_path, f"metadata = {metadata}") as collection:
        collection.upsert(records[8:], VECTORS[8:])
        (sentence,) = collection.mismatches(Comparison("year", Operator.EQUAL, 1999))
        assert sentence.startswith("the filter compares 'year' with a number")


@pytest.fixture
def one_of_many(tmp_path: Path) -> Iterator[Callable[..., Collection]]:
    """Open a collection of 400 records, and then give some rows the vector of the first one on disk."""
    indexes: list[Index] = []

    def make(damaged_rows: Sequence[int], distance: Distance = Distance.COSINE, *, older: bool = False) -> Collection:
        vectors = gaussian(400, WIDTH)
        index = Index(tmp_path, buffer_limit=1000)
        records = [NewRecord(f"r{i:05}", f"text {i}", {"even": i % 2 == 0}) for i in range(400)]
        index.create(CollectionSpec("c", WIDTH, distance=distance)).upsert(records, vectors)
        index.close()
        (path,) = tmp_path.rglob("records.db")
        if older:
            with closing(sqlite3.connect(path)) as connection:
                make_older(connection, 4)
        indexes.append(Index(tmp_path, buffer_limit=1000))
        collection = indexes[-1].get("c")
        with closing(sqlite3.connect(path)) as connection:
            for row in damaged_rows:
                values = (vectors[0].astype("<f4").tobytes(), f"r{row:05}")
                connection.execute("UPDATE records SET vector = ? WHERE id = ?", values)
            connection.commit()
        return collection

    yield make
    for index in indexes:
        index.close()


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
@pytest.mark.parametrize("distance", Distance)
def test_a_damaged_vector_that_would_be_a_hit_is_found_out_by_every_search_of_the_store(
    one_of_many: Callable[..., Collection], distance: Distance, older: bool
) -> None:
    lost = [100, 102, 104, 106, 108, 110]
    collection = one_of_many(lost, distance, older=older)
    query = gaussian(400, WIDTH)[:1]
    kept = {f"r{i:05}": vector for i, vector in enumerate(gaussian(400, WIDTH)) if i not in lost}
    even = {key: vector for key, vector in kept.items() if int(key[1:]) % 2 == 0}
    for condition, min_recall, others in ((EVEN, 0, even), (EVEN, 1, even), (None, 1, kept)):
        (found,) = collection.search(query, 3, conditions=[condition], min_recall=min_recall)
        right = np.sort(true_scores(query[0], np.stack(list(others.values())), distance))[::-1][:3]
        assert {record.id for record, _ in found.hits} <= others.keys()
        assert np.allclose([score for _, score in found.hits], right, rtol=1e-4)


def test_the_vectors_that_are_compared_are_not_all_checked(
    one_of_many: Callable[..., Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking every vector takes an eighth of a search. Only hits are checked, with a filter that is kept once."""
    collection = one_of_many([])
    query = gaussian(400, WIDTH)[:1]
    checked: list[int] = []

    def watched(row: Sequence[Any], size: int) -> bool:
        checked.append(row[0])
        return rows.is_sound_vector(row, size)

    monkeypatch.setattr(damage, "is_sound_vector", watched)
    for condition in (None, EVEN):
        checked.clear()
        collection.search(query, 3, conditions=[condition], min_recall=1)
        assert len(checked) == 3
    checked.clear()
    for _ in range(2):
        collection.search(query, 3, conditions=[EVEN])
    assert len(checked) == 3
    checked.clear()
    collection.search(query, 100, min_recall=1)
    assert len(checked) >= 400, "reading very many hits again would take longer"


def test_many_damaged_vectors_cost_one_search_more(
    one_of_many: Callable[..., Collection], monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = one_of_many(range(100, 200))
    query = gaussian(400, WIDTH)[:1]
    scans: list[dict[str, Any]] = []
    scan = collection._store.scan

    def watched(*values: Any, **options: Any) -> Any:
        scans.append(options)
        return scan(*values, **options)

    monkeypatch.setattr(collection._store, "scan", watched)
    (found,) = collection.search(query, 3, min_recall=1)
    assert scans == [{"checked": False}, {"checked": True}]
    assert not {f"r{i:05}" for i in range(100, 200)} & {record.id for record, _ in found.hits}
    (found,) = collection.search(query, 3, conditions=[EVEN])
    assert len(found.hits) == 3
    assert not {f"r{i:05}" for i in range(100, 200)} & {record.id for record, _ in found.hits}


def test_a_damaged_vector_that_is_no_hit_is_found_by_verify(one_of_many: Callable[..., Collection]) -> None:
    """It is left out of the answer as it would be if it was checked."""
    collection = one_of_many([100])
    query = -gaussian(400, WIDTH)[:1]
    (found,) = collection.search(query, 3, min_recall=1)
    assert "r00100" not in {record.id for record, _ in found.hits}
    assert [problem.id for step in collection.verify() for problem in step.problems] == ["r00100"]
