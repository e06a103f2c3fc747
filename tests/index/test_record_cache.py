"""Repeated hits come from memory; they equal the written records, and a change of a record removes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage.record_cache import RecordCache
from index_helpers import DIMENSIONS, records, vectors

#: Texts without NUL, which metadata must not contain.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(params=[0, 2**20])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Collection]:
    """A collection without a record cache, and one with a record cache."""
    with closing(Index(tmp_path, record_cache_bytes=request.param)) as index:
        yield index.create(CollectionSpec("c", DIMENSIONS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), label=st.text(), metadata=st.dictionaries(TEXTS, JSON, max_size=4))
def test_a_hit_has_the_record_as_written(
    collection: Collection, text: str, label: str, metadata: dict[str, Any]
) -> None:
    vector = vectors(1)
    collection.upsert([NewRecord("a", text, metadata, label)], vector)
    (stored,) = collection.get(["a"])
    for _ in range(2):
        ((found, _),) = collection.search(vector, 1)[0].hits
        assert found == stored
        assert (found.text, found.label, found.metadata) == (text, label, metadata)


def test_the_next_search_returns_a_changed_record(collection: Collection) -> None:
    matrix = vectors(3)
    collection.upsert(records("a", "b", "c"), matrix)
    for step in range(3):
        assert len(collection.search(matrix, 3)[0].hits) == 3
        collection.upsert([NewRecord("a", f"text {step}", {"step": step})], matrix[:1])
        ((found, _),) = collection.search(matrix[:1], 1)[0].hits
        assert (found.text, found.metadata) == (f"text {step}", {"step": step})
    collection.delete(["a"])
    assert "a" not in [record.id for record, _ in collection.search(matrix, 3)[0].hits]


def test_cached_records_are_returned_only_by_their_collection(tmp_path: Path) -> None:
    matrix = vectors(1)
    with closing(Index(tmp_path, record_cache_bytes=2**20)) as index:
        both = [index.create(CollectionSpec(name, DIMENSIONS)) for name in ("one", "two")]
        for one in both:
            one.upsert([NewRecord("a", f"text of {one.spec.name}")], matrix)
        for one in (*both, *both):
            ((found, _),) = one.search(matrix, 1)[0].hits
            assert found.text == f"text of {one.spec.name}"


def test_the_record_cache_has_a_limit_of_bytes(tmp_path: Path) -> None:
    cache = RecordCache(20_000)
    matrix = vectors(200)
    with closing(Index(tmp_path, record_cache_bytes=2**20)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(records(*map(str, range(200))), matrix)
        kept = {i: record for i, (record, _) in enumerate(collection.search(matrix[:1], 200)[0].hits)}
    owner = cache.new_owner()
    cache.add(owner, kept)
    found = cache.find(owner, list(kept))
    assert 0 < len(found) < 20
    assert found == {label: kept[label] for label in found}
    assert not cache.find(cache.new_owner(), list(kept))
