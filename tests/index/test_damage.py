"""A record that is damaged on disk costs no other its service."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.errors import Code
from emberpc.server.index import Collection, CollectionSpec, Distance, Index, NewRecord
from emberpc.server.index.filters import Comparison, Not, Operator
from index.support import gaussian, recall, refused

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
    folder: Path, assignment: str, *parameters: object, distance: Distance = Distance.COSINE
) -> Iterator[Collection]:
    """Make a collection, change one of its records behind the index's back, and open it again."""
    index = Index(folder, buffer_limit=8)
    index.create(CollectionSpec("c", WIDTH, distance=distance)).upsert(new_records(), VECTORS)
    index.close()
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
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
        with refused(Code.INTERNAL, LOST):
            collection.get(["r00001", LOST])
        assert [record.id for record in collection.get(["r00001"])] == ["r00001"]
        assert caplog.text.count("damaged on disk") == 1
        found = [problem.id for step in collection.verify() for problem in step.problems]
        assert found == [LOST]
        with refused(Code.INTERNAL):
            list(collection.backup(lambda: False))


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
