"""Calls with long or many texts take turns at tokenizing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from emberpc.server.engine import inference
from emberpc.server.engine.caller import Lane
from emberpc.server.engine.inference import Inferrer
from emberpc.server.engine.scheduler import Scheduler
from waiting import until_idle


async def test_calls_with_long_texts_take_turns_and_stop_when_cancelled() -> None:
    begun, go_on, stopped, order = threading.Event(), threading.Event(), threading.Event(), []

    def first(stop: Callable[[], bool]) -> None:
        order.append("first")
        begun.set()
        assert go_on.wait(300)
        if stop():
            stopped.set()

    with ThreadPoolExecutor(4) as pool:
        scheduler = Scheduler(1, 64, 1000)
        inferrer, long = Inferrer(pool, scheduler, 0), ["a" * 100_000]
        leaver = asyncio.create_task(inferrer._in_pool(long, first))
        assert await asyncio.to_thread(begun.wait, 300)
        waiter = asyncio.create_task(inferrer._in_pool(long, lambda _: order.append("second")))
        await inferrer._in_pool(["a"], lambda _: order.append("short"))
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        # Its work is not over yet, and takes memory until then.
        await inferrer._in_pool(["a"], lambda _: order.append("short"))
        assert order == ["first", "short", "short"]
        go_on.set()
        await asyncio.wait_for(waiter, 300)
        scheduler.close()
    assert stopped.is_set()
    assert order[-1] == "second"


class HeldPool(Executor):
    """Keeps the work that it gets, and runs none."""

    def __init__(self) -> None:
        self.work: list[Future[Any]] = []

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        self.work.append(Future())
        return self.work[-1]


@pytest.mark.parametrize(("cores", "turns"), [(2, 1), (8, 2)])
async def test_calls_with_many_characters_are_tokenized_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, cores: int, turns: int
) -> None:
    """Texts of medium length and many short ones; interactive and short calls do not wait for bulk calls."""
    monkeypatch.setattr(inference, "usable_cores", lambda: cores)
    pool, scheduler = HeldPool(), Scheduler(1, 64, 1000)
    inferrer = Inferrer(pool, scheduler, 0)

    def tokenize(stop: Callable[[], bool]) -> None:
        raise AssertionError

    bulk = [["a" * 62_000], ["a" * 600] * 64] * 10
    calls = [asyncio.create_task(inferrer._in_pool(texts, tokenize, Lane.BULK)) for texts in bulk]
    await until_idle()
    assert len(pool.work) == turns
    calls += [asyncio.create_task(inferrer._in_pool(["a" * 20_000], tokenize, Lane.INTERACTIVE)) for _ in range(5)]
    calls += [asyncio.create_task(inferrer._in_pool(["a" * 10_000], tokenize, Lane.BULK)) for _ in range(5)]
    await until_idle()
    assert len(pool.work) == turns + turns + 5
    done = 0
    while done < len(calls):
        assert done < len(pool.work)
        pool.work[done].set_result(None)
        done += 1
        await until_idle()
    await asyncio.gather(*calls)
    scheduler.close()
