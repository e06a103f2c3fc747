"""Hostile vectors and numbers are refused or answered correctly, and leak no memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from emberpc.server.collections import MAX_TOP_K, CollectionSpec, Distance
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from index.support import gaussian, numbered, refused

WIDTH = 8
BAD = {
    "too short": np.ones((1, WIDTH - 1), dtype=np.float32),
    "too long": np.ones((1, WIDTH + 1), dtype=np.float32),
    "NaN": np.full((1, WIDTH), np.nan, dtype=np.float32),
    "infinity": np.full((1, WIDTH), np.inf, dtype=np.float32),
    "zero": np.zeros((1, WIDTH), dtype=np.float32),
    "one axis": np.ones(WIDTH, dtype=np.float32),
}


@pytest.fixture(params=[0, 5, 300], ids=["empty", "buffer", "graph"])
def collection(index: Index, request: pytest.FixtureRequest) -> Collection:
    made = index.create(CollectionSpec("c", WIDTH))
    if request.param:
        made.upsert(numbered(request.param), gaussian(request.param, WIDTH))
        made.maintain()
    return made


@pytest.mark.parametrize("kind", list(BAD))
def test_an_invalid_query_vector_is_refused_in_every_kind_of_search(collection: Collection, kind: str) -> None:
    for ef, min_recall in ((0, 0), (1, 0), (0, 1)):
        with refused(Code.INVALID_ARGUMENT):
            collection.search(BAD[kind], 10, ef=ef, min_recall=min_recall)


@pytest.mark.parametrize("top_k", [0, -1, MAX_TOP_K + 1, 10**6, 2**31 - 1])
def test_a_top_k_outside_its_limits_is_refused(collection: Collection, top_k: int) -> None:
    with refused(Code.INVALID_ARGUMENT, "1 to 10000"):
        collection.search(gaussian(1, WIDTH), top_k)


@pytest.mark.parametrize("top_k", [1, 299, 300, 301, MAX_TOP_K])
def test_a_top_k_above_the_number_of_records_returns_all_records(collection: Collection, top_k: int) -> None:
    count = collection.count()
    for ef, min_recall in ((0, 0), (1, 0), (0, 0.5), (0, 1)):
        (outcome,) = collection.search(gaussian(1, WIDTH), top_k, ef=ef, min_recall=min_recall)
        assert len({record.id for record, _ in outcome.hits}) == min(count, top_k)
        assert bool(outcome.plan.shortfall_reason) == (count < top_k)


def test_the_zero_vector_is_accepted_except_with_cosine(index: Index) -> None:
    for distance in (Distance.DOT_PRODUCT, Distance.EUCLIDEAN):
        made = index.create(CollectionSpec(distance.value, WIDTH, distance=distance))
        made.upsert(numbered(1), BAD["zero"])
        assert len(made.search(BAD["zero"], 3)[0].hits) == 1


LOOP = f"""
import sys, resource
sys.path[:0] = {sys.path!r}
import tempfile
from pathlib import Path
import numpy as np
from emberpc.server.errors import ServiceError
from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Index
from index.support import gaussian, numbered
from index.test_hostile import BAD

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

with tempfile.TemporaryDirectory() as folder:
    index = Index(Path(folder), buffer_limit=8)
    collection = index.create(CollectionSpec("c", 8))
    collection.upsert(numbered(300), gaussian(300, 8))
    collection.maintain()
    good = gaussian(1, 8)
    calls = [
        *((matrix, 10) for matrix in BAD.values()), (good, 0), (good, 10**6),
        # More than the graph can give: where hnswlib would raise, and leak.
        *([(good, 300)] if int(sys.argv[2]) else []),
    ]
    def run(count):
        for i in range(count):
            matrix, top_k = calls[i % len(calls)]
            try:
                collection.search(matrix, top_k)
            except ServiceError:
                pass
    run(2000)
    before = resident()
    run(int(sys.argv[1]))
    print(resident() - before)
    index.close()
"""


def grown(queries: int, answered: int) -> float:
    """Return by how many MiB a process grows during `queries` invalid queries; with `answered`, some are valid."""
    command = [sys.executable, "-c", LOOP, str(queries), str(answered)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout)


def test_thousands_of_invalid_queries_leak_no_memory() -> None:
    assert grown(4000, 0) < 4


@pytest.mark.slow
def test_two_hundred_thousand_invalid_queries_leak_no_memory() -> None:
    assert grown(200_000, 1) < 16


def test_an_upsert_with_one_invalid_vector_writes_nothing(collection: Collection) -> None:
    before = collection.info().sequence
    matrix = gaussian(3, WIDTH)
    matrix[1, 3] = np.nan
    with pytest.raises(ServiceError) as caught:
        collection.upsert(numbered(3, first=900), matrix)
    assert [violation.field for violation in caught.value.violations] == ["vectors[1]"]
    assert collection.info().sequence == before
