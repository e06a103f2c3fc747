"""The scheduler: results in order, and no caller ever left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError


def texts(*lengths: int) -> list[TokenIds]:
    return [np.full(length, length, dtype=np.int64) for length in lengths]


class Lengths:
    """Gives each text's number of tokens; fails on a batch with a text of a poisoned length."""

    def __init__(self, poison: int = 0) -> None:
        self.poison = poison

    def run(self, batch: Sequence[TokenIds]) -> Output:
        if any(len(ids) == self.poison for ids in batch):
            raise RuntimeError("secret of the model")
        return np.array([[len(ids)] for ids in batch], dtype=np.float32)


class Gate:
    """Blocks in its first batch until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.seen: list[int] = []

    def run(self, batch: Sequence[TokenIds]) -> Output:
        self.entered.set()
        assert self.open.wait(30)
        self.seen += [len(ids) for ids in batch]
        return np.zeros((len(batch), 1), dtype=np.float32)


Make = Callable[..., Scheduler]


@pytest.fixture
def scheduler() -> Iterator[Make]:
    made: list[Scheduler] = []

    def make(
        workers: int = 2,
        batch_tokens: int = 64,
        max_queue_tokens: int = 100_000,
        on_failure: Callable[[], None] = lambda: None,
    ) -> Scheduler:
        made.append(Scheduler(workers, batch_tokens, max_queue_tokens, on_failure))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def test_results_come_in_the_order_of_the_texts(scheduler: Make) -> None:
    lengths = list(np.random.default_rng(0).integers(1, 60, 300))
    result = await scheduler().run(Lengths(), texts(*lengths))
    assert [int(row[0]) for row in result.rows] == lengths
    assert result.infer_seconds >= 0
    assert result.queue_seconds >= 0


async def test_many_calls_at_once_each_get_their_own(scheduler: Make) -> None:
    busy, runner = scheduler(), Lengths()
    calls = [list(np.random.default_rng(i).integers(1, 60, 1 + i % 7)) for i in range(100)]
    results = await asyncio.gather(*(busy.run(runner, texts(*call)) for call in calls))
    assert [[int(row[0]) for row in result.rows] for result in results] == calls


async def test_a_failing_model_fails_only_the_calls_in_its_batch(scheduler: Make) -> None:
    # One worker and a budget that no two of these texts share: each call is a batch of its own.
    busy, runner = scheduler(workers=1, batch_tokens=20), Lengths(poison=13)
    good, bad, other = (asyncio.create_task(busy.run(runner, texts(length))) for length in (20, 13, 19))
    with pytest.raises(ServiceError) as failed:
        await bad
    assert failed.value.code is Code.INTERNAL
    assert "secret" not in failed.value.message
    assert [int((await each).rows[0][0]) for each in (good, other)] == [20, 19]
    assert [int(row[0]) for row in (await busy.run(runner, texts(5))).rows] == [5]


async def test_overload_is_refused_at_once_with_a_time_to_come_back(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1, max_queue_tokens=100), Gate()
    running = asyncio.create_task(busy.run(gate, texts(50)))
    await asyncio.to_thread(gate.entered.wait, 30)
    waiting = asyncio.create_task(busy.run(gate, texts(90)))
    await asyncio.sleep(0)
    with pytest.raises(ServiceError) as refused:
        await busy.run(gate, texts(11))
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 0
    gate.open.set()
    await asyncio.gather(running, waiting)


async def test_a_call_that_could_never_be_taken_is_told_to_split(scheduler: Make) -> None:
    with pytest.raises(ServiceError, match="split it") as refused:
        await scheduler(max_queue_tokens=100).run(Lengths(), texts(101))
    assert refused.value.code is Code.INVALID_ARGUMENT


async def test_what_a_caller_who_left_still_wanted_is_not_run(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = asyncio.create_task(busy.run(gate, texts(50)))
    await asyncio.to_thread(gate.entered.wait, 30)
    left = asyncio.create_task(busy.run(gate, texts(7)))
    stayed = asyncio.create_task(busy.run(gate, texts(60)))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.open.set()
    await asyncio.gather(running, stayed)
    assert gate.seen == [50, 60]


async def test_closing_fails_what_waits_and_refuses_what_comes(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = asyncio.create_task(busy.run(gate, texts(50)))
    await asyncio.to_thread(gate.entered.wait, 30)
    waiting = asyncio.create_task(busy.run(gate, texts(60)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(busy.close))
    with pytest.raises(ServiceError) as stopped:
        await waiting
    assert stopped.value.code is Code.UNAVAILABLE
    gate.open.set()
    await closing
    await running
    with pytest.raises(ServiceError) as refused:
        await busy.run(gate, texts(1))
    assert refused.value.code is Code.UNAVAILABLE


class Suicide(SystemExit):
    """Ends a worker's thread as nothing should."""


class Deadly:
    """Ends the worker that runs it."""

    def run(self, batch: Sequence[TokenIds]) -> Output:
        raise Suicide


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_last_worker_dies_nobody_hangs_and_somebody_is_told(scheduler: Make) -> None:
    told = threading.Event()
    busy = scheduler(workers=1, batch_tokens=10, on_failure=told.set)
    calls = [asyncio.create_task(busy.run(Deadly(), texts(10))) for _ in range(3)]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
    assert all(isinstance(result, ServiceError) for result in results)
    assert await asyncio.to_thread(told.wait, 30)
    with pytest.raises(ServiceError) as refused:
        await busy.run(Lengths(), texts(1))
    assert refused.value.code is Code.UNAVAILABLE
