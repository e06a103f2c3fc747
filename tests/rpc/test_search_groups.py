"""Searches that run together have the outcomes that each has alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, SearchOutcome
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.pipelines import search_groups
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.search_groups import SearchGroups, VectorSearch
from index_helpers import DIMENSIONS, records, vectors
from waiting import Changes, until_idle

MATRIX = vectors(300)


class Watched:
    """A collection whose first search waits, so that other searches arrive meanwhile."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        self.changes = Changes()
        #: Seconds that each search takes, and those that all searches took, by a clock of the test.
        self.seconds = self.passed = 0.0
        #: Set when two searches run at once; with `pairs`, all but the first wait for that.
        self.two, self.pairs = threading.Event(), False
        self.running = self.maximum = 0

    def search(self, queries: Any, *arguments: Any, **options: Any) -> list[SearchOutcome]:
        self.sizes.append(len(queries))
        self.changes.notify()
        self.running += 1
        self.maximum = max(self.maximum, self.running)
        self.entered.set()
        assert self.go_on.wait(300)
        if self.running == 2:
            self.two.set()
        if self.pairs and len(self.sizes) > 1:
            assert self.two.wait(300)
        self.passed += self.seconds
        self.running -= 1
        return self._collection.search(queries, *arguments, **options)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Any]:
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        collection.upsert(records(*map(str, range(300))), MATRIX)
        yield Watched(collection)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[SearchGroups]:
    # Otherwise a collection that waits for the test would be treated as a slow one.
    monkeypatch.setattr(search_groups, "_GROUP_SECONDS", 1000.0)
    with ThreadPoolExecutor(4) as pool:
        yield SearchGroups(IndexPool(pool, heavy=2), at_once=1)


def one(collection: Any, row: int, top_k: int = 3, **options: Any) -> VectorSearch:
    return VectorSearch(collection, MATRIX[row : row + 1], [top_k], [None], **options)


async def first(groups: SearchGroups, watched: Any) -> asyncio.Task[list[SearchOutcome]]:
    """Begin a search that waits for `go_on`."""
    running = asyncio.create_task(groups.search(one(watched, 0)))
    await asyncio.to_thread(watched.entered.wait, 300)
    return running


def ids(outcomes: list[SearchOutcome]) -> list[list[str]]:
    return [[record.id for record, _ in outcome.hits] for outcome in outcomes]


async def test_waiting_searches_run_together_and_get_their_own_outcomes(watched: Any, groups: SearchGroups) -> None:
    running = await first(groups, watched)
    searches = [one(watched, row) for row in range(1, 40)]
    searches.append(VectorSearch(watched, MATRIX[40:45], [3] * 5, ["40", *[None] * 4]))
    waiting = [asyncio.create_task(groups.search(search)) for search in searches]
    await until_idle()
    watched.go_on.set()
    found = [await each for each in (running, *waiting)]
    assert watched.sizes == [1, 44]
    alone = [ids([outcome]) for outcome in watched._collection.search(MATRIX[:40], 3)]
    assert [ids(each) for each in found[:40]] == alone
    assert [hits[0] for hits in ids(found[40])][1:] == ["41", "42", "43", "44"]
    assert "40" not in ids(found[40])[0]


async def test_a_group_of_searches_has_at_most_64_queries(watched: Any, groups: SearchGroups) -> None:
    running = await first(groups, watched)
    waiting = [asyncio.create_task(groups.search(one(watched, row))) for row in range(1, 200)]
    await until_idle()
    watched.go_on.set()
    await asyncio.gather(running, *waiting)
    assert watched.sizes == [1, 64, 64, 64, 7]


async def test_slow_searches_run_concurrently_in_separate_groups(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.go_on.set()
    monkeypatch.setattr(search_groups, "perf_counter", lambda: watched.passed)
    with ThreadPoolExecutor(4) as pool:
        groups = SearchGroups(IndexPool(pool, heavy=2), at_once=2)
        watched.seconds, watched.pairs = 0.02, True
        await asyncio.gather(*(groups.search(one(watched, row)) for row in range(6)))
    assert watched.sizes == [1] * 6
    assert watched.maximum == 2


async def test_searches_with_different_options_do_not_wait_for_each_other(watched: Any, groups: SearchGroups) -> None:
    running = await first(groups, watched)
    others = [one(watched, 1, top_k=5), one(watched, 2, ef=300), one(watched, 3, with_vectors=True)]
    waiting = [asyncio.create_task(groups.search(search)) for search in others]
    await watched.changes.until(lambda: len(watched.sizes) == 4)
    watched.go_on.set()
    await asyncio.gather(running, *waiting)
    assert watched.sizes == [1, 1, 1, 1]


async def test_an_invalid_search_fails_alone(watched: Any, groups: SearchGroups) -> None:
    running = await first(groups, watched)
    wrong = VectorSearch(watched, np.full((1, DIMENSIONS), np.nan, dtype=np.float32), [3], [None])
    waiting = [asyncio.create_task(groups.search(search)) for search in (one(watched, 1), wrong, one(watched, 2))]
    await until_idle()
    watched.go_on.set()
    good, failed, other, _ = await asyncio.gather(*waiting, running, return_exceptions=True)
    assert isinstance(failed, ServiceError)
    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.violations[0].field == "queries[0].vector"
    assert isinstance(good, list)
    assert isinstance(other, list)
    assert ids(good)[0][0] == "1"
    assert ids(other)[0][0] == "2"


async def test_a_cancelled_waiting_search_does_not_run(watched: Any, groups: SearchGroups) -> None:
    running = await first(groups, watched)
    gone = asyncio.create_task(groups.search(one(watched, 1)))
    await until_idle()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    watched.go_on.set()
    await running
    assert ids(await groups.search(one(watched, 2)))[0][0] == "2"
    assert watched.sizes == [1, 1]
