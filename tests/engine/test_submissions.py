"""Submissions store the lane and the earliest start of their batches; the batches measure the rate of a worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import pytest

from emberpc.server.engine.batching import Backlog, Item, Submission
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from fake_runner import FakeRunner

Make = Callable[[int], Scheduler]


def texts(*lengths: int) -> list[TokenIds]:
    return [np.full(length, length, dtype=np.int64) for length in lengths]


class Gate(FakeRunner):
    """A model that blocks in each batch until the gate is opened."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        self.entered.set()
        assert self.open.wait(300)
        return np.zeros((len(batch), 1), dtype=np.float32)


@pytest.fixture
def make() -> Iterator[Make]:
    """Return a function that makes a scheduler with one worker and a limit of tokens of a batch."""
    with ExitStack() as made:

        def new(batch_tokens: int) -> Scheduler:
            scheduler = Scheduler(1, batch_tokens, 100_000)
            made.callback(scheduler.close)
            return scheduler

        yield new


async def test_queue_seconds_end_at_the_earliest_batch_of_a_call(make: Make) -> None:
    made = make(64)
    submission = Submission(Gate(), texts(3, 4), Caller(), asyncio.get_running_loop().create_future())
    first, second = (Item(length, 0, submission, row) for row, length in enumerate((3, 4)))
    at = submission.submitted
    made._finish([second], np.zeros((1, 1), dtype=np.float32), at + 2, at + 3, 1)
    made._finish([first], np.zeros((1, 1), dtype=np.float32), at + 1, at + 4, 1)
    result = await asyncio.wait_for(submission.future, 300)
    assert result.queue_seconds == pytest.approx(1)
    assert result.infer_seconds == pytest.approx(3)


async def test_a_batch_runs_in_the_lane_in_which_it_waited(make: Make) -> None:
    """The limit of a batch may have changed since. While a bulk batch runs, the express worker serves short calls."""
    made, gate = make(1000), Gate()
    backlog = Backlog(8, 0.25)
    backlog.add(Submission(gate, texts(8, 8, 8), Caller(), asyncio.get_running_loop().create_future()))
    batch = backlog.take(Lane.BULK)
    running = asyncio.create_task(asyncio.to_thread(made._run_batch, batch))
    await asyncio.to_thread(gate.entered.wait, 300)
    at_bulk = made._at_bulk
    gate.open.set()
    await running
    assert at_bulk == 1


async def test_the_rate_is_measured_with_full_batches_of_a_model_with_small_batches(make: Make) -> None:
    made, runner = make(512), Gate()
    runner.batch_tokens = 64
    runner.open.set()
    for _ in range(3):
        await asyncio.wait_for(made.run(runner, texts(*[20] * 6)), 300)  # two batches of three texts each
    assert made._rates.measured
