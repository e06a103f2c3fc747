"""The cache keeps what was asked for last within its bytes; flights are shared and never left waiting."""

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
from emberpc.server.engine.cache import Cache, CachedOutput, Flight, Flights, Key
from emberpc.server.engine.inference import Inference, InferenceRequest
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import ServiceError, items_of


def key(text: str, encoder: int = 0) -> Key:
    return Key(encoder, "", Truncation.REFUSE, text)


def entry(value: float, width: int = 4) -> CachedOutput:
    return CachedOutput(np.full(width, value, dtype=np.float32), 3, False)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 400)), max_size=80), st.integers(0, 20_000))
def test_it_never_grows_beyond_its_bytes_and_gives_what_was_put_in(
    steps: list[tuple[bool, int, int]], most: int
) -> None:
    cache, known = Cache(most), {}
    for adds, number, width in steps:
        wanted = key(f"text {number}")
        if adds:
            if wanted not in cache.find([wanted]):
                known[wanted] = entry(number, width)
            cache.add({wanted: known[wanted]})
        else:
            for found, value in cache.find([wanted]).items():
                assert np.array_equal(value.row, known[found].row)
        assert 0 <= cache.bytes <= most


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = Cache(8 * 1024)
    cache.add({key("a"): entry(1)})
    size = cache.bytes
    for i in range(8 * 1024 // size + 1):
        assert cache.find([key("a")])
        cache.add({key(str(i)): entry(i)})
    assert cache.find([key("a")])
    assert not cache.find([key("0")])


def test_outcomes_of_another_loading_of_the_model_are_others() -> None:
    cache = Cache(2**20)
    cache.add({key("a", 1): entry(1)})
    assert not cache.find([key("a", 2)])


async def test_a_flight_lands_though_it_failed_and_none_of_a_slower_lane_is_waited_for() -> None:
    flights = Flights()
    with pytest.raises(ValueError, match="no"), flights.lead([key("a")], Lane.BULK) as flight:
        assert flights.find([key("a"), key("b")], Lane.BULK) == {key("a"): flight}
        assert not flights.find([key("a")], Lane.INTERACTIVE)
        raise ValueError("no")
    await asyncio.wait_for(flight.landed.wait(), 300)
    assert not flight.entries
    assert not flights.find([key("a")], Lane.BULK)


class Serving:
    """An engine with one model, whose runs are counted and may be made to wait or fail."""

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


async def test_the_same_text_is_run_once_at_a_time(serving: Serving) -> None:
    before = serving.texts_run
    one, two, three = await asyncio.gather(
        serving.embed("a b c"), serving.embed("d", "a b c"), serving.embed("a b c", "a b c")
    )
    assert serving.texts_run - before == 2
    np.testing.assert_array_equal(one.output[0], two.output[1])
    np.testing.assert_array_equal(three.output, np.stack([one.output[0]] * 2))
    assert one.tokens == [two.tokens[1]]
    assert not np.shares_memory(one.output, two.output)


async def test_one_asked_for_again_comes_from_the_cache_if_there_is_one(serving: Serving) -> None:
    first = await serving.embed("a b c")
    before = serving.texts_run
    again = await serving.embed("a b c")
    np.testing.assert_array_equal(first.output, again.output)
    assert again.tokens == first.tokens
    cached = serving.engine.cache.hits > 0
    assert serving.texts_run - before == (0 if cached else 1)


class Gate:
    """Holds up the first batch of a model until it is opened, and may let it fail."""

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
async def test_who_waited_for_a_call_that_ended_without_an_outcome_is_served_all_the_same(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    expected = (await serving.embed("x y z")).output
    gate = Gate(monkeypatch, fails=fails)
    first = asyncio.create_task(serving.embed("z y"))
    await asyncio.to_thread(gate.entered.wait, 300)
    second = asyncio.create_task(serving.embed("z y"))
    await asyncio.sleep(0)
    if not fails:
        first.cancel()
    gate.open.set()
    with pytest.raises((asyncio.CancelledError, ServiceError)):
        await first
    assert (await asyncio.wait_for(second, 300)).output.shape == expected.shape


async def test_interactive_work_does_not_wait_for_the_same_text_in_bulk(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bulk = asyncio.create_task(serving.embed("p q", lane=Lane.BULK))
    await asyncio.to_thread(gate.entered.wait, 300)
    # The only worker is held up; the express worker serves this one.
    await asyncio.wait_for(serving.embed("p q"), 300)
    assert not bulk.done()
    gate.open.set()
    await bulk


async def test_texts_that_are_left_of_a_large_call_are_shared_as_a_short_one(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    flights, lanes, led = serving.engine.inferrer.flights, dict[str, Lane](), asyncio.Event()
    lead = flights.lead

    def watched(keys: Iterable[Key], lane: Lane) -> AbstractContextManager[Flight]:
        lanes.update(dict.fromkeys((key.text for key in keys), lane))
        if "the rest" in lanes:
            led.set()
        return lead(keys, lane)

    monkeypatch.setattr(flights, "lead", watched)
    gate = Gate(monkeypatch)
    many = [f"text {i} of many words" for i in range(100)]
    large = asyncio.create_task(serving.embed(*many))
    await asyncio.to_thread(gate.entered.wait, 300)
    rest = asyncio.create_task(serving.embed(*many, "the rest"))
    await asyncio.wait_for(led.wait(), 300)
    gate.open.set()
    await asyncio.gather(large, rest)
    assert lanes[many[0]] is Lane.BULK
    assert lanes["the rest"] is Lane.INTERACTIVE
