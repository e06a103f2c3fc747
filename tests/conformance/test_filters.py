"""Filters, on every index backend: matching records are found, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.conftest import BACKENDS, milvus_uri
from emberpc.server.collections import CollectionSpec, Distance, NewRecord
from emberpc.server.collections.backend import CollectionBackend, IndexBackend
from emberpc.server.collections.filters import (
    AllOf,
    AnyOf,
    Comparison,
    Existence,
    Filter,
    Membership,
    Not,
    Operator,
    Prefix,
    matches,
)
from emberpc.server.index import Index
from index.test_filters import CONDITIONS, METADATA
from index_helpers import true_scores, vectors

DIMENSIONS = 16


@pytest.fixture(scope="module", params=BACKENDS)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IndexBackend]:
    if request.param == "embedded":
        embedded = Index(tmp_path_factory.mktemp("index"), buffer_limit=256)
        yield embedded
        embedded.close()
        return
    with ExitStack() as stack:
        uri = milvus_uri(stack, tmp_path_factory)
        from emberpc.server.milvus import MilvusIndex

        opened = MilvusIndex(uri, os.environ.get("EMBERPC_MILVUS_TOKEN", ""))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def collection(index: IndexBackend) -> Iterator[CollectionBackend]:
    yield index.create(CollectionSpec("conformance-filters", 2))
    index.delete("conformance-filters")


def write(collection: CollectionBackend, documents: list[dict[str, Any]]) -> None:
    records = [NewRecord(f"r{i:04}", metadata=document) for i, document in enumerate(documents)]
    present = [record.id for record in collection.page(1000, "")[0]]
    collection.delete(present[len(records) :])
    if records:
        collection.upsert(records, np.ones((len(records), 2), dtype=np.float32))


def check(collection: CollectionBackend, documents: list[dict[str, Any]], condition: Filter) -> None:
    expected = [f"r{i:04}" for i, document in enumerate(documents) if matches(condition, document)]
    assert [record.id for record in collection.page(1000, "", condition=condition)[0]] == expected, condition
    assert collection.count(condition) == len(expected), condition
    query = np.ones((1, 2), dtype=np.float32)
    (outcome,) = collection.search(query, 100, conditions=[condition])
    assert sorted(record.id for record, _ in outcome.hits) == expected, condition


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(documents=st.lists(METADATA, max_size=6), conditions=st.lists(CONDITIONS, min_size=1, max_size=4))
def test_a_filter_returns_exactly_the_matching_records(
    collection: CollectionBackend, documents: list[dict[str, Any]], conditions: list[Filter]
) -> None:
    write(collection, documents)
    for condition in conditions:
        check(collection, documents, condition)


DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"x": None},
    {"x": 1},
    {"x": 1.5},
    {"x": "1"},
    {"x": True},
    {"x": False},
    {"x": 0},
    {"x": -3},
    {"x": 1e300},
    {"x": "abc"},
    {"x": "ab%c"},
    {"x": 'a"b\\'},
    {"x": "été"},
    {"x": []},
    {"x": [1, "abc", None, True, [5]]},
    {"x": [7, "zz", {"y": 1}]},
    {"x": {"y": 1}},
    {"x": {"y": "abc"}},
    {"x.y": 1},
    {'q"': {"": 2}},
]
LEAVES: list[Filter] = [
    *(Comparison("x", op, value) for op in Operator for value in (1.0, 0.5, "abc", "b", 'a"b\\')),
    *(Comparison("x", op, value) for op in (Operator.EQUAL, Operator.NOT_EQUAL) for value in (True, False, None)),
    *(Comparison(field, Operator.GREATER, 0.0) for field in ("x.y", "x\\.y", 'q".', "none")),
    *(Prefix("x", prefix) for prefix in ("ab", "ab%", "a_", 'a"', "é", "zz", "x")),
    *(Existence(field) for field in ("x", "x.y", "x\\.y", 'q"', 'q".')),
    Membership("x", (1.0, "zz", None)),
    Membership("x", (False,)),
]


def test_each_kind_of_condition_matches_as_documented(collection: CollectionBackend) -> None:
    write(collection, DOCUMENTS)
    for leaf in LEAVES:
        check(collection, DOCUMENTS, leaf)
        check(collection, DOCUMENTS, Not(leaf))
    for one, other in zip(LEAVES, LEAVES[7:], strict=False):
        check(collection, DOCUMENTS, AllOf((one, Not(other))))
        check(collection, DOCUMENTS, Not(AnyOf((one, Not(AllOf((other, Existence("x"))))))))


def test_pages_and_deletes_apply_a_filter(index: IndexBackend) -> None:
    collection = index.create(CollectionSpec("conformance-pages", 2))
    documents = [{"n": i, "tags": [i % 3, "odd" if i % 2 else "even"]} for i in range(500)]
    write(collection, documents)
    condition = AllOf((Comparison("n", Operator.GREATER_OR_EQUAL, 100.0), Comparison("tags", Operator.GREATER, 1.0)))
    expected = [f"r{i:04}" for i in range(100, 500) if i % 3 == 2]
    found, token = [], ""
    while True:
        records, token = collection.page(17, token, condition=condition)
        found += [record.id for record in records]
        if not token:
            break
    assert found == expected
    assert collection.delete_matching(condition).deleted == len(expected)
    assert collection.delete_matching(condition).deleted == 0
    assert collection.count() == 500 - len(expected)
    assert collection.count(condition) == 0
    index.delete("conformance-pages")


COUNT = 6000


@pytest.fixture(scope="module")
def thousands(index: IndexBackend) -> Iterator[CollectionBackend]:
    collection = index.create(CollectionSpec("conformance-thousands", DIMENSIONS))
    matrix = vectors(COUNT, dimensions=DIMENSIONS)
    records = [NewRecord(f"r{i}", metadata={"n": i % 1000, "list": [i % 1000]}) for i in range(COUNT)]
    for start in range(0, COUNT, 1000):
        collection.upsert(records[start : start + 1000], matrix[start : start + 1000])
    yield collection
    index.delete("conformance-thousands")


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("field", ["n", "list"])
def test_a_filtered_search_finds_the_true_nearest_matching_records(
    thousands: CollectionBackend, share: float, field: str
) -> None:
    matrix = vectors(COUNT, dimensions=DIMENSIONS)
    matching = np.flatnonzero(np.arange(COUNT) % 1000 < 1000 * share)
    condition = Comparison(field, Operator.LESS, 1000 * share)
    queries = (matrix[:20] + 0.1 * vectors(20, seed=5, dimensions=DIMENSIONS)).astype(np.float32)
    k = min(10, len(matching))
    found = 0
    for query, outcome in zip(
        queries, thousands.search(queries, k, conditions=[condition] * len(queries)), strict=True
    ):
        assert len(outcome.hits) == k
        scores = true_scores(query, matrix[matching], Distance.COSINE)
        bound = np.sort(scores)[-k]
        by_id = {f"r{i}": score for i, score in zip(matching.tolist(), scores.tolist(), strict=True)}
        for record, score in outcome.hits:
            assert score == pytest.approx(by_id[record.id], abs=1e-4)
            found += by_id[record.id] >= bound - 1e-5
    assert found / (len(queries) * k) >= 0.98


def test_a_shortfall_states_the_number_of_matching_records(thousands: CollectionBackend) -> None:
    condition = Membership("n", (3.0, 4.0))
    query = vectors(1, dimensions=DIMENSIONS)
    (outcome,) = thousands.search(query, 100, conditions=[condition])
    assert len(outcome.hits) == outcome.plan.compared_count == 12
    assert outcome.plan.shortfall_reason == "12 records match the filter"
    (outcome,) = thousands.search(query, 100, conditions=[condition], exclude_ids=["r3"])
    assert outcome.plan.shortfall_reason == "12 records match the filter, the record asked about left out"
    assert len(outcome.hits) == 11
    with_other = thousands.search(np.vstack([query] * 3), 3, conditions=[None, condition, None])
    assert [hit[0].id for hit in with_other[0].hits] == [hit[0].id for hit in with_other[2].hits]
    assert all(hit[0].metadata["n"] in (3, 4) for hit in with_other[1].hits)
