"""The way of a call's texts to their outcome: the cache, another call that runs the same text, or the workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np

from emberpc.server.engine.cache import Cache, Entry, Flights, Key
from emberpc.server.engine.calls import Caller
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenizedText, Truncation, never
from emberpc.server.errors import FieldPath

#: Texts of so few characters in all are tokenised at once: handing them to another thread would take longer.
_FEW_CHARACTERS = 2000
#: A longer text takes memory, and a thread of the pool for long: calls with one are tokenised one after the other.
_MANY_CHARACTERS = 2**16

Result = TypeVar("Result")


@dataclass(frozen=True)
class Inference:
    """What a model gave for some texts.

    `output` is float32 (texts, width); `tokens[i]` and `truncated[i]` tell of
    text i; the seconds are wall time, and 0 where the cache knew all texts.
    """

    output: Output
    tokens: list[int]
    truncated: list[bool]
    tokenize_seconds: float
    queue_seconds: float
    infer_seconds: float


@dataclass
class _Times:
    """Where a call's time went, in seconds."""

    tokenize: float = 0.0
    queue: float = 0.0
    infer: float = 0.0


class Inferrer:
    """Runs texts through models. To be used from one event loop alone.

    Args:
        pool: where tokenising runs.
        scheduler: the workers.
        cache_bytes: most bytes of outcomes to keep; 0: none.
    """

    def __init__(self, pool: Executor, scheduler: Scheduler, cache_bytes: int) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self.cache = Cache(cache_bytes)
        self.flights = Flights()
        self._turn = asyncio.Semaphore(1)

    async def infer(
        self,
        model: Model,
        texts: Sequence[str],
        prompt: str,
        truncation: Truncation,
        path: FieldPath,
        caller: Caller,
    ) -> Inference:
        """Run texts through a model; see `Engine.infer`."""
        keys = [Key(model.encoder.number, prompt, truncation, text) for text in texts]
        times = _Times()
        entries = self.cache.find(keys)
        places: dict[Key, int] = {}
        for i, key in enumerate(keys):
            if key not in entries:
                places.setdefault(key, i)  # each text once, where it stands first
        if places:
            entries |= await self._compute(model, places, path, caller, times)
        found = [entries[key] for key in keys]
        return Inference(
            output=model.finish(np.stack([entry.row for entry in found])),
            tokens=[entry.tokens for entry in found],
            truncated=[entry.truncated for entry in found],
            tokenize_seconds=times.tokenize,
            queue_seconds=times.queue,
            infer_seconds=times.infer,
        )

    async def count_tokens(self, model: Model, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the tokens of each text with its prompt, before any truncation."""
        return await self._in_pool(texts, lambda stop: model.tokenizer.count(texts, prompt, stop))

    async def _in_pool(self, texts: Sequence[str], tokenize: Callable[[Callable[[], bool]], Result]) -> Result:
        """Tokenise texts in the pool. If the caller leaves, it stops after the piece that it is at.

        Args:
            texts: the texts.
            tokenize: tokenises them; its argument returns whether it is to stop.
        """
        stop, loop = threading.Event(), asyncio.get_running_loop()
        large = any(len(text) > _MANY_CHARACTERS for text in texts)
        if large:
            await self._turn.acquire()
        try:
            work = self._pool.submit(tokenize, stop.is_set)
        except BaseException:
            if large:
                self._turn.release()
            raise
        if large:
            # Not when the caller leaves: until the piece is done, it takes memory.
            work.add_done_callback(lambda _: self._end_turn(loop))
        try:
            return await asyncio.wrap_future(work)
        finally:
            stop.set()

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits for a turn
            loop.call_soon_threadsafe(self._turn.release)

    async def _compute(
        self, model: Model, places: Mapping[Key, int], path: FieldPath, caller: Caller, times: _Times
    ) -> dict[Key, Entry]:
        """Run texts that the cache does not know, each of which stands at a place of the request."""
        self._scheduler.check_room(caller)
        missing = await self._tokenize(model, places, path, times)
        found: dict[Key, Entry] = {}
        while missing:
            lane = self._scheduler.lane(sum(len(text.ids) for text in missing.values()), caller)
            flights = self.flights.find(missing, lane)
            own = {key: text for key, text in missing.items() if key not in flights}
            if own:
                with self.flights.lead(own, lane) as flight:
                    flight.entries = await self._run(model, own, caller, times)
                self.cache.add(flight.entries)
                found |= flight.entries
            start = perf_counter()
            for key, flight in flights.items():
                await flight.landed.wait()
                # One that failed, or whose caller left, has nothing: the text is run anew, for this call.
                if key in flight.entries:
                    found[key] = flight.entries[key]
            times.queue += perf_counter() - start
            missing = {key: text for key, text in missing.items() if key not in found}
        return found

    async def _tokenize(
        self, model: Model, places: Mapping[Key, int], path: FieldPath, times: _Times
    ) -> dict[Key, TokenizedText]:
        start = perf_counter()
        first, indexes = next(iter(places)), list(places.values())
        texts = [key.text for key in places]

        def tokenize(stop: Callable[[], bool]) -> list[TokenizedText]:
            return model.tokenizer.tokenize(texts, first.prompt, first.truncation, lambda i: path(indexes[i]), stop)

        few = sum(map(len, texts)) <= _FEW_CHARACTERS
        tokenized = tokenize(never) if few else await self._in_pool(texts, tokenize)
        times.tokenize = perf_counter() - start
        return dict(zip(places, tokenized, strict=True))

    async def _run(
        self, model: Model, texts: Mapping[Key, TokenizedText], caller: Caller, times: _Times
    ) -> dict[Key, Entry]:
        result = await self._scheduler.run(model.encoder, [text.ids for text in texts.values()], caller)
        times.queue += result.queue_seconds
        times.infer += result.infer_seconds
        return {
            key: Entry(row, len(text.ids), text.truncated)
            for (key, text), row in zip(texts.items(), result.rows, strict=True)
        }
