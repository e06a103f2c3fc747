"""Parts of a search side by side: all are done, by whomever, and nobody is at one when the search is over."""

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


@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_each_part_is_done_once_and_in_its_place(most: int, parts: int) -> None:
    helpers: WorkerThreads[int, int] = WorkerThreads(most)
    done: list[int] = []

    def work(part: int) -> int:
        done.append(part)
        return part * part

    assert helpers.each(work, range(parts)) == [part * part for part in range(parts)]
    assert sorted(done) == list(range(parts))


def test_a_helper_that_is_busy_is_not_waited_for() -> None:
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
def test_what_fails_is_told_when_nobody_is_at_it_any_more(wrong: int) -> None:
    helpers: WorkerThreads[int, int] = WorkerThreads(1)
    begun, over = threading.Event(), threading.Event()

    def work(part: int) -> int:
        if part == 0:
            begun.wait(300)  # the helper has the other part
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


def test_without_threads_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert WorkerThreads[int, int](2).each(lambda part: part + 1, [1, 2, 3]) == [2, 3, 4]


def test_many_queries_find_what_each_finds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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
