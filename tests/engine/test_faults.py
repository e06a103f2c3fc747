"""If workers fail, every call still ends, with its outcome or with an error that states the reason."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import pytest

from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError
from fake_runner import FakeRunner

CALLS = 400
ALLOWED = {Code.INTERNAL, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}


class Faulty(FakeRunner):
    """A model that returns each text's number of tokens, or at random fails, runs out of memory or kills its worker."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        with self._lock:
            chance = self._random.random()
        if chance < 0.1:
            raise RuntimeError("an operator failed")
        if chance < 0.15:
            raise MemoryError
        if chance < 0.18:
            raise SystemExit
        return np.array([[len(ids)] for ids in batch], dtype=np.float32)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("closes", [False, True])
async def test_every_call_ends_despite_failing_workers(seed: int, closes: bool) -> None:
    chance, before = random.Random(seed), set(threading.enumerate())
    scheduler, runners = Scheduler(2, 64, 50_000), [Faulty(seed), Faulty(seed + 100)]
    right = 0

    async def call() -> None:
        nonlocal right
        lengths = [chance.randint(1, 60) for _ in range(chance.choice((1, 1, 3, 40)))]
        deadline = perf_counter() + chance.choice((1e-4, 0.01, 1e9))
        caller = Caller(chance.choice("abc"), chance.choice(list(Lane)), deadline)
        try:
            result = await scheduler.run(chance.choice(runners), [np.zeros(n, dtype=np.int64) for n in lengths], caller)
        except ServiceError as error:
            assert error.code in ALLOWED
        else:
            assert [int(row[0]) for row in result.rows] == lengths
            right += 1

    tasks = []
    for number in range(CALLS):
        tasks.append(asyncio.create_task(call()))
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        if number % 20 == 0:
            await asyncio.sleep(0)
    if closes:
        await asyncio.to_thread(scheduler.close)
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 300)
    assert all(outcome is None or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    if not closes:
        assert right > 0
        assert scheduler.counts.lost_workers > 0
        await asyncio.to_thread(scheduler.close)
    # The end of a worker that died is reported when its thread ends: in this test, not in the next one.
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith(("worker-", "express")):
            await asyncio.to_thread(thread.join, 300)
