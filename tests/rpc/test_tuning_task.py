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

from emberpc.server.stopping import Stopping
from emberpc.server.tuning_task import TuningTask


class FakeModel:
    """A model that can be referred to weakly, as `Model`."""

    def __init__(self, name: str) -> None:
        self.name = name


class Measured:
    """Stands for engine and loader. `outcomes` has the outcomes of `tune` by the name of the model, in order.

    An outcome is `faster` (another engine was chosen), `same`, `busy`, or an exception.
    """

    def __init__(self, **outcomes: list[str | Exception]) -> None:
        self._left: dict[str, list[str | Exception]] = {}
        self._models: dict[str, FakeModel] = {}
        for name, own in outcomes.items():
            self.add(name, own)
        self._outdated: list[str] = []
        self.reloaded: list[str] = []
        self.replaced: list[weakref.ref[FakeModel]] = []

    def add(self, name: str, outcomes: list[str | Exception]) -> None:
        """Load a model."""
        self._left[name] = outcomes
        self._models[name] = FakeModel(name)

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


async def run_looks(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, looks: int, between: Callable[[int], None] = lambda look: None
) -> None:
    """Run the task for some looks, one a minute; `between` is called after each look with its number, from 1 on."""
    done = count(1)

    async def sleep(seconds: float) -> None:
        assert seconds == 60
        between(look := next(done))
        if look == looks:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ThreadPoolExecutor(1) as pool, pytest.raises(asyncio.CancelledError):
        await TuningTask(measured, measured, pool, Stopping(1)).run()  # type: ignore[arg-type]


async def test_a_model_with_a_faster_engine_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=["faster"], b=["same"], c=["faster"])
    await run_looks(measured, monkeypatch, 1)
    assert measured.reloaded == ["a", "c"]
    assert measured.due() == []


async def test_a_model_is_measured_again_after_longer_pauses_if_the_host_was_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Measured(a=["busy"] * 99, b=["same"])
    left: list[int] = []
    await run_looks(measured, monkeypatch, 250, lambda look: left.append(len(measured._left["a"])))
    measurements = [look for look in range(1, 250) if left[look] < left[look - 1]]
    assert [0, *measurements] == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]  # pauses of 1, 2, 4 … and at most 60 minutes
    assert measured._left["b"] == []


async def test_the_pause_is_short_again_after_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=[*["busy"] * 4, "same", *["busy"] * 9])  # due again after the measurement
    left: list[int] = []
    await run_looks(measured, monkeypatch, 24, lambda look: left.append(len(measured._left["a"])))
    measurements = [look for look in range(1, 24) if left[look] < left[look - 1]]
    assert [0, *measurements] == [0, 1, 3, 7, 15, 16, 17, 19, 23]


async def test_a_model_that_is_loaded_while_another_one_waits_is_measured_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Measured(a=["busy"] * 99)

    def load(look: int) -> None:
        if look == 20:
            measured.add("b", ["faster"])

    await run_looks(measured, monkeypatch, 21, load)
    assert measured.reloaded == ["b"]


async def test_a_model_that_cannot_be_measured_is_left_out_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = Measured(a=[RuntimeError("secret"), RuntimeError("again")], b=["faster"])
    await run_looks(measured, monkeypatch, 3)
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
        await TuningTask(measured, measured, thread, Stopping(1)).run()  # type: ignore[arg-type]
    assert left == [None]


async def test_a_model_that_failed_is_measured_after_it_was_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(a=[RuntimeError("its file changed"), "faster"])
    await run_looks(measured, monkeypatch, 2, lambda look: measured._models.update(a=FakeModel("a")))
    assert measured.reloaded == ["a"]
