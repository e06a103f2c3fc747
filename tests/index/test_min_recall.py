"""`min_recall` in place of `ef`: each collection measures the ef that reaches a recall."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, Distance, SearchStrategy
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.search import recall as recall_map
from emberpc.server.index.search.recall import RecallMap, RecallPoint
from index.support import gaussian, numbered, refused
from index_helpers import true_scores, vectors

COUNT, WIDTH = 1000, 32


def filled(index: Index, distance: Distance = Distance.COSINE) -> tuple[Collection, np.ndarray]:
    """Create a collection with a poor graph, so that recall depends on ef; return it with its vectors."""
    matrix = gaussian(COUNT, WIDTH)
    collection = index.create(CollectionSpec("c", WIDTH, distance=distance, m=6, ef_construction=40))
    collection.upsert(numbered(COUNT), matrix)
    collection.maintain()
    return collection, matrix


def found(collection: Collection, matrix: np.ndarray, queries: np.ndarray, **options: float) -> float:
    """Return the share of the true 10 nearest records that searches find."""
    right = 0
    for query, outcome in zip(queries, collection.search(queries, 10, **options), strict=True):  # type: ignore[arg-type]  # floats or ints by name
        best = np.argsort(-true_scores(query, matrix, collection.spec.distance))[:10]
        right += len({f"r{i:05}" for i in best} & {record.id for record, _ in outcome.hits})
    return right / (10 * len(queries))


@pytest.mark.parametrize("distance", list(Distance))
def test_min_recall_is_reached_and_a_lower_one_uses_a_lower_ef(index: Index, distance: Distance) -> None:
    collection, matrix = filled(index, distance)
    queries = gaussian(100, WIDTH, seed=1)
    assert found(collection, matrix, queries, ef=11) < 0.9, "the graph is too good to show anything"
    used = []
    for wanted in (0.8, 0.95):
        plan = collection.search(queries[:1], 10, min_recall=wanted)[0].plan
        used.append(plan.ef or COUNT)
        assert found(collection, matrix, queries, min_recall=wanted) >= wanted - 0.02
    assert used[0] < used[1]


def test_a_min_recall_of_1_compares_every_vector(index: Index) -> None:
    collection, matrix = filled(index)
    queries = gaussian(20, WIDTH, seed=1)
    plan = collection.search(queries[:1], 10, min_recall=1)[0].plan
    assert (plan.strategy, plan.compared_count) == (SearchStrategy.EXACT, COUNT)
    assert found(collection, matrix, queries, min_recall=1) == 1


def test_min_recall_without_measurements_compares_every_vector(index: Index) -> None:
    collection = index.create(CollectionSpec("c", 8))
    collection.upsert(numbered(200), gaussian(200, 8))
    collection.maintain()
    assert collection.search(gaussian(1, 8), 3, min_recall=0.9)[0].plan.strategy is SearchStrategy.EXACT
    assert collection.search(gaussian(1, 8), 3)[0].plan.strategy is SearchStrategy.HNSW


def test_recall_measurements_survive_a_restart_and_invalid_files_are_replaced(tmp_path: Path) -> None:
    index = Index(tmp_path, buffer_limit=8)
    filled(index)
    query = gaussian(1, WIDTH, seed=1)
    before = index.get("c").search(query, 10, min_recall=0.9)[0].plan
    assert before.ef
    index.close()
    index = Index(tmp_path, buffer_limit=8)
    assert index.get("c").search(query, 10, min_recall=0.9)[0].plan == before
    index.close()
    (kept,) = tmp_path.rglob("recall.json")
    for content in ("", '{"format": 1, "size": 1, "points": [{"k": "x"}]}'):
        kept.write_text(content)
        index = Index(tmp_path, buffer_limit=8)
        collection = index.get("c")
        collection.maintain()
        assert collection.search(query, 10, min_recall=0.9)[0].plan == before, content
        index.close()


MEASURED = RecallMap(5000, (RecallPoint(10, 25, 0.85), RecallPoint(10, 400, 1.0), RecallPoint(100, 200, 0.99)))


@pytest.mark.parametrize(
    "point",
    [
        {"k": 10, "ef": 25, "recall": 8.85},
        {"k": 10, "ef": 25, "recall": -0.1},
        {"k": 10, "ef": 25, "recall": float("nan")},
        {"k": 10, "ef": 25, "recall": "0.9"},
        {"k": 10, "ef": 25, "recall": True},
        {"k": 0, "ef": 25, "recall": 0.9},
        {"k": -1, "ef": 25, "recall": 0.9},
        {"k": 10, "ef": 0, "recall": 0.9},
        {"k": 10, "ef": -25, "recall": 0.9},
        {"k": 10, "ef": 10**9, "recall": 0.9},
        {"k": 1e999, "ef": 25, "recall": 0.9},
        {"k": 10.5, "ef": 25, "recall": 0.9},
        {"k": 10, "ef": 25},
        [],
        None,
    ],
)
def test_impossible_recall_measurements_are_discarded(
    tmp_path: Path, point: object, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recall.json").write_text(json.dumps({"format": 1, "size": 5000, "points": [point]}))
    assert recall_map.load(tmp_path) is None
    assert "set aside and measured again" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"format": 1}',
        '{"format": 2}',
        '{"format": 1, "size": 1e999, "points": []}',
        '{"format": 1, "size": -1, "points": []}',
        '{"format": 1, "size": true, "points": []}',
        '{"format": 1, "size": 5, "points": 7}',
        '{"format": [], "size": 5}',
        "7",
        "null",
        "[" * 100_000,
    ],
)
def test_a_recall_file_with_invalid_content_is_discarded(tmp_path: Path, content: str) -> None:
    (tmp_path / "recall.json").write_text(content)
    assert recall_map.load(tmp_path) is None


def test_a_flipped_bit_in_a_recall_file_is_found(tmp_path: Path) -> None:
    recall_map.save(MEASURED, tmp_path)
    path = tmp_path / "recall.json"
    data = path.read_bytes()
    assert recall_map.load(tmp_path) == MEASURED
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert recall_map.load(tmp_path) in (None, MEASURED), bytes(flipped)


def test_measurements_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recall_map.save(MEASURED, tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    recall_map.save(replace(MEASURED, size=1), tmp_path)
    assert "not kept" in caplog.text
    assert recall_map.load(tmp_path) == MEASURED
    assert [path.name for path in tmp_path.iterdir()] == ["recall.json"]


def test_a_recall_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    """Older versions wrote no checksum."""
    (tmp_path / "recall.json").write_text(json.dumps({"format": 1, **asdict(MEASURED)}))
    assert recall_map.load(tmp_path) == MEASURED


def test_recall_is_measured_again_after_the_graph_grew_by_half(index: Index) -> None:
    collection, _ = filled(index)
    first = collection._graph_maintenance.ef_chooser._measured
    assert first is not None
    collection.upsert(numbered(500, first=COUNT), gaussian(500, WIDTH, seed=3))
    collection.maintain()
    second = collection._graph_maintenance.ef_chooser._measured
    assert first.size == COUNT
    assert second is not None
    assert second.size == COUNT + 500


def test_the_recall_map_has_a_reserve_and_gives_a_greater_ef_for_a_greater_top_k() -> None:
    measured = RecallMap(
        5000,
        (RecallPoint(10, 25, 0.9), RecallPoint(10, 50, 0.97), RecallPoint(100, 200, 0.99), RecallPoint(10, 100, 0.999)),
    )
    assert measured.ef(10, 0.5) == 25
    assert measured.ef(10, 0.9) == 50  # the true recall may be less than the measured 0.9
    assert measured.ef(11, 0.9) == 200
    assert measured.ef(1000, 0.9) == 2000
    assert measured.ef(10, 0.9999) is None
    assert RecallMap(5000, ()).ef(10, 0.1) is None


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_min_recall_outside_0_to_1_is_refused(collection: Collection, value: float) -> None:
    with refused(Code.INVALID_ARGUMENT, field="min_recall"):
        collection.search(vectors(1), 10, min_recall=value)


def test_ef_together_with_min_recall_is_refused(collection: Collection) -> None:
    with refused(Code.INVALID_ARGUMENT, "one of the two", field="min_recall"):
        collection.search(vectors(1), 10, ef=50, min_recall=0.9)
