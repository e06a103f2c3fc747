"""The registry: the model version of a call, how long the registry keeps the version, and that it is freed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from emberpc.bundle import Task
from emberpc.client._core.server_words import python_words
from emberpc.server.engine import Model, Registry
from emberpc.server.errors import Code, ServiceError
from waiting import Changes, until_idle


@pytest.fixture
def registry() -> Iterator[Registry]:
    with ThreadPoolExecutor(1) as pool:
        yield Registry(pool)


async def done(future: Future[None]) -> None:
    await asyncio.wait_for(asyncio.wrap_future(future), 300)


async def test_a_call_keeps_its_version_until_its_task_is_done(registry: Registry, tiny_bundle: Path) -> None:
    registry.put(Model.load("m", tiny_bundle))
    first = weakref.ref(registry.get("m"))
    found, finish = asyncio.Event(), asyncio.Event()

    async def call() -> Model:
        model = registry.find("m")
        assert registry.find("m") is model  # a second lookup belongs to the same call
        found.set()
        await finish.wait()
        return model

    running = asyncio.create_task(call())
    await found.wait()
    assert registry.calls("m") == 1
    registry.put(Model.load("m", tiny_bundle))
    assert registry.get("m") is not first()
    assert registry.calls("m") == 0
    gone = registry.remove("m")
    await done(gone)  # no call uses the second version

    assert first() is not None
    finish.set()
    assert await running is first()
    del running
    await until_dead(first)


async def until_dead(model: weakref.ref[Model]) -> None:
    """Wait until a model is freed, which happens in another thread."""
    changes = Changes()
    if (alive := model()) is not None:
        weakref.finalize(alive, changes.notify)
    del alive
    await changes.until(lambda: model() is None)


async def test_removal_of_a_model_ends_after_its_last_call(registry: Registry, tiny_bundle: Path) -> None:
    registry.put(Model.load("m", tiny_bundle))
    finish = asyncio.Event()

    async def call() -> None:
        registry.find("")
        await finish.wait()

    calls = [asyncio.create_task(call()) for _ in range(3)]
    await until_idle()
    assert registry.calls("m") == 3
    gone = registry.remove("m")
    calls[0].cancel()
    await asyncio.wait([calls[0]])
    assert not gone.done()
    finish.set()
    await asyncio.wait(calls)
    await done(gone)


async def test_a_model_version_in_a_reference_cycle_is_freed(registry: Registry, tiny_bundle: Path) -> None:
    """A failed call leaves this cycle: its exception references the frames, and one frame references the exception."""
    registry.put(Model.load("m", tiny_bundle))
    cycle: list[object] = [registry.get("m")]
    cycle.append(cycle)
    model = weakref.ref(registry.get("m"))
    del cycle
    gc.disable()
    try:
        await done(registry.remove("m"))
        assert model() is None
    finally:
        gc.enable()


async def test_lookups_outside_of_calls_hold_no_version(registry: Registry, tiny_bundle: Path) -> None:
    registry.put(Model.load("m", tiny_bundle))
    assert [model.name for model in registry.models()] == ["m"]
    await asyncio.to_thread(registry.find, "m")
    assert registry.calls("m") == 0
    assert registry.calls("none") == 0


def test_the_client_leaves_model_names_in_errors_unchanged(registry: Registry, tiny_bundle: Path) -> None:
    """`END` is also a value of an enum, and `ListModels` an RPC, which the client replaces outside of quotes."""
    for name in ("END", "ListModels"):
        registry.put(Model.load(name, tiny_bundle))
    for name, task in (("DENSE", None), ("END", Task.CLASSIFICATION), ("", Task.EMBEDDING)):
        with pytest.raises(ServiceError) as error:
            registry.find(name, task)
        assert python_words(str(error.value)) == str(error.value)


def test_errors_for_unknown_models_list_the_models(registry: Registry, tiny_bundle: Path) -> None:
    with pytest.raises(ServiceError, match="no embedding model is served") as error:
        registry.find("", Task.EMBEDDING)
    assert (error.value.code, error.value.reason) == (Code.FAILED_PRECONDITION, "NO_MODEL")
    registry.put(Model.load("a", tiny_bundle))
    registry.put(Model.load("b", tiny_bundle))
    with pytest.raises(ServiceError, match="no model 'c'; the models are: 'a', 'b'") as error:
        registry.find("c")
    assert error.value.code is Code.NOT_FOUND
    with pytest.raises(ServiceError, match="no model 'c'; the classification models are: none"):
        registry.find("c", Task.CLASSIFICATION)
    with pytest.raises(ServiceError, match="name one of: 'a', 'b'"):
        registry.find("", Task.EMBEDDING)
    with pytest.raises(ServiceError, match="for embedding, not for classification"):
        registry.find("a", Task.CLASSIFICATION)
    with pytest.raises(ServiceError, match="no model 'c'"):
        registry.remove("c")
