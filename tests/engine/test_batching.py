"""The backlog: every text goes out once, within the budget, and no call waits behind another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.engine.batching import Backlog, Item, Job
from emberpc.server.engine.session import Output
from emberpc.server.engine.tokenizing import TokenIds


class Doubler:
    """A model that gives each text's number of tokens."""

    def run(self, batch: Sequence[TokenIds]) -> Output:
        return np.array([[len(ids)] for ids in batch], dtype=np.float32)


def job(runner: Doubler, lengths: Sequence[int]) -> Job:
    return Job(runner, [np.zeros(length, dtype=np.int64) for length in lengths])


def padded(batch: list[Item]) -> int:
    return max(item.length for item in batch) * len(batch)


lengths = st.lists(st.integers(1, 600), min_size=1, max_size=40)


@given(calls=st.lists(st.tuples(st.booleans(), lengths), min_size=1, max_size=8), budget=st.integers(1, 1024))
def test_every_text_goes_out_once_and_every_batch_keeps_to_the_budget(
    calls: list[tuple[bool, list[int]]], budget: int
) -> None:
    models = {True: Doubler(), False: Doubler()}
    backlog = Backlog(budget)
    jobs = [job(models[which], call) for which, call in calls]
    for each in jobs:
        backlog.add(each)
    assert backlog.tokens == sum(each.tokens for each in jobs)

    taken: list[Item] = []
    while backlog:
        batch = backlog.take()
        assert batch
        assert len({id(item.job.runner) for item in batch}) == 1
        assert len(batch) == 1 or padded(batch) <= budget
        taken += batch

    assert sorted((id(item.job), item.row) for item in taken) == sorted(
        (id(each), row) for each in jobs for row in range(len(each.texts))
    )
    assert backlog.tokens == 0


@given(first=lengths, second=lengths, budget=st.integers(1, 1024))
def test_calls_that_come_while_others_are_served_are_served_too(
    first: list[int], second: list[int], budget: int
) -> None:
    runner = Doubler()
    backlog = Backlog(budget)
    backlog.add(job(runner, first))
    count = len(backlog.take())
    backlog.add(job(runner, second))
    while backlog:
        count += len(backlog.take())
    assert count == len(first) + len(second)


def test_a_call_of_one_text_does_not_wait_behind_a_call_of_thousands() -> None:
    runner = Doubler()
    backlog = Backlog(512)
    backlog.add(job(runner, [200] * 5000))
    short = job(runner, [8])
    backlog.take()
    backlog.add(short)
    batches = [backlog.take(), backlog.take()]
    assert any(item.job is short for batch in batches for item in batch)


def test_texts_of_like_length_go_together() -> None:
    runner = Doubler()
    backlog = Backlog(512)
    backlog.add(job(runner, [10, 250] * 20))
    while backlog:
        batch = backlog.take()
        assert len({item.length for item in batch}) == 1


def test_draining_gives_the_calls_that_waited() -> None:
    runner = Doubler()
    backlog = Backlog(16)
    calls = [job(runner, [10, 10]), job(runner, [10])]
    for each in calls:
        backlog.add(each)
    backlog.take()
    assert backlog.drain() == set(calls)
    assert not backlog
    assert backlog.tokens == 0
