"""The scheduler: results have the order of the texts, and every call ends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np
import pytest

from emberpc.server.deadlines import Deadline
from emberpc.server.engine import scheduler as scheduler_module
from emberpc.server.engine.batching import Item, Queue, SubmissionResult
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError
from fake_runner import FakeRunner
from waiting import until_idle


def texts(*lengths: int) -> list[TokenIds]:
    return [np.full(length, length, dtype=np.int64) for length in lengths]


class Lengths(FakeRunner):
    """A model that returns the number of tokens of each text; it fails on a batch with a text of `poison` tokens."""

    def __init__(self, poison: int = 0) -> None:
        self.poison = poison

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        if any(len(ids) == self.poison for ids in batch):
            raise RuntimeError("secret of the model")
        return np.array([[len(ids)] for ids in batch], dtype=np.float32)


class Gate(FakeRunner):
    """A model that blocks in its first batch until the gate is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.seen: list[int] = []

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        self.entered.set()
        assert self.open.wait(300)
        self.seen += [len(ids) for ids in batch]
        return np.zeros((len(batch), 1), dtype=np.float32)


async def hold(scheduler: Scheduler, gate: Gate, length: int) -> asyncio.Task[SubmissionResult]:
    """Return a call of one text, in which a worker is blocked until the gate is opened."""
    running = asyncio.create_task(scheduler.run(gate, texts(length)))
    await asyncio.to_thread(gate.entered.wait, 300)
    return running


class Clock:
    """The clock of a scheduler. It moves on by 1 µs at each look, and as far as the test moves it on."""

    def __init__(self) -> None:
        self.now = perf_counter()

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(scheduler_module, "perf_counter", made)
    return made


Make = Callable[..., Scheduler]


@pytest.fixture
def scheduler() -> Iterator[Make]:
    made: list[Scheduler] = []
    before = set(threading.enumerate())

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
    # A worker that died has its exception reported when its thread ends: in this test, not in the next one.
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("worker-", "express")):
            thread.join(300)


async def test_results_have_the_order_of_the_texts(scheduler: Make) -> None:
    lengths = list(np.random.default_rng(0).integers(1, 60, 300))
    result = await scheduler().run(Lengths(), texts(*lengths))
    assert [int(row[0]) for row in result.rows] == lengths
    assert result.infer_seconds >= 0
    assert result.queue_seconds >= 0


async def test_concurrent_calls_each_get_their_own_results(scheduler: Make) -> None:
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


async def test_a_full_queue_refuses_calls_with_a_retry_delay(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1, max_queue_tokens=100), Gate()
    running = await hold(busy, gate, 50)
    waiting = asyncio.create_task(busy.run(gate, texts(90)))
    await until_idle()
    with pytest.raises(ServiceError) as refused:
        await busy.run(gate, texts(11))
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 0
    gate.open.set()
    await asyncio.gather(running, waiting)


async def test_a_call_larger_than_the_queue_is_refused_as_invalid(scheduler: Make) -> None:
    with pytest.raises(ServiceError, match="split it") as refused:
        await scheduler(max_queue_tokens=100).run(Lengths(), texts(101))
    assert refused.value.code is Code.INVALID_ARGUMENT


async def test_waiting_texts_of_a_cancelled_call_are_not_run(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 50)
    left = asyncio.create_task(busy.run(gate, texts(7)))
    stayed = asyncio.create_task(busy.run(gate, texts(60)))
    await until_idle()
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.open.set()
    await asyncio.gather(running, stayed)
    assert gate.seen == [50, 60]


async def test_close_fails_waiting_calls_and_refuses_new_ones(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 50)
    waiting = asyncio.create_task(busy.run(gate, texts(60)))
    await until_idle()
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


async def test_close_waits_for_a_running_batch_until_its_deadline(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 50)
    assert not busy.close(Deadline(0))
    gate.open.set()
    await running
    assert busy.close(Deadline(300))


async def test_a_failed_batch_of_several_calls_fails_only_the_causing_call(scheduler: Make) -> None:
    busy, gate, runner = scheduler(workers=1), Gate(), Lengths(poison=13)
    running = await hold(busy, gate, 50)
    good, bad, other = (asyncio.create_task(busy.run(runner, texts(length))) for length in (12, 13, 14))
    await until_idle()
    gate.open.set()
    with pytest.raises(ServiceError, match="failed on this call"):
        await bad
    assert [int((await each).rows[0][0]) for each in (good, other)] == [12, 14]
    await running
    assert busy.counts.failed_batches == 2


async def test_a_call_that_is_still_queued_at_its_deadline_is_dropped(scheduler: Make, clock: Clock) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 50)
    late = asyncio.create_task(busy.run(gate, texts(7), Caller(deadline=clock() + 300)))
    await until_idle()
    assert busy.waiting_tokens == 7
    clock.now += 301  # its deadline passes while the only worker is busy
    gate.open.set()
    with pytest.raises(ServiceError) as dropped:
        await late
    assert dropped.value.code is Code.DEADLINE_EXCEEDED
    await running
    assert gate.seen == [50]
    assert busy.counts.expired == 1


class Slow(FakeRunner):
    """A model that takes 0.02 s for a batch, by a clock of the test."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        self._clock.now += 0.02
        return np.zeros((len(batch), 1), dtype=np.float32)


async def test_no_call_is_refused_before_a_full_batch_was_timed(scheduler: Make, clock: Clock) -> None:
    idle = scheduler(workers=1)
    for _ in range(3):
        await idle.run(Slow(clock), texts(2))
    assert len((await idle.run(Lengths(), texts(*[50] * 100), Caller(deadline=clock() + 30))).rows) == 100


async def test_an_accepted_call_is_not_dropped_for_slow_batches(scheduler: Make) -> None:
    """By the rate of the slow batches, the call takes 800 s; by the best rate, 20 s, which is its minimum time."""
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 5)
    accepted = asyncio.create_task(busy.run(Lengths(), texts(*[50] * 160), Caller(deadline=perf_counter() + 300)))
    await until_idle()
    for rate in (400.0, 10.0, 10.0, 10.0, 10.0):
        busy._rates.add(rate)
    gate.open.set()
    assert len((await accepted).rows) == 160
    await running
    assert busy.counts.expired == 0


async def test_an_accepted_call_that_cannot_meet_its_deadline_is_dropped(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 5)
    hopeless = asyncio.create_task(busy.run(Lengths(), texts(*[50] * 160), Caller(deadline=perf_counter() + 300)))
    await until_idle()
    for _ in range(3):
        busy._rates.add(10.0)
    gate.open.set()
    with pytest.raises(ServiceError) as dropped:
        await hopeless
    assert dropped.value.code is Code.DEADLINE_EXCEEDED
    await running


async def test_a_call_that_cannot_meet_its_deadline_is_refused(scheduler: Make, clock: Clock) -> None:
    busy, gate = scheduler(workers=1), Gate()
    for _ in range(3):
        await busy.run(Slow(clock), texts(64))
    running = await hold(busy, gate, 50)
    waiting = asyncio.create_task(busy.run(gate, texts(*[50] * 1000)))
    await until_idle()
    bulk = Caller(lane=Lane.BULK, deadline=clock() + 10)
    with pytest.raises(ServiceError) as refused:
        await busy.run(gate, texts(50), bulk)
    assert (refused.value.code, refused.value.reason) == (Code.RESOURCE_EXHAUSTED, "DEADLINE_TOO_SOON")
    assert " s of them for calls before it), and its deadline is in " in refused.value.message
    assert (refused.value.retry_after or 0) > 1
    # An interactive call runs before the bulk texts, so its time is sufficient.
    short = asyncio.create_task(busy.run(gate, texts(5), Caller(deadline=clock() + 300)))
    await until_idle()
    gate.open.set()
    await asyncio.gather(running, waiting, short)


async def test_a_short_call_is_served_while_all_workers_run_bulk_batches(scheduler: Make) -> None:
    busy, gate = scheduler(workers=2), Gate()
    bulk = [asyncio.create_task(busy.run(gate, texts(50), Caller(lane=Lane.BULK))) for _ in range(8)]
    await asyncio.to_thread(gate.entered.wait, 300)
    short = await asyncio.wait_for(busy.run(Lengths(), texts(8)), 300)
    assert int(short.rows[0][0]) == 8
    assert not any(task.done() for task in bulk)
    gate.open.set()
    await asyncio.gather(*bulk)


class Threads(FakeRunner):
    """A model that returns the number of threads on which each text was run."""

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        return np.full((len(batch), 1), threads, dtype=np.float32)


async def test_only_a_text_that_runs_alone_uses_all_cores(scheduler: Make) -> None:
    free = scheduler(workers=3, batch_tokens=512)
    lone, several = await free.run(Threads(), texts(200)), await free.run(Threads(), texts(200, 200))
    assert [int(row[0]) for result in (lone, several) for row in result.rows] == [3, 1, 1]
    gate = Gate()
    running = await hold(free, gate, 5)
    beside = await free.run(Threads(), texts(200))
    assert int(beside.rows[0][0]) == 1
    gate.open.set()
    await running


class WorkerKiller(SystemExit):
    """Ends the thread of a worker; no model should raise it."""


class Deadly(FakeRunner):
    """A model that ends the worker that runs it."""

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        raise WorkerKiller


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_worker_that_dies_fails_its_own_calls_and_is_replaced(scheduler: Make) -> None:
    reported = threading.Event()
    busy = scheduler(workers=1, batch_tokens=10, on_failure=reported.set)
    calls = [asyncio.create_task(busy.run(Deadly(), texts(10))) for _ in range(3)]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 300)
    assert [result.code for result in results if isinstance(result, ServiceError)] == [Code.INTERNAL] * 3
    assert [int(row[0]) for row in (await asyncio.wait_for(busy.run(Lengths(), texts(9)), 300)).rows] == [9]
    assert busy.counts.lost_workers == 3
    assert not reported.is_set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_if_no_worker_can_be_started_all_calls_fail_and_the_failure_is_reported(
    scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = threading.Event()
    busy = scheduler(workers=1, batch_tokens=10, on_failure=reported.set)

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(busy, "_start", no_thread)
    calls = [asyncio.create_task(busy.run(Deadly(), texts(10))) for _ in range(3)]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 300)
    assert all(isinstance(result, ServiceError) for result in results)
    assert await asyncio.to_thread(reported.wait, 300)
    with pytest.raises(ServiceError) as refused:
        await busy.run(Lengths(), texts(1))
    assert refused.value.code is Code.UNAVAILABLE
    assert busy.revive() == 0
    monkeypatch.undo()
    assert busy.revive() == 1
    assert [int(row[0]) for row in (await asyncio.wait_for(busy.run(Lengths(), texts(9)), 300)).rows] == [9]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_error_in_the_queue_fails_calls_instead_of_blocking_them(
    scheduler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, take = scheduler(workers=1), Queue.take

    def loses_what_it_took(queue: Queue) -> list[Item]:
        take(queue)
        raise KeyError

    with monkeypatch.context() as wrong:
        wrong.setattr(Queue, "take", loses_what_it_took)
        calls = [asyncio.create_task(busy.run(Lengths(), texts(length))) for length in (10, 60, 20)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 300)
    assert [result.code for result in results if isinstance(result, ServiceError)] == [Code.INTERNAL] * 3
    assert [int(row[0]) for row in (await asyncio.wait_for(busy.run(Lengths(), texts(9)), 300)).rows] == [9]


async def test_workers_run_if_their_priority_cannot_be_set(scheduler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    result = await asyncio.wait_for(scheduler().run(Lengths(), texts(9)), 300)
    assert [int(row[0]) for row in result.rows] == [9]


async def test_texts_of_a_cancelled_call_leave_the_queue(scheduler: Make) -> None:
    busy, gate = scheduler(workers=1), Gate()
    running = await hold(busy, gate, 50)
    left = asyncio.create_task(busy.run(gate, texts(*[9] * 100)))
    stayed = asyncio.create_task(busy.run(gate, texts(60, 61)))
    await until_idle()
    assert busy.waiting_tokens == 1021
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert busy.waiting_tokens == 121
    gate.open.set()
    await asyncio.gather(running, stayed)
    assert sorted(gate.seen) == [50, 60, 61]
    assert busy.waiting_tokens == 0


async def test_batches_on_several_threads_do_not_change_the_measured_rate(scheduler: Make) -> None:
    busy = scheduler(batch_tokens=64)
    before = busy.tokens_per_second
    await busy.run(Lengths(), texts(60))
    assert busy.tokens_per_second == before
    await busy.run(Lengths(), texts(30, 31))
    assert busy.tokens_per_second != before
