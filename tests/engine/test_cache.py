"""The cache keeps recent outcomes within its limit of bytes; equal texts share a run, and runs always end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.engine import Caller, Engine, Lane, Registry, Truncation
from emberpc.server.engine.cache import Cache, CachedOutput, Key, SharedRun, SharedRuns
from emberpc.server.engine.inference import Inference, InferenceRequest
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import ServiceError, items_of
from waiting import until_idle


def key(text: str, encoder: int = 0) -> Key:
    return Key(encoder, "", Truncation.REFUSE, text)


def entry(value: float, width: int = 4) -> CachedOutput:
    return CachedOutput(np.full(width, value, dtype=np.float32), 3, False)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 400)), max_size=80), st.integers(0, 20_000))
def test_the_cache_keeps_its_byte_limit_and_returns_stored_outcomes(
    steps: list[tuple[bool, int, int]], maximum: int
) -> None:
    cache, known = Cache(maximum), {}
    for adds, number, width in steps:
        wanted = key(f"text {number}")
        if adds:
            if wanted not in cache.find([wanted]):
                known[wanted] = entry(number, width)
            cache.add({wanted: known[wanted]})
        else:
            for found, value in cache.find([wanted]).items():
                assert np.array_equal(value.row, known[found].row)
        assert 0 <= cache.bytes <= maximum


def test_the_least_recently_used_outcome_is_evicted_first() -> None:
    cache = Cache(8 * 1024)
    cache.add({key("a"): entry(1)})
    size = cache.bytes
    for i in range(8 * 1024 // size + 1):
        assert cache.find([key("a")])
        cache.add({key(str(i)): entry(i)})
    assert cache.find([key("a")])
    assert not cache.find([key("0")])


def test_outcomes_of_a_model_are_not_found_after_a_reload() -> None:
    cache = Cache(2**20)
    cache.add({key("a", 1): entry(1)})
    assert not cache.find([key("a", 2)])


async def test_a_failed_flight_ends_and_interactive_calls_do_not_wait_for_bulk_flights() -> None:
    runs = SharedRuns()
    with pytest.raises(ValueError, match="no"), runs.register([key("a")], Lane.BULK) as run:
        assert runs.find([key("a"), key("b")], Lane.BULK) == {key("a"): run}
        assert not runs.find([key("a")], Lane.INTERACTIVE)
        raise ValueError("no")
    await asyncio.wait_for(run.ended.wait(), 300)
    assert not run.entries
    assert not runs.find([key("a")], Lane.BULK)


class Serving:
    """An engine with one model; it counts the texts that the model runs."""

    def __init__(self, bundle: Path, pool: ThreadPoolExecutor, cache_bytes: int) -> None:
        self.engine = Engine(
            Registry(pool), pool, workers=1, batch_tokens=64, max_queue_tokens=10_000, cache_bytes=cache_bytes
        )
        self.model = self.engine.registry.load("tiny", bundle)

    async def embed(self, *texts: str, lane: Lane = Lane.INTERACTIVE) -> Inference:
        path, caller = items_of("texts"), Caller(lane=lane)
        return await self.engine.inferrer.infer(
            InferenceRequest(self.model, texts, "", Truncation.REFUSE, path, caller)
        )

    @property
    def texts_run(self) -> int:
        return self.engine.counts.texts


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(params=[0, 2**20])
def serving(request: pytest.FixtureRequest, tiny_bundle: Path, pool: ThreadPoolExecutor) -> Iterator[Serving]:
    serving = Serving(tiny_bundle, pool, request.param)
    yield serving
    serving.engine.close()


async def test_concurrent_calls_with_equal_texts_share_one_run(serving: Serving) -> None:
    before = serving.texts_run
    one, two, three = await asyncio.gather(
        serving.embed("a b c"), serving.embed("d", "a b c"), serving.embed("a b c", "a b c")
    )
    assert serving.texts_run - before == 2
    np.testing.assert_array_equal(one.output[0], two.output[1])
    np.testing.assert_array_equal(three.output, np.stack([one.output[0]] * 2))
    assert one.tokens == [two.tokens[1]]
    assert not np.shares_memory(one.output, two.output)


async def test_a_repeated_text_is_answered_from_the_cache(serving: Serving) -> None:
    first = await serving.embed("a b c")
    before = serving.texts_run
    again = await serving.embed("a b c")
    np.testing.assert_array_equal(first.output, again.output)
    assert again.tokens == first.tokens
    cached = serving.engine.cache.hits > 0
    assert serving.texts_run - before == (0 if cached else 1)


class Gate:
    """Blocks the first batch of a model until the gate is opened; the batch then runs or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        run = Encoder.run

        def held(encoder: Encoder, batch: Sequence[TokenIds], threads: int = 1) -> Output:
            if not self.entered.is_set():
                self.entered.set()
                assert self.open.wait(300)
                if fails:
                    raise RuntimeError("secret of the model")
            return run(encoder, batch, threads)

        monkeypatch.setattr(Encoder, "run", held)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_call_that_waited_for_a_failed_or_cancelled_call_is_served(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    expected = (await serving.embed("x y z")).output
    gate = Gate(monkeypatch, fails=fails)
    first = asyncio.create_task(serving.embed("z y"))
    await asyncio.to_thread(gate.entered.wait, 300)
    second = asyncio.create_task(serving.embed("z y"))
    await until_idle()
    if not fails:
        first.cancel()
    gate.open.set()
    with pytest.raises((asyncio.CancelledError, ServiceError)):
        await first
    assert (await asyncio.wait_for(second, 300)).output.shape == expected.shape


async def test_an_interactive_call_does_not_wait_for_an_equal_text_of_a_bulk_call(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bulk = asyncio.create_task(serving.embed("p q", lane=Lane.BULK))
    await asyncio.to_thread(gate.entered.wait, 300)
    # The only worker is blocked; the express worker serves this call.
    await asyncio.wait_for(serving.embed("p q"), 300)
    assert not bulk.done()
    gate.open.set()
    await bulk


async def test_the_last_texts_of_a_large_call_are_shared_like_a_short_call(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, lanes, registered = serving.engine.inferrer.shared_runs, dict[str, Lane](), asyncio.Event()
    register = runs.register

    def watched(keys: Iterable[Key], lane: Lane) -> AbstractContextManager[SharedRun]:
        lanes.update(dict.fromkeys((key.text for key in keys), lane))
        if "the rest" in lanes:
            registered.set()
        return register(keys, lane)

    monkeypatch.setattr(runs, "register", watched)
    gate = Gate(monkeypatch)
    many = [f"text {i} of many words" for i in range(100)]
    large = asyncio.create_task(serving.embed(*many))
    await asyncio.to_thread(gate.entered.wait, 300)
    rest = asyncio.create_task(serving.embed(*many, "the rest"))
    await asyncio.wait_for(registered.wait(), 300)
    gate.open.set()
    await asyncio.gather(large, rest)
    assert lanes[many[0]] is Lane.BULK
    assert lanes["the rest"] is Lane.INTERACTIVE
