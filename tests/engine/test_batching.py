"""The queue: every text is in one batch below the token limit, and no call waits for all of another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.engine.batching import Backlog, Item, Queue, Submission
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from fake_runner import FakeRunner


class Doubler(FakeRunner):
    """A model whose output for a text is the number of its tokens."""

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        return np.array([[len(ids)] for ids in batch], dtype=np.float32)


class Rounding(Doubler):
    """A model of a library that compiles shapes: it rounds lengths up to multiples of 8, and takes 1, 2 or 4n texts."""

    def padded(self, tokens: int) -> int:
        return -(-tokens // 8) * 8

    def rows(self, texts: int) -> int:
        return texts // 4 * 4 or min(texts, 2)


def submission(runner: Doubler, lengths: Sequence[int], caller: str = "", lane: Lane = Lane.INTERACTIVE) -> Submission:
    texts = [np.zeros(length, dtype=np.int64) for length in lengths]
    return Submission(runner, texts, Caller(caller, lane), Mock(spec=asyncio.Future))


def padded(batch: list[Item]) -> int:
    return batch[0].submission.runner.padded(max(item.length for item in batch)) * len(batch)


lengths = st.lists(st.integers(1, 600), min_size=1, max_size=40)


@given(calls=st.lists(st.tuples(st.booleans(), lengths), min_size=1, max_size=8), budget=st.integers(1, 1024))
def test_every_text_is_in_one_batch_and_every_batch_keeps_the_token_limit(
    calls: list[tuple[bool, list[int]]], budget: int
) -> None:
    models = {True: Doubler(), False: Rounding()}
    queue = Queue(budget)
    submissions = [submission(models[which], call) for which, call in calls]
    for each in submissions:
        queue.add(each)
    assert queue.tokens == sum(each.tokens for each in submissions)

    taken: list[Item] = []
    while queue:
        batch = queue.take()
        assert batch
        (runner,) = {item.submission.runner for item in batch}
        assert runner.rows(len(batch)) == len(batch)
        assert len(batch) == 1 or padded(batch) <= budget
        taken += batch

    assert sorted((id(item.submission), item.row) for item in taken) == sorted(
        (id(each), row) for each in submissions for row in range(len(each.texts))
    )
    assert queue.tokens == 0


@given(lengths=lengths, budget=st.integers(1, 1024))
def test_the_oldest_text_is_in_the_next_batch_although_a_batch_shrinks(lengths: list[int], budget: int) -> None:
    queue, oldest = Queue(budget), 0
    queue.add(submission(Rounding(), lengths))
    left = set(range(len(lengths)))
    while queue:
        oldest = min(left)
        rows = {item.row for item in queue.take()}
        assert oldest in rows
        left -= rows
    assert not left


@given(first=lengths, second=lengths, budget=st.integers(1, 1024))
def test_calls_that_are_added_between_batches_are_served(first: list[int], second: list[int], budget: int) -> None:
    runner = Doubler()
    queue = Queue(budget)
    queue.add(submission(runner, first))
    count = len(queue.take())
    queue.add(submission(runner, second))
    while queue:
        count += len(queue.take())
    assert count == len(first) + len(second)


def test_a_short_call_does_not_wait_for_all_texts_of_another_caller() -> None:
    runner = Doubler()
    queue = Queue(512)
    queue.add(submission(runner, [200] * 5000, "greedy"))
    short = submission(runner, [8], "modest")
    queue.take()
    queue.add(short)
    batches = [queue.take(), queue.take()]
    assert any(item.submission is short for batch in batches for item in batch)


def test_texts_of_equal_length_share_a_batch() -> None:
    runner = Doubler()
    queue = Queue(512)
    queue.add(submission(runner, [10, 250] * 20))
    while queue:
        batch = queue.take()
        assert len({item.length for item in batch}) == 1


def test_drain_returns_the_waiting_calls() -> None:
    runner = Doubler()
    queue = Queue(16)
    calls = [submission(runner, [10, 10]), submission(runner, [10])]
    for each in calls:
        queue.add(each)
    queue.take()
    assert queue.drain() == set(calls)
    assert not queue
    assert queue.tokens == 0


@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_call_is_discarded_also_after_the_batch_limit_has_changed(tokens: int) -> None:
    backlog, runner = Backlog(256, bulk_seconds=5), Doubler()
    gone, stays = submission(runner, [8] * 70), submission(Doubler(), [8] * 10)
    for each in (gone, stays):
        backlog.add(each)
    runner.batch_tokens = tokens
    backlog.discard(gone)
    assert backlog.tokens == 80
    assert backlog.drain() == {stays}


def test_the_size_of_a_batch_is_that_of_its_runner() -> None:
    queue, runners = Queue(16), [Doubler(), Doubler()]
    runners[1].batch_tokens = 40
    for runner in runners:
        queue.add(submission(runner, [4] * 12, str(id(runner))))
    assert [len(queue.take()) for _ in runners] == [4, 10]


def test_callers_take_turns_regardless_of_their_number_of_calls() -> None:
    runner = Doubler()
    queue = Queue(10)
    greedy = [submission(runner, [10], "greedy") for _ in range(50)]
    for each in greedy:
        queue.add(each)
    queue.take()
    modest = [submission(runner, [10], "modest") for _ in range(3)]
    for each in modest:
        queue.add(each)
    first = [queue.take()[0].submission for _ in range(7)]
    assert sum(each in modest for each in first) == 3


def test_interactive_calls_run_first_and_bulk_calls_wait_a_limited_time() -> None:
    runner = Doubler()
    patient, impatient = Backlog(16, bulk_seconds=1e9), Backlog(16, bulk_seconds=0)
    for backlog in (patient, impatient):
        backlog.add(submission(runner, [8], lane=Lane.BULK))
        backlog.add(submission(runner, [8]))
    assert patient.next_lane() is Lane.INTERACTIVE
    assert impatient.next_lane() is Lane.BULK
    assert [item.submission.caller.lane for item in patient.take(patient.next_lane())] == [Lane.INTERACTIVE]
    assert patient.next_lane() is Lane.BULK


def test_a_large_interactive_call_runs_in_the_bulk_lane() -> None:
    runner, backlog = Doubler(), Backlog(16, bulk_seconds=1)
    large, small = submission(runner, [8] * 5), submission(runner, [8] * 4)
    backlog.add(large)
    backlog.add(small)
    assert backlog.waits(Lane.BULK)
    assert backlog.tokens == 72
    assert backlog.ahead(8, Caller("other")) == 8
    assert backlog.ahead(8, Caller()) == 32
    assert backlog.ahead(40, Caller()) == 72
    assert {item.submission for item in backlog.take(backlog.next_lane())} == {small}
    assert backlog.drain() == {large, small}


def test_a_callers_calls_are_served_in_their_order() -> None:
    runner, queue = Doubler(), Queue(10)
    calls = [submission(runner, [10, 10]) for _ in range(3)]
    for each in calls:
        queue.add(each)
    assert [queue.take()[0].submission for _ in range(6)] == [each for each in calls for _ in range(2)]
