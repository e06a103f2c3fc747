"""The two settings of a collection that can change, on every index backend: truncation and the bound model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import pytest

from conformance.conftest import BACKENDS, milvus_uri
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.collections.backend import IndexBackend
from emberpc.server.collections.filters import AllOf, Comparison, Membership, Not, Operator, Prefix
from emberpc.server.errors import Code
from emberpc.server.index import Index
from index.support import refused
from index_helpers import vectors

OLD, NEW = "0" * 64, "1" * 64
SPEC = CollectionSpec("conformance-specs", 4, model="m", model_fingerprint=OLD)
NAME = SPEC.name

OpenIndex = Callable[[], IndexBackend]


@pytest.fixture(scope="module", params=BACKENDS)
def open_index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenIndex]:
    """Return a function that opens the same index each time. The index must be closed before it is opened again."""
    if request.param == "embedded":
        yield partial(Index, tmp_path_factory.mktemp("index"))
        return
    with ExitStack() as stack:
        uri = milvus_uri(stack, tmp_path_factory)
        from emberpc.server.milvus import MilvusIndex

        yield partial(MilvusIndex, uri, os.environ.get("EMBERPC_MILVUS_TOKEN", ""))


@pytest.fixture(autouse=True)
def made(open_index: OpenIndex) -> Iterator[None]:
    """Create a collection with one record."""
    with closing(open_index()) as index:
        index.create(SPEC).upsert([NewRecord("a", "text")], vectors(1, dimensions=4))
    yield
    with closing(open_index()) as index:
        index.delete(NAME)


def spec_of(index: IndexBackend) -> CollectionSpec:
    """Return the spec of the collection, after checking that `page` and `get` of the index agree."""
    (listed,) = [spec for spec in index.page(1000, "")[0] if spec.name == NAME]
    spec = index.get(NAME).spec
    assert listed == spec
    return spec


def test_a_changed_truncation_survives_a_restart(open_index: OpenIndex) -> None:
    with closing(open_index()) as index:
        collection = index.get(NAME)
        for truncation in ("end", "start", "refuse", "end"):
            index.update(NAME, truncation)
            assert spec_of(index).truncation == truncation
        assert index.get(NAME) is collection  # its lock allows one write at a time
        assert collection.spec.truncation == "end"
    with closing(open_index()) as index:
        assert spec_of(index) == CollectionSpec(NAME, 4, model="m", model_fingerprint=OLD, truncation="end")
        assert index.get(NAME).get(["a"])[0].text == "text"


def test_a_truncation_that_does_not_exist_is_refused(open_index: OpenIndex) -> None:
    with closing(open_index()) as index:
        with refused(Code.INVALID_ARGUMENT, "'middle'", field="collection.truncation"):
            index.update(NAME, "middle")
        with refused(Code.NOT_FOUND, "'none'"):
            index.update("none", "end")
        assert spec_of(index) == SPEC


def test_a_changed_binding_survives_a_restart(open_index: OpenIndex) -> None:
    with closing(open_index()) as index:
        collection = index.get(NAME)
        assert index.update_fingerprint(NAME, "2" * 64, NEW).spec == SPEC  # the collection has another fingerprint
        assert index.update_fingerprint(NAME, OLD, NEW) is collection
        assert index.update_fingerprint(NAME, OLD, "3" * 64).spec.model_fingerprint == NEW
        assert spec_of(index).model_fingerprint == collection.spec.model_fingerprint == NEW
        with refused(Code.NOT_FOUND, "'none'"):
            index.update_fingerprint("none", OLD, NEW)
    with closing(open_index()) as index:
        assert spec_of(index) == CollectionSpec(NAME, 4, model="m", model_fingerprint=NEW)
        assert index.get(NAME).count() == 1


def test_changes_of_truncation_and_binding_are_both_kept(open_index: OpenIndex) -> None:
    with closing(open_index()) as index:
        index.update(NAME, "start")
        index.update_fingerprint(NAME, OLD, NEW)
        index.update(NAME, "end")
        expected = CollectionSpec(NAME, 4, model="m", model_fingerprint=NEW, truncation="end")
        assert spec_of(index) == expected
        index.get(NAME).upsert([NewRecord("b")], vectors(1, dimensions=4))
        assert index.get(NAME).count() == 2
    with closing(open_index()) as index:
        assert spec_of(index) == expected


def test_a_filter_that_compares_texts_with_a_number_gives_a_warning(open_index: OpenIndex) -> None:
    documents: list[dict[str, Any]] = [
        {"year": "1999", "both": "1", "deep": {"n": ["7"]}},
        {"year": "2000", "both": 1},
        {"n": 1},
        {},
    ]
    with closing(open_index()) as index:
        collection = index.get(NAME)
        records = [NewRecord(f"r{i}", metadata=document) for i, document in enumerate(documents)]
        collection.upsert(records, vectors(len(records), dimensions=4))
        year = Comparison("year", Operator.GREATER_OR_EQUAL, 2000)
        (sentence,) = collection.mismatches(year)
        assert "compares 'year' with a number, and the records have strings there" in sentence
        deep = Membership("deep.n", (7,))
        assert len(collection.mismatches(AllOf((Not(year), deep)))) == 2
        for fits in (Comparison("both", Operator.EQUAL, 1), Comparison("n", Operator.LESS, 9), Prefix("year", "1")):
            assert collection.mismatches(fits) == []
        (sentence,) = collection.mismatches(Comparison("none", Operator.EQUAL, 1))
        assert "names 'none', and none of the" in sentence
        (sentence,) = collection.mismatches(Comparison("n", Operator.EQUAL, "1"))
        assert "compares 'n' with a string" in sentence
