"""A collection returns records as they were written, with vectors in the buffer or in the graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import CollectionSpec, Distance, NewRecord, SearchOutcome, SearchStrategy
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from index_helpers import DIMENSIONS, records, true_scores, vectors


def test_a_record_is_read_as_written(collection: Collection) -> None:
    vector = vectors(1)
    given_record = NewRecord("ä/1", "some text", {"n": 1, "list": [1, "two", None], "deep": {"x": True}}, "a label")
    assert collection.upsert([given_record], vector).inserted == 1
    (stored,) = collection.get(["ä/1"], with_vectors=True)
    assert (stored.id, stored.text, stored.metadata, stored.label) == (
        given_record.id,
        given_record.text,
        given_record.metadata,
        given_record.label,
    )
    assert stored.vector is not None
    assert np.array_equal(stored.vector, vector[0])
    assert stored.create_time == stored.update_time


def test_an_update_keeps_the_create_time_and_gives_a_new_revision(collection: Collection) -> None:
    collection.upsert(records("a"), vectors(1))
    (first,) = collection.get(["a"])
    result = collection.upsert(records("a", "b", text="new"), vectors(2))
    assert (result.inserted, result.updated) == (1, 1)
    (second,) = collection.get(["a"])
    assert second.text == "new of a"
    assert second.create_time == first.create_time
    assert second.revision == result.sequence > first.revision
    assert collection.count() == 2


def test_get_keeps_the_order_of_ids_and_leaves_out_missing_records(collection: Collection) -> None:
    collection.upsert(records("a", "b", "c"), vectors(3))
    assert [record.id for record in collection.get(["c", "none", "a"])] == ["c", "a"]


def test_delete_counts_the_existing_records(collection: Collection) -> None:
    collection.upsert(records("a", "b", "c"), vectors(3))
    assert collection.delete(["a", "none", "a"]).deleted == 1
    assert collection.count() == 2
    sequence = collection.info().sequence
    assert collection.delete(["none"]).sequence == sequence


def test_an_upsert_with_an_outdated_expected_revision_writes_nothing(collection: Collection) -> None:
    collection.upsert(records("a"), vectors(1))
    revision = collection.get(["a"])[0].revision
    with pytest.raises(ServiceError) as refused:
        collection.upsert(records("b", "a", text="new"), vectors(2), [0, revision + 1])
    assert refused.value.code is Code.ABORTED
    assert [record.text for record in collection.get(["a", "b"])] == ["text of a"]
    collection.upsert(records("b", "a", text="new"), vectors(2), [0, revision])
    assert collection.count() == 2


@pytest.mark.parametrize("distance", list(Distance))
@pytest.mark.parametrize("count", [5, 300])
def test_hits_and_scores_equal_those_of_an_exact_comparison(index: Index, distance: Distance, count: int) -> None:
    collection = index.create(CollectionSpec("c", DIMENSIONS, distance=distance))
    matrix = vectors(count)
    collection.upsert(records(*(str(i) for i in range(count))), matrix)
    collection.maintain()
    queries = vectors(20, seed=1)
    for query, outcome in zip(queries, collection.search(queries, [3] * 20), strict=True):
        expected = true_scores(query, matrix, distance)
        found = [int(record.id) for record, _ in outcome.hits]
        assert np.allclose([score for _, score in outcome.hits], expected[found], rtol=1e-3, atol=1e-3)
        assert [score for _, score in outcome.hits] == sorted((score for _, score in outcome.hits), reverse=True)
        # With a dot product, the graph may return a slightly worse third hit; an exact search does not.
        best = set(np.argsort(-expected)[:3])
        assert len(best & set(found)) >= (3 if count == 5 else 2)
        assert outcome.plan.strategy is (SearchStrategy.EXACT if count == 5 else SearchStrategy.HNSW)


def test_a_top_k_above_the_number_of_records_returns_all_with_a_reason(collection: Collection) -> None:
    collection.upsert(records("a", "b", "c"), vectors(3))
    (outcome,) = collection.search(vectors(1), [10_000])
    assert len(outcome.hits) == 3
    assert outcome.plan.shortfall_reason == "the collection holds 3 records"
    (outcome,) = collection.search(vectors(1), [5], exclude_ids=["b"])
    assert {record.id for record, _ in outcome.hits} == {"a", "c"}
    assert "left out" in outcome.plan.shortfall_reason


def test_a_search_of_an_empty_collection_states_the_reason_for_no_hits(collection: Collection) -> None:
    (outcome,) = collection.search(vectors(1), [10])
    assert outcome.hits == []
    assert outcome.plan.shortfall_reason == "the collection holds 0 records"


def test_deleted_records_of_buffer_and_graph_are_not_found(collection: Collection) -> None:
    matrix = vectors(60)
    collection.upsert(records(*(str(i) for i in range(60))), matrix)
    collection.maintain()
    collection.upsert(records("fresh"), matrix[:1] * np.float32(1.01))
    assert collection.delete([str(i) for i in range(0, 60, 2)] + ["fresh"]).deleted == 31
    for outcome in collection.search(matrix, [30] * 60):
        assert {int(record.id) % 2 for record, _ in outcome.hits} == {1}
        assert len(outcome.hits) == 30


def test_a_graph_with_many_deleted_nodes_is_rebuilt(collection: Collection) -> None:
    matrix = vectors(100)
    for _ in range(5):
        collection.upsert(records(*(str(i) for i in range(100))), matrix)
        collection.maintain()
    assert collection._neighbours.dead_share <= 0.25
    for i, outcome in enumerate(collection.search(matrix, [1] * 100)):
        assert outcome.hits[0][1] >= 0.999
        assert true_scores(matrix[i], matrix, Distance.COSINE)[int(outcome.hits[0][0].id)] >= 0.999


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """Return a collection of two records in a graph, which no test changes."""
    with closing(Index(tmp_path_factory.mktemp("index"), buffer_limit=0)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(records("a", "b"), vectors(2))
        collection.maintain()
        yield collection


bad_values = st.sampled_from(["narrow", "wide", "nan", "infinite", "huge", "zero"])


@given(kind=bad_values, row=st.integers(0, 2), where=st.integers(0, DIMENSIONS - 1))
def test_an_invalid_vector_is_refused_with_its_index_and_nothing_is_written(
    pair: Collection, kind: str, row: int, where: int
) -> None:
    matrix = vectors(3)
    if kind in ("narrow", "wide"):
        matrix, row = vectors(3, dimensions=DIMENSIONS + (1 if kind == "wide" else -1)), 0
    elif kind == "zero":
        matrix[row] = 0
    else:
        matrix[row, where] = {"nan": np.nan, "infinite": -np.inf, "huge": 3e38}[kind]
    with pytest.raises(ServiceError) as refused:
        pair.upsert(records("x", "y", "z"), matrix)
    assert refused.value.code is Code.INVALID_ARGUMENT
    assert [violation.field for violation in refused.value.violations] == [f"vectors[{row}]"]
    with pytest.raises(ServiceError) as refused:
        pair.search(matrix, [1] * 3)
    assert [violation.field for violation in refused.value.violations] == [f"queries[{row}].vector"]
    assert pair.count() == 2


@given(ids=st.lists(st.text(max_size=4), max_size=5))
def test_ids_are_stored_unchanged_or_refused(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    index = Index(tmp_path_factory.mktemp("index"))
    collection = index.create(CollectionSpec("c", DIMENSIONS))
    try:
        collection.upsert(records(*ids), vectors(len(ids)))
    except (ServiceError, UnicodeEncodeError):
        assert collection.count() == 0
    else:
        assert sorted(record.id for record in collection.page(1000, "")[0]) == sorted(ids)
    index.close()


def test_paging_returns_every_record_once_despite_writes(collection: Collection) -> None:
    stay = [f"r{i:03}" for i in range(0, 100, 2)]
    collection.upsert(records(*stay), vectors(50))
    seen: list[str] = []
    token, number = "", 1
    while True:
        page, token = collection.page(7, token)
        seen += [record.id for record in page]
        collection.upsert(records(f"r{number:03}"), vectors(1))
        number += 2
        if not token:
            break
    assert [each for each in seen if each in stay] == stay
    assert len(seen) == len(set(seen))


def test_an_invalid_page_token_is_refused(collection: Collection, index: Index) -> None:
    for page in (collection.page, index.page):
        with pytest.raises(ServiceError) as refused:
            page(10, "!?")
        assert refused.value.violations[0].field == "page_token"


def numbered(version: int) -> np.ndarray:
    matrix = vectors(20, seed=3)
    matrix[:, 0] = version
    return matrix


def torn(outcomes: list[SearchOutcome]) -> list[str]:
    """Return the errors of outcomes: records whose text and vector have different numbers, and repeated records."""
    found = []
    for outcome in outcomes:
        ids = [record.id for record, _ in outcome.hits]
        found += ["a record twice"] if len(ids) != len(set(ids)) else []
        for record, _ in outcome.hits:
            if record.vector is None or record.vector[0] != float(record.text):
                found.append(f"{record.id}: {record.text} and {record.vector}")
    return found


def test_concurrent_readers_see_only_whole_records(collection: Collection) -> None:
    stop = threading.Event()
    errors: list[str] = []

    def write() -> None:
        for version in range(1, 41):
            collection.upsert([NewRecord(str(i), str(version)) for i in range(20)], numbered(version))
            if version % 10 == 0:
                collection.delete([str(i) for i in range(5)])
        stop.set()

    def read() -> None:
        while not stop.is_set():
            errors.extend(torn(collection.search(vectors(3, seed=9), [30] * 3, with_vectors=True)))

    collection.upsert([NewRecord(str(i), "0") for i in range(20)], numbered(0))
    threads = [threading.Thread(target=write), *(threading.Thread(target=read) for _ in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


@pytest.mark.parametrize(
    ("dimensions", "count"),
    [
        (64, 4_500),
        pytest.param(64, 20_000, marks=pytest.mark.slow),
        pytest.param(384, 20_000, marks=pytest.mark.slow),
    ],
)
def test_default_searches_of_clustered_vectors_reach_the_expected_recall(
    tmp_path: Path, dimensions: int, count: int
) -> None:
    index = Index(tmp_path)
    collection = index.create(CollectionSpec("c", dimensions))
    matrix = vectors(count, dimensions=dimensions)
    for start in range(0, count, 500):
        ids = [str(i) for i in range(start, start + 500)]
        collection.upsert(records(*ids), matrix[start : start + 500])
    collection.maintain()
    queries = matrix[:200] + 0.1 * np.random.default_rng(5).normal(size=(200, dimensions)).astype(np.float32)
    found = 0
    for query, outcome in zip(queries, collection.search(queries, [10] * 200), strict=True):
        expected = np.argsort(-true_scores(query, matrix, Distance.COSINE))[:10]
        found += len({int(record.id) for record, _ in outcome.hits} & set(expected.tolist()))
        assert outcome.plan.strategy is SearchStrategy.HNSW
    index.close()
    assert found / 2000 >= 0.98
