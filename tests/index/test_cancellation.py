"""A cancelled call of the index stops within a few steps, and leaves no partial changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from math import inf
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.cancellation import Cancellation, cancelled, cancelled_when
from emberpc.server.collections import CollectionSpec
from emberpc.server.collections.filters import AnyOf, Comparison, Filter, Operator, Prefix
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs import clusters
from emberpc.server.index.jobs.clusters import k_means
from emberpc.server.index.storage import database
from index.support import numbered, refused
from index_helpers import DIMENSIONS, vectors

COUNT = 300
MATRIX = vectors(COUNT)
#: Checks that may follow the one at which a call must stop: in the handler of SQLite, in a loop of emberpc, and in the
#: translation of the error.
FEW = 10


class Looks:
    """Counts the checks for cancellation of a call; after `wanted` checks, the call is cancelled."""

    def __init__(self, wanted: float = inf) -> None:
        self.count, self.wanted = 0, wanted

    def __call__(self) -> bool:
        self.count += 1
        return self.count > self.wanted


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collection]:
    """A collection whose connections check for cancellation every few steps, so that little work has many checks."""
    monkeypatch.setattr(database, "STEPS_BETWEEN_LOOKS", 200)
    with closing(Index(tmp_path, buffer_limit=50)) as index:
        made = index.create(CollectionSpec("c", DIMENSIONS))
        made.upsert(numbered(COUNT), MATRIX)
        made.maintain()
        yield made


_numbers = count()


def all_records() -> Filter:
    """Return a filter that every record meets by the last of many prefixes; a new one each time, as some are cached."""
    unmet = (f"{next(_numbers)}-{i}" for i in range(20))
    return AnyOf((*(Prefix("id", each) for each in unmet), Prefix("id", "r0")))


CALLS: dict[str, Callable[[Collection], object]] = {
    "count": lambda c: c.count(all_records()),
    "page": lambda c: c.page(1000, "", condition=all_records()),
    "get": lambda c: c.get([f"r{i:05}" for i in range(COUNT)] * 5, with_vectors=True),
    "search with a filter": lambda c: c.search(MATRIX[:1], 5, conditions=[all_records()]),
    "exact search": lambda c: c.search(MATRIX[:1], 5, min_recall=1),
    "search of many": lambda c: c.search(MATRIX, 5, ef=400),
    "lexical search": lambda c: c.search_lexical(["text of r00001"] * 20, [5] * 20),
    "hybrid search": lambda c: c.search_hybrid(MATRIX[:20], ["text of"] * 20, [5] * 20, dense_weight=0.5),
    "mismatches": lambda c: c.mismatches(Comparison("id", Operator.GREATER, 1)),
    "verify": lambda c: list(c.verify(full=True)),
    "duplicates": lambda c: c.duplicates(0.5, lambda: False),
    "clusters": lambda c: c.clusters(3, 2, lambda: False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_stops_within_a_few_checks_after_its_cancellation(collection: Collection, name: str) -> None:
    work = CALLS[name]
    work(collection)
    whole = Looks()
    with cancelled_when(whole):
        work(collection)
    assert whole.count > 1, "the call never looks"
    for wanted in {0, 1, whole.count // 2}:
        looks = Looks(wanted)
        with refused(Code.DEADLINE_EXCEEDED, "stopped"), cancelled_when(looks):
            work(collection)
        assert looks.count <= wanted + FEW
    # The connection, the snapshot and the caches are usable as before.
    work(collection)
    assert collection.count(all_records()) == COUNT
    assert len(collection.search(MATRIX[:1], COUNT, conditions=[all_records()])[0].hits) == COUNT


def test_a_cancelled_delete_deletes_nothing_and_a_committed_one_also_updates_memory(collection: Collection) -> None:
    whole = Looks()
    with cancelled_when(whole):
        assert collection.delete_matching(Prefix("id", "r0000")).deleted == 10
    left = COUNT - 10
    for wanted in range(whole.count):
        looks = Looks(wanted)
        with refused(Code.DEADLINE_EXCEEDED), cancelled_when(looks):
            collection.delete_matching(all_records())
        assert collection.count() == left
    assert len(collection.search(MATRIX[:1], COUNT)[0].hits) == left
    assert [step.problems for step in collection.verify(full=True) if step.problems] == []
    assert collection.delete_matching(all_records()).deleted == left
    assert collection.search(MATRIX[:1], 1)[0].hits == []


def test_clustering_can_be_cancelled_while_first_centres_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    squared = clusters._squared_distances

    def counted(*arguments: np.ndarray) -> np.ndarray:
        drawn.append(1)
        return squared(*arguments)

    monkeypatch.setattr(clusters, "_squared_distances", counted)
    k_means(MATRIX, 100, directions=False)
    whole = len(drawn)
    drawn.clear()
    k_means(MATRIX, 100, directions=False, stop=lambda: len(drawn) > 20)
    assert len(drawn) < 40 < whole


def test_clustering_can_be_cancelled_while_vectors_are_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ASSIGNED_AT_ONCE", 100)
    looks = Looks(10)
    k_means(MATRIX, 8, directions=True, stop=looks)
    assert looks.count == 11


def test_clusters_do_not_depend_on_the_number_of_vectors_assigned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = k_means(MATRIX, 8, directions=False)
    monkeypatch.setattr(clusters, "_ASSIGNED_AT_ONCE", 7)
    assert np.allclose(k_means(MATRIX, 8, directions=False), at_once)


def test_a_call_after_its_deadline_does_not_begin() -> None:
    with refused(Code.DEADLINE_EXCEEDED), cancelled_when(Cancellation(seconds=0)):
        pytest.fail("it began")


def test_a_cancellation_applies_only_to_its_thread() -> None:
    stop = Cancellation()
    seen = []
    with cancelled_when(stop):
        stop.cancel()
        other = threading.Thread(target=lambda: seen.append(cancelled()))
        other.start()
        other.join()
        assert cancelled()
    assert seen == [False]
    assert not cancelled()
