"""Filtered searches, pages, counts and deletes cover exactly the matching records, despite concurrent writes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, NewRecord, SearchStrategy
from emberpc.server.collections.filters import AnyOf, Comparison, Existence, Filter, Not, Operator
from emberpc.server.collections.types import Distance, Matrix
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.graph.neighbours import Candidates, Neighbours
from emberpc.server.index.search import filtered
from index.support import gaussian, refused
from index_helpers import true_scores, vectors

COUNT = 4000
#: Limits of the numbers of records, by the share of the records with a number below the limit.
SHARES = {0.5: 2000.0, 0.1: 400.0, 0.01: 40.0, 0.001: 4.0}


def below(number: float) -> Comparison:
    return Comparison("number", Operator.LESS, number)


def equal(field: str, value: str | float) -> Comparison:
    return Comparison(field, Operator.EQUAL, value)


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return vectors(COUNT)


@pytest.fixture(scope="module")
def numbers() -> np.ndarray:
    return np.random.default_rng(3).permutation(COUNT)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, matrix: np.ndarray, numbers: np.ndarray) -> Iterator[Collection]:
    index = Index(tmp_path_factory.mktemp("data"), buffer_limit=100)
    collection = index.create(CollectionSpec("c", matrix.shape[1], indexed_fields=("number",)))
    new = [
        NewRecord(f"r{i:05}", metadata={"number": int(n), "far": bool(matrix[i, 0] > 1)}) for i, n in enumerate(numbers)
    ]
    collection.upsert(new, matrix)
    collection.maintain()
    yield collection
    index.close()


@pytest.mark.parametrize("share", SHARES)
def test_filtered_searches_find_the_nearest_matching_records(
    large: Collection, matrix: np.ndarray, numbers: np.ndarray, share: float
) -> None:
    allowed = np.flatnonzero(numbers < SHARES[share])
    queries, k = vectors(20, seed=7), 10
    found = 0.0
    for query, outcome in zip(queries, large.search(queries, k, conditions=[below(SHARES[share])] * 20), strict=True):
        scores = true_scores(query, matrix[allowed], Distance.COSINE)
        wanted = min(k, len(allowed))
        assert len(outcome.hits) == wanted
        best = {f"r{allowed[i]:05}" for i in np.argsort(-scores)[:wanted]}
        found += len(best & {record.id for record, _ in outcome.hits}) / wanted
        assert [score for _, score in outcome.hits] == sorted((score for _, score in outcome.hits), reverse=True)
    assert found / 20 >= 0.98


def test_the_plan_states_the_strategy_and_the_number_of_matching_records(large: Collection) -> None:
    query = vectors(1, seed=7)
    (many,) = large.search(query, 10, conditions=[below(2000)])
    assert (many.plan.strategy, many.plan.shortfall_reason) == (SearchStrategy.HNSW, "")
    (few,) = large.search(query, 10, conditions=[below(4)])
    assert (few.plan.strategy, few.plan.ef, few.plan.compared_count) == (SearchStrategy.EXACT, 0, 4)
    assert few.plan.shortfall_reason == "4 records match the filter"
    (one,) = large.search(query, 10, conditions=[equal("number", 3)])
    assert one.plan.shortfall_reason == "1 record matches the filter"
    (none,) = large.search(query, 10, conditions=[Existence("nothing")])
    assert (none.hits, none.plan.shortfall_reason) == ([], "0 records match the filter")


def test_matching_records_far_from_the_query_are_found(large: Collection, matrix: np.ndarray) -> None:
    """No record near the query matches, so none of the first candidates of the graph does."""
    query = np.zeros((1, matrix.shape[1]), dtype=np.float32)
    query[0, 0] = -1
    far = Comparison("far", Operator.EQUAL, True)
    allowed = np.flatnonzero(matrix[:, 0] > 1)
    assert len(allowed) > 500
    (outcome,) = large.search(query, 10, conditions=[far])
    scores = true_scores(query[0], matrix[allowed], Distance.COSINE)
    assert {record.id for record, _ in outcome.hits} == {f"r{allowed[i]:05}" for i in np.argsort(-scores)[:10]}


def test_each_query_has_its_own_filter(large: Collection) -> None:
    queries = np.repeat(vectors(1, seed=7), 4, axis=0)
    conditions: list[Filter | None] = [below(4), None, below(2), below(4)]
    outcomes = large.search(queries, 10, conditions=conditions)
    assert [len(outcome.hits) for outcome in outcomes] == [4, 10, 2, 4]
    assert outcomes[0].hits == outcomes[3].hits


def test_pages_counts_and_deletes_apply_a_filter(collection: Collection) -> None:
    new = [NewRecord(f"r{i:02}", metadata={"odd": i % 2 == 1}) for i in range(20)]
    collection.upsert(new, gaussian(20, 16))
    odd = Comparison("odd", Operator.EQUAL, True)
    first, token = collection.page(6, "", condition=odd)
    collection.delete(["r11"])
    collection.upsert(
        [NewRecord("r00", metadata={"odd": True}), NewRecord("r18", metadata={"odd": True})], gaussian(2, 16)
    )
    second, end = collection.page(6, token, condition=odd)
    assert [record.id for record in first] == ["r01", "r03", "r05", "r07", "r09", "r11"]
    assert [record.id for record in second] == ["r13", "r15", "r17", "r18", "r19"]
    assert not end
    assert (collection.count(odd), collection.count(Not(odd)), collection.count()) == (11, 8, 19)
    before = collection.info().sequence
    result = collection.delete_matching(odd)
    assert (result.deleted, result.sequence) == (11, before + 1)
    assert (collection.count(odd), collection.count()) == (0, 8)
    assert collection.delete_matching(odd).sequence == before + 1
    assert {record.id for record, _ in collection.search(gaussian(1, 16), 20)[0].hits} == {
        f"r{i:02}" for i in range(2, 18, 2)
    }


@pytest.mark.parametrize(
    ("bound", "value"),
    [("_MAX_BYTES", 2**20), ("_MAX_BYTES", 100), ("_MAX_WRITES", 1)],
    ids=["large cache", "small cache", "few cached writes"],
)
def test_a_filter_applies_to_every_write_immediately(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    """The test repeats a filter, so that its cached matches are updated, or missing because of the patched limits."""
    monkeypatch.setattr(filtered, bound, value)
    data = gaussian(60, 16)
    query = data[:1]
    kinds = AnyOf((equal("kind", "a"), equal("kind", "b")))
    truth: dict[str, str] = {}

    def found() -> set[str]:
        (outcome,) = collection.search(query, 60, conditions=[kinds])
        return {record.id for record, _ in outcome.hits}

    def put(i: int, kind: str) -> None:
        collection.upsert([NewRecord(f"r{i}", metadata={"kind": kind})], data[i : i + 1])
        truth[f"r{i}"] = kind

    for i in range(30):
        put(i, "abc"[i % 3])
        collection.maintain()
        if i % 4 == 3:
            put(i - 2, "abc"[i // 4 % 3])
        if i % 5 == 4:
            collection.delete([f"r{i - 1}"])
            truth.pop(f"r{i - 1}", None)
            collection.delete(["nobody"])  # not a write: the sequence number stays
        assert found() == {key for key, kind in truth.items() if kind != "c"}


def test_a_record_that_is_constantly_replaced_is_found_by_every_search(collection: Collection) -> None:
    """The record is replaced repeatedly; a search that combined old labels with new vectors would miss it."""
    data = gaussian(40, 16)
    new = [NewRecord(f"r{i}", metadata={"kind": "a"}) for i in range(40)]
    collection.upsert(new, data)
    collection.maintain()
    ending = threading.Event()

    def write() -> None:
        while not ending.is_set():
            collection.upsert(new[:1], data[:1])
            collection.maintain()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            (outcome,) = collection.search(data[:1], 1, conditions=[equal("kind", "a")])
            assert outcome.hits[0][0].id == "r0"
    finally:
        ending.set()
        writer.join()


def test_a_filtered_search_is_not_repeated_for_writes_of_other_records(
    large: Collection, matrix: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a search would be repeated under steady writes, and finally wait for one of them."""
    searches = 0
    search = Neighbours.search

    def interrupted(neighbours: Neighbours, queries: Matrix, k: int, ef: int) -> list[Candidates | None]:
        nonlocal searches
        searches += 1
        found = search(neighbours, queries, k, ef)
        large.upsert([NewRecord("other", metadata={"number": COUNT})], matrix[:1])
        return found

    monkeypatch.setattr(Neighbours, "search", interrupted)
    (outcome,) = large.search(matrix[:1], 10, conditions=[below(SHARES[0.5])])
    assert (len(outcome.hits), outcome.plan.strategy, searches) == (10, SearchStrategy.HNSW, 1)
    large.delete(["other"])


def test_a_missing_index_of_a_declared_field_is_created(tmp_path: Path) -> None:
    spec = CollectionSpec("c", 16, indexed_fields=("lang", 'odd"key'))
    index = Index(tmp_path)
    index.create(spec)
    index.close()
    (database,) = tmp_path.glob("collections/*/records.db")
    with sqlite3.connect(database) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE name GLOB 'metadata_[0-9a-f]*'").fetchall()
        ((name,),) = names
        connection.execute(f"DROP INDEX {name}")
    connection.close()
    index = Index(tmp_path)
    index.get("c")
    index.close()
    with sqlite3.connect(database) as connection:
        assert list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))
    connection.close()


def test_a_database_of_a_newer_version_is_refused_and_not_changed(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.create(CollectionSpec("c", 16))
    index.close()
    (database,) = tmp_path.glob("collections/*/records.db")
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    index = Index(tmp_path)
    with refused(Code.INTERNAL, "newer version"):
        index.get("c")
    index.close()
