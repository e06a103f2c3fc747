"""Probes measure the recall of live searches correctly and at a small cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Collection, Index
from emberpc.server.index.search.probe import Probe
from index.support import gaussian, numbered

COUNT, WIDTH = 600, 32


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path, buffer_limit=8, probe_share=1)
    yield opened
    opened.close()


@pytest.fixture
def collection(index: Index, monkeypatch: pytest.MonkeyPatch) -> Collection:
    """A collection with a poor graph, which only the test maintains."""
    made = index.create(CollectionSpec("c", WIDTH, m=4, ef_construction=16))
    monkeypatch.setattr(made, "_wake", lambda: None)
    made.upsert(numbered(COUNT), gaussian(COUNT, WIDTH))
    made.maintain()
    return made


def test_the_probed_recall_equals_that_of_the_searches(collection: Collection) -> None:
    true = []
    for row in range(30):
        collection._probe._rest_until = 0
        query = gaussian(1, WIDTH, seed=100 + row)
        found = collection.search(query, 10, ef=11)[0].hits
        best = collection.search(query, 10, min_recall=1)[0].hits
        true.append(len({record.id for record, _ in found} & {record.id for record, _ in best}) / 10)
        collection.maintain()
    assert min(true) < 1, "the graph is too good to show anything"
    probed = collection.probed
    assert probed.count == 30
    assert probed.recall == pytest.approx(sum(true) / 30)


def test_writes_after_a_search_do_not_lower_its_probed_recall(collection: Collection) -> None:
    for seed in range(100):
        collection._probe._waiting.clear()
        query = gaussian(1, WIDTH, seed=seed)
        hits = collection.search(query, 10, ef=400)[0].hits
        if [record.id for record, _ in hits] == [
            record.id for record, _ in collection.search(query, 10, min_recall=1)[0].hits
        ]:
            break
    collection.upsert(numbered(3, first=900), query.repeat(3, axis=0))
    collection.upsert([*numbered(1, first=int(hits[1][0].id[1:]))], -query)
    collection.delete([hits[0][0].id, hits[4][0].id])
    collection.maintain()
    assert (collection.probed.count, collection.probed.recall) == (1, 1.0)


def test_probes_pause_after_a_run_and_keep_a_limited_number_of_searches(collection: Collection) -> None:
    for row in range(50):
        collection.search(gaussian(1, WIDTH, seed=row), 10)
    assert 0 < len(collection._probe._waiting) <= 8
    collection.maintain()
    done = collection.probed.count
    assert 0 < done <= 8
    collection.search(gaussian(1, WIDTH), 10)
    collection.maintain()
    assert collection.probed.count == done, "it did not rest"


def test_searches_are_not_probed_without_a_probe_share_or_if_they_are_exact(
    collection: Collection, index: Index
) -> None:
    assert not any(Probe(0).should_sample() for _ in range(1000))
    collection.search(gaussian(1, WIDTH), 10, min_recall=1)
    collection.maintain()
    assert collection.probed.count == 0
    assert math.isnan(collection.probed.recall)
    assert index.probed() == {}
