"""The memory of a response is little more than its bytes, also for records with deeply nested metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionBackend, CollectionSpec, NewRecord
from emberpc.server.index import Index
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services import record_responses
from emberpc.server.services.index_messages import RequestedParts
from emberpc.server.services.search_response import response_bytes
from emberpc.v1 import index_pb2 as pb
from index_helpers import DIMENSIONS, vectors

LIMITS = Limits(1000, 2**20, 2**24, 2**25, 2**20)
PARTS = RequestedParts(())
COUNT = 40
CALLS = 8
VECTORS = vectors(COUNT)
IDS = [str(i) for i in range(COUNT)]
#: Metadata of 34 kB if serialized; as Python objects it takes 0.5 MB, as messages 0.9 MB.
METADATA = {"a": [{"k": i} for i in range(1700)]}

READS: dict[str, Callable[[CollectionBackend], bytes]] = {
    "BatchGetRecords": lambda collection: record_responses.batch_get(collection, IDS, PARTS, LIMITS),
    "ListRecords": lambda collection: record_responses.page(collection, COUNT, "", None, PARTS, LIMITS),
    "Search": lambda collection: response_bytes(collection.search(VECTORS[:1], COUNT), PARTS, pb.SearchResponse()),
}


def resident(key: str) -> int:
    """Return a figure of the memory of this process, in MiB."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[CollectionBackend]:
    with closing(Index(tmp_path, record_cache_bytes=0)) as index:
        opened = index.create(CollectionSpec("c", DIMENSIONS))
        opened.upsert([NewRecord(each, metadata=METADATA) for each in IDS], VECTORS)
        yield opened


@pytest.mark.parametrize(
    "rpc", [pytest.param(each, marks=[pytest.mark.slow] if each == "BatchGetRecords" else []) for each in READS]
)
def test_responses_with_nested_metadata_use_little_memory(collection: CollectionBackend, rpc: str) -> None:
    """With records held as Python objects and messages, eight concurrent responses took 140 to 275 MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    with ThreadPoolExecutor(CALLS) as pool:
        responses = list(pool.map(READS[rpc], [collection] * CALLS))
    assert resident("VmHWM") - before < 75
    assert all(len(response) > 30_000 * COUNT for response in responses)
