"""The bytes of a response: only its parts count, and the bytes that are read for it are limited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from emberpc.server.collections import CollectionSpec, NewRecord, RecordParts, StoredRecord
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage.store_reader import StoreReader
from index.support import refused
from index_helpers import DIMENSIONS, vectors

LIMIT = 50_000
COUNT = 40
MATRIX = vectors(COUNT)
IDS = [f"r{i:02}" for i in range(COUNT)]
#: A text of which six are more than a response may have.
LONG = "word " * 2000
NO_TEXT = RecordParts(text=False)
NO_METADATA = RecordParts(metadata=False)
NEITHER = RecordParts(text=False, metadata=False)


@pytest.fixture(params=[0, 2**20], ids=["no cache", "cache"])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Collection]:
    with closing(Index(tmp_path, record_cache_bytes=request.param, max_response_bytes=LIMIT)) as index:
        opened = index.create(CollectionSpec("c", DIMENSIONS))
        new = [NewRecord(each, f"{LONG} w{i}", {"number": i}, "label") for i, each in enumerate(IDS)]
        opened.upsert(new, MATRIX)
        yield opened


def hits(outcomes: Any) -> list[StoredRecord]:
    return [record for outcome in outcomes for record, _ in outcome.hits]


READS: dict[str, Callable[[Collection, RecordParts, bool], list[StoredRecord]]] = {
    "get": lambda collection, parts, vector: collection.get(IDS, with_vectors=vector, parts=parts),
    "search": lambda collection, parts, vector: hits(
        collection.search(MATRIX[:1], COUNT, with_vectors=vector, parts=parts)
    ),
    "search of one hit each": lambda collection, parts, vector: hits(
        collection.search(MATRIX, 1, with_vectors=vector, parts=parts)
    ),
    "words": lambda collection, parts, vector: hits(
        collection.search_lexical([f"w{i}" for i in range(COUNT)], [1] * COUNT, with_vectors=vector, parts=parts)
    ),
    "both": lambda collection, parts, vector: hits(
        collection.search_hybrid(MATRIX[:1], ["word"], [COUNT], dense_weight=0.5, with_vectors=vector, parts=parts)
    ),
}


@pytest.mark.parametrize("vector", [False, True], ids=["", "vectors"])
@pytest.mark.parametrize("kind", READS)
def test_omitted_parts_do_not_count_as_response_bytes(collection: Collection, kind: str, vector: bool) -> None:
    for parts in (NO_TEXT, NEITHER):
        found = READS[kind](collection, parts, vector)
        assert sorted(record.id for record in found) == IDS
        assert all((record.vector is not None) == vector for record in found)
        # Whole records of one response may be read, and as many may come from the cache.
        assert sum(len(record.text) for record in found) <= 2 * LIMIT
        if parts.metadata:
            assert sorted(record.metadata["number"] for record in found) == list(range(COUNT))


@pytest.mark.parametrize("vector", [False, True], ids=["", "vectors"])
@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("parts", [RecordParts(), NO_METADATA])
def test_requested_parts_count_as_response_bytes(
    collection: Collection, kind: str, vector: bool, parts: RecordParts
) -> None:
    with refused(Code.RESOURCE_EXHAUSTED, f"more than {LIMIT} bytes"):
        READS[kind](collection, parts, vector)


def test_omitted_metadata_does_not_count_as_response_bytes(collection: Collection) -> None:
    new = [NewRecord(each, "short", {"long": LONG}) for each in IDS]
    collection.upsert(new, MATRIX)
    for read in (READS["get"], READS["search"]):
        with refused(Code.RESOURCE_EXHAUSTED):
            read(collection, NO_TEXT, False)
        found = read(collection, NO_METADATA, False)
        assert [record.text for record in found] == ["short"] * COUNT


def test_a_page_without_texts_has_more_records(collection: Collection) -> None:
    whole, token = collection.page(COUNT, "")
    assert len(whole) < COUNT
    assert token
    found, token = collection.page(COUNT, "", parts=NO_TEXT)
    assert [record.id for record in found] == IDS
    assert not token
    assert not any(record.text for record in found)


@pytest.mark.parametrize("kind", ["search of one hit each", "words"])
def test_response_bytes_of_many_queries_are_counted_during_reading(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    read = 0
    plain = StoreReader._read_plain

    def counting(reader: StoreReader, labels: Any) -> dict[int, StoredRecord]:
        nonlocal read
        found = plain(reader, labels)
        read += sum(len(record.text) for record in found.values())
        return found

    monkeypatch.setattr(StoreReader, "_read_plain", counting)
    with refused(Code.RESOURCE_EXHAUSTED):
        READS[kind](collection, RecordParts(), False)
    assert read <= LIMIT + len(LONG) + 10


def test_records_below_the_limit_are_returned_whole(collection: Collection) -> None:
    for parts in (NEITHER, RecordParts()):
        found = collection.get(IDS[:2], parts=parts)
        assert [record.metadata for record in found] == [{"number": 0}, {"number": 1}]
