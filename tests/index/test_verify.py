"""A verification reports damage and nothing else, also during concurrent writes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph.neighbours import Candidates
from emberpc.server.index.jobs import verify
from emberpc.server.index.storage import word_index
from index.support import copy_made, gaussian, make_checksums_right, numbered, refused

COUNT, WIDTH = 60, 16


def filled(index: Index, distance: Distance = Distance.COSINE) -> Collection:
    """Create a collection with some vectors in the graph and some in the buffer."""
    collection = index.create(CollectionSpec("c", WIDTH, distance=distance))
    collection.upsert(numbered(COUNT), gaussian(COUNT, WIDTH))
    collection.maintain()
    collection.upsert(numbered(5, first=COUNT), gaussian(5, WIDTH, seed=1))
    return collection


def problems(collection: Collection) -> list[tuple[str, str]]:
    steps = list(collection.verify())
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].checked == steps[-1].total == collection.count()
    return [(problem.id, problem.reason) for step in steps for problem in step.problems]


@pytest.mark.parametrize("distance", list(Distance))
def test_verify_reports_no_problem_of_an_undamaged_collection(index: Index, distance: Distance) -> None:
    collection = filled(index, distance)
    collection.delete([f"r{i:05}" for i in range(0, COUNT, 9)])
    assert problems(collection) == []
    # Many records with one vector hide none of the records.
    collection.upsert(numbered(50, first=900), np.repeat(gaussian(1, WIDTH, seed=2), 50, axis=0))
    collection.maintain()
    assert problems(collection) == []


def test_verify_reports_no_problem_of_an_empty_collection(collection: Collection) -> None:
    assert problems(collection) == []


def set_vector(collection: Collection, change: Callable[[bytearray], bytes]) -> None:
    writer = collection._store._writer
    (blob,) = writer.execute("SELECT vector FROM records WHERE id = 'r00007'").fetchone()
    writer.execute("UPDATE records SET vector = ? WHERE id = 'r00007'", (change(bytearray(blob)),))
    writer.commit()


def flip(blob: bytearray) -> bytes:
    blob[2] ^= 1
    return bytes(blob)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip, "RECORD_DAMAGED"),
        (lambda blob: bytes(blob[:-1]), "RECORD_DAMAGED"),
        (lambda blob: bytes(blob) + b"0000", "RECORD_DAMAGED"),
        (lambda blob: b"\xff" * len(blob), "RECORD_DAMAGED"),
        (lambda blob: bytes(len(blob)), "RECORD_DAMAGED"),
    ],
    ids=["flipped", "cut", "longer", "NaN", "zero"],
)
def test_verify_reports_a_damaged_vector(index: Index, change: Callable[[bytearray], bytes], reason: str) -> None:
    collection = filled(index)
    set_vector(collection, change)
    assert problems(collection) == [("r00007", reason)]


def test_verify_reports_a_vector_that_differs_from_memory(index: Index) -> None:
    collection = filled(index)
    set_vector(collection, flip)
    make_checksums_right(collection._store._writer)
    assert problems(collection) == [("r00007", "VECTOR_DIFFERS")]


def make_filled(folder: Path) -> None:
    index = Index(folder, buffer_limit=8)
    filled(index)
    index.close()


def reopened_after(folder: Path, statement: str, *parameters: object) -> Index:
    """Change the database of a closed index, remove the snapshots of the graph, and open the index again."""
    copy_made(folder, make_filled)
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement, parameters)
        connection.commit()
    for graph in folder.rglob("graph-*"):
        graph.unlink()
    return Index(folder, buffer_limit=8)


@pytest.mark.parametrize(
    "change",
    [
        "vector = (SELECT vector FROM records WHERE id = 'r00008')",
        "text = 'another'",
        "class_label = 'another'",
        """metadata = '{"n": 8}'""",
        "revision = revision + 1",
        "revision = 'abc'",
        "created = created - 86400",
        "updated = 1e300",
        "expires = 4e9",
        "text_checksum = NULL",
        "checksum = NULL",
        "row_checksum = NULL",
    ],
)
def test_verify_reports_readable_records_with_wrong_checksums(tmp_path: Path, change: str) -> None:
    index = reopened_after(tmp_path, f"UPDATE records SET {change} WHERE id = 'r00007'")
    found = problems(index.get("c"))
    index.close()
    assert found == [("r00007", "RECORD_DAMAGED")]


@pytest.mark.parametrize(
    "vector",
    [b"", b"123", bytes(4 * WIDTH + 4), "text", np.full(WIDTH, np.nan, dtype="<f4").tobytes()],
    ids=["empty", "cut", "longer", "text", "NaN"],
)
def test_verify_reports_only_the_record_of_a_damaged_vector(tmp_path: Path, vector: bytes | str) -> None:
    index = reopened_after(tmp_path, "UPDATE records SET vector = ? WHERE id = 'r00007'", vector)
    collection = index.get("c")
    query = gaussian(1, WIDTH, seed=3)
    assert len(collection.search(query, COUNT + 5)[0].hits) == COUNT + 4
    assert problems(collection) == [("r00007", "RECORD_DAMAGED")]
    collection.upsert([NewRecord("r00007", "changed", {})], gaussian(1, WIDTH, seed=4))
    assert problems(collection) == []
    assert len(collection.search(query, COUNT + 5)[0].hits) == COUNT + 5
    index.close()


WORDS = {
    "no sizes": "DELETE FROM words_docsize WHERE id IN (3, 8, 9)",
    "no entries": "INSERT INTO words (words) VALUES ('delete-all')",
    "no pages": "DELETE FROM words_data WHERE id > 10",
    "nothing": "DELETE FROM words_data",
    "zeros": "UPDATE words_data SET block = zeroblob(length(block))",
    "a record": "INSERT INTO words (rowid, text) VALUES (5000, 'record')",
    "another text": "INSERT INTO words (words, rowid, text) VALUES ('delete', 8, 'text r00007')",
}


@pytest.mark.parametrize("change", WORDS.values(), ids=WORDS)
def test_verify_reports_and_rebuilds_a_damaged_word_index(tmp_path: Path, change: str) -> None:
    """With such damage, a lexical search may miss texts without an error."""
    index = reopened_after(tmp_path, change)
    collection = index.get("c")
    assert problems(collection) in (
        [("", "WORDS_DAMAGED")],
        [],
    )  # the word index was rebuilt during the opening
    assert problems(collection) == []
    (found,) = collection.search_lexical(["text"], [COUNT + 5])
    assert len(found.hits) == COUNT + 5
    index.close()


def test_verify_finds_a_flipped_bit_in_the_word_index(index: Index) -> None:
    """The page is readable, so only a comparison with the texts finds the flipped bit."""
    collection = filled(index)
    writer = collection._store._writer
    blocks = writer.execute("SELECT id, block FROM words_data").fetchall()
    number, block = next((number, block) for number, block in blocks if b"text" in block)
    writer.execute("UPDATE words_data SET block = ? WHERE id = ?", (block.replace(b"text", b"tex\xf4", 1), number))
    assert problems(collection) == [("", "WORDS_DAMAGED")]
    assert problems(collection) == []


@pytest.mark.parametrize("words", ["'another'", "NULL"])
def test_verify_reports_records_whose_words_differ_from_the_text(index: Index, words: str) -> None:
    collection = filled(index)
    collection.upsert([NewRecord("foot", "der Fuß"), NewRecord("city", "北京大学")], gaussian(2, WIDTH, seed=7))
    collection._store._writer.execute(f"UPDATE records SET search_text = {words} WHERE id = 'foot'")
    assert problems(collection) == [("foot", "WORDS_DAMAGED")]
    assert problems(collection) == []
    assert collection.delete(["foot"]).deleted == 1
    assert collection.search_lexical(["fuß"], [5])[0].hits == []
    assert problems(collection) == []


def test_verify_reports_a_word_index_that_cannot_be_rebuilt(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = filled(index)
    collection._store._writer.execute(WORDS["no sizes"])

    def fail(connection: sqlite3.Connection) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(word_index, "build", fail)
    ((found,),) = [step.problems for step in collection.verify() if step.problems]
    assert found.reason == "WORDS_DAMAGED"
    assert "restore a backup" in found.message
    with refused(Code.INTERNAL, "restore a backup"):
        collection.search_lexical(["text"], [COUNT])


def test_verify_reports_damaged_metadata(index: Index) -> None:
    collection = filled(index)
    collection._store._writer.execute("UPDATE records SET metadata = '[' WHERE id = 'r00007'")
    collection._store._writer.commit()
    assert problems(collection) == [("r00007", "RECORD_DAMAGED")]


def label_of(collection: Collection, record_id: str) -> int:
    query = "SELECT label FROM records WHERE id = ?"
    return int(collection._store._writer.execute(query, (record_id,)).fetchone()[0])


@pytest.mark.parametrize("record_id", ["r00007", f"r{COUNT:05}"], ids=["graph", "buffer"])
def test_verify_reports_a_record_that_is_not_in_memory(index: Index, record_id: str) -> None:
    collection = filled(index)
    collection._neighbours.remove({label_of(collection, record_id)})
    assert problems(collection) == [(record_id, "NOT_IN_MEMORY")]


def test_verify_reports_vectors_without_a_record(index: Index) -> None:
    collection = filled(index)
    collection._neighbours.change(np.array([10_000], dtype=np.int64), gaussian(1, WIDTH), set())
    assert problems(collection) == [("", "UNKNOWN_VECTORS")]


def test_verify_reports_a_node_without_links_to_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has its vector and can be read by the record's number (label). Only a search shows the missing links."""
    collection = filled(index)
    lost, graph = label_of(collection, "r00007"), collection._neighbours._graph
    search = graph.search

    def blind(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        labels, scores = search(queries, k + 1)
        kept = [[i for i, label in enumerate(row) if label != lost][:k] for row in labels]
        return np.take_along_axis(labels, np.array(kept), 1), np.take_along_axis(scores, np.array(kept), 1)

    monkeypatch.setattr(graph, "search", blind)
    assert problems(collection) == [("r00007", "UNREACHABLE")]
    # A verification of a sample may miss the node, one of all records does not.
    monkeypatch.setattr(verify, "_SAMPLE", 0)
    assert problems(collection) == []
    found = [problem.id for step in collection.verify(full=True) for problem in step.problems]
    assert found == ["r00007"]


@pytest.mark.parametrize("count", [11, 12])
def test_verify_reports_a_node_without_links_to_it_in_a_small_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    with closing(Index(tmp_path, buffer_limit=1)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        collection.upsert(numbered(count), gaussian(count, WIDTH))
        collection.maintain()
        assert collection._neighbours.graph_size == count
        lost, search = label_of(collection, "r00007"), collection._neighbours.search

        def blind(queries: np.ndarray, k: int, ef: int) -> list[Candidates]:
            found = search(queries, k, ef)
            assert all(found)
            return [each._replace(labels=[label for label in each.labels if label != lost]) for each in found if each]

        monkeypatch.setattr(collection._neighbours, "search", blind)
        assert problems(collection) == [("r00007", "UNREACHABLE")]


def test_verify_finds_a_damaged_index_of_sqlite(tmp_path: Path) -> None:
    """SQLite does not notice a wrong key in its index, and does not find the record."""
    copy_made(tmp_path, make_filled)
    (path,) = tmp_path.rglob("records.db")
    data = path.read_bytes()
    entry = b"\x03\x19\x01r00007"  # two columns: a text of six letters, and a number of one byte
    assert data.count(entry) == 1
    path.write_bytes(data.replace(entry, entry[:-1] + b"X"))
    index = Index(tmp_path, buffer_limit=8)
    found = problems(index.get("c"))
    index.close()
    assert found
    assert set(found) == {("", "DATABASE_DAMAGED")}


def test_verify_reports_no_problem_of_concurrent_writes(index: Index) -> None:
    collection = filled(index)
    done = threading.Event()

    def write() -> None:
        version = 0
        while not done.is_set():
            version += 1
            collection.upsert(numbered(40, first=version % 300), gaussian(40, WIDTH, seed=version))
            collection.delete([f"r{(version * 7) % 400:05}"])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = [problem for _ in range(4) for step in collection.verify() for problem in step.problems]
    finally:
        done.set()
        writer.join(300)
    assert found == []
    assert problems(collection) == []
