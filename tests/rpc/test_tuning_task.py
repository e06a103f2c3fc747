"""While the server serves, a task measures the models one after the other, and reloads those with a faster engine."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from emberpc.server import app
from emberpc.server.stopping import Stopping


class FakeModel:
    """A model that can be referred to weakly, as `Model`."""

    def __init__(self, name: str) -> None:
        self.name = name


class Measured:
    """Stands for engine and loader. `outcomes` has the outcomes of `tune` by the name of the model, in order.

    An outcome is `faster` (another engine was chosen), `same`, `busy`, or an exception.
    """

    def __init__(self, **outcomes: list[str | Exception]) -> None:
        self._left = outcomes
        self._models = {name: FakeModel(name) for name in outcomes}
        self._outdated: list[str] = []
        self.reloaded: list[str] = []
        self.replaced: list[weakref.ref[FakeModel]] = []

    def due(self) -> list[Any]:
        return [self._models[name] for name, left in self._left.items() if left]

    def outdated(self) -> list[Any]:
        return [self._models[name] for name in self._outdated]

    def tune(self, model: Any, stop: Callable[[], bool]) -> bool:
        assert not stop()
        outcome = self._left[model.name].pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "faster":
            self._outdated.append(model.name)
        return outcome != "busy"

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work())
        return future

    def reload(self, name: str) -> None:
        self._outdated.remove(name)
        self.reloaded.append(name)
        self.replaced.append(weakref.ref(self._models[name]))
        self._models[name] = FakeModel(name)


async def pauses_of(measured: Measured, monkeypatch: pytest.MonkeyPatch, count: int) -> list[float]:
    """Run the task until its pause number `count`, and return the pauses in seconds."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == count:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ThreadPoolExecutor(1) as pool, pytest.raises(asyncio.CancelledError):
        await app._tune(measured, measured, pool, Stopping(1))  # type: ignore[arg-type]
    return pauses


async def test_a_model_with_a_faster_engine_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=["faster"], b=["same"], c=["faster"])
    assert await pauses_of(measured, monkeypatch, 1) == [60]
    assert measured.reloaded == ["a", "c"]
    assert measured.due() == []


async def test_a_busy_host_is_measured_again_after_longer_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=["busy"] * 9, b=["same"])
    pauses = await pauses_of(measured, monkeypatch, 10)
    assert pauses[:3] == [60, 120, 240]
    assert max(pauses) == 3600
    assert measured.due() == []


async def test_a_model_that_cannot_be_measured_is_left_out_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = Measured(a=[RuntimeError("secret"), RuntimeError("again")], b=["faster"])
    await pauses_of(measured, monkeypatch, 3)
    assert measured.reloaded == ["b"]
    assert caplog.text.count("cannot measure how model a is run fastest; nothing changes") == 1


async def test_a_replaced_model_is_freed_before_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=["faster"])
    left: list[FakeModel | None] = []

    async def sleep(_: float) -> None:
        gc.collect()
        left.extend(model() for model in measured.replaced)
        raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ThreadPoolExecutor(1) as thread, pytest.raises(asyncio.CancelledError):
        await app._tune(measured, measured, thread, Stopping(1))  # type: ignore[arg-type]
    assert left == [None]


async def test_a_model_that_failed_is_measured_after_it_was_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=[RuntimeError("its file changed"), "faster"])
    reload = measured._models.update

    sleeps = count()

    async def sleep(_: float) -> None:
        if next(sleeps):
            raise asyncio.CancelledError
        reload(a=FakeModel("a"))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ThreadPoolExecutor(1) as thread, pytest.raises(asyncio.CancelledError):
        await app._tune(measured, measured, thread, Stopping(1))  # type: ignore[arg-type]
    assert measured.reloaded == ["a"]
