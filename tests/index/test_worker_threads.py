"""Concurrent parts of a search: each runs once on any thread, and all have ended when the search ends."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import Distance
from emberpc.server.index.graph import hnsw
from emberpc.server.index.graph.hnsw import GraphError
from emberpc.server.index.graph.persistent_graph import PersistentGraph
from emberpc.server.index.graph.worker_threads import WorkerThreads


@pytest.mark.parametrize("maximum", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_each_part_runs_once_and_results_are_in_order(maximum: int, parts: int) -> None:
    helpers: WorkerThreads[int, int] = WorkerThreads(maximum)
    done: list[int] = []

    def work(part: int) -> int:
        done.append(part)
        return part * part

    assert helpers.each(work, range(parts)) == [part * part for part in range(parts)]
    assert sorted(done) == list(range(parts))


def test_a_call_does_not_wait_for_a_busy_helper_thread() -> None:
    helpers: WorkerThreads[int, int] = WorkerThreads(1)
    begun, free = threading.Event(), threading.Event()

    def hold(part: int) -> int:
        if part:
            begun.set()
            free.wait(300)
        else:
            begun.wait(300)
        return part

    other = threading.Thread(target=helpers.each, args=(hold, [0, 1]))
    other.start()
    assert begun.wait(300)
    assert helpers.each(lambda part: part, [1, 2, 3]) == [1, 2, 3]
    free.set()
    other.join()


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_is_raised_after_all_parts_have_ended(wrong: int) -> None:
    helpers: WorkerThreads[int, int] = WorkerThreads(1)
    begun, over = threading.Event(), threading.Event()

    def work(part: int) -> int:
        if part == 0:
            begun.wait(300)  # the helper thread runs the other part
        else:
            begun.set()
        if part == wrong:
            raise ValueError(str(part))
        if part == 1:
            over.set()
        return part

    with pytest.raises(ValueError, match=str(wrong)):
        helpers.each(work, [0, 1])
    assert over.is_set() is (wrong == 0)


def test_the_caller_runs_all_parts_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert WorkerThreads[int, int](2).each(lambda part: part + 1, [1, 2, 3]) == [2, 3, 4]


def test_queries_on_several_threads_find_the_same_hits_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hnsw, "_helpers", WorkerThreads(2))
    spec = CollectionSpec("c", 16)
    vectors = prepare(np.random.default_rng(0).standard_normal((600, 16), dtype=np.float32), Distance.COSINE)
    graph = PersistentGraph(spec)
    graph.add(np.arange(600, dtype=np.int64), vectors)
    graph.set_ef(60)
    labels, scores = graph.search(vectors[:50], 5)
    alone = [graph.search(vectors[i : i + 1], 5) for i in range(50)]
    assert np.array_equal(labels, np.concatenate([found for found, _ in alone]))
    assert np.array_equal(scores, np.concatenate([found for _, found in alone]))
    with pytest.raises(GraphError):
        graph.search(vectors[:50], 400)
