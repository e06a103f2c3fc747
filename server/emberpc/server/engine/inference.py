"""Infer the texts of a call: from the cache, from another call that runs the same text, or with the workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from emberpc.bundle.cores import usable_cores
from emberpc.server.engine.cache import Cache, Entry, Flights, Key
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenizedText, Truncation, never
from emberpc.server.errors import FieldPath, ServiceError, Violation, invalid_fields

#: Texts with at most this many characters together are tokenized on the event loop: a change of threads takes longer.
_FEW_CHARACTERS = 2000
#: A text with more characters takes memory, and a thread of the pool for long. Calls with such texts are tokenized one
#: at a time.
_MANY_CHARACTERS = 2**16
#: Calls whose texts have more characters together take turns, too, a few at a time: the tokenizer holds the interpreter
#: most of the time, and many threads of the pool would compete with the event loop for it.
_TURN_CHARACTERS = 2**14

Result = TypeVar("Result")


@dataclass(frozen=True)
class InferenceRequest:
    """Texts to run through a model.

    Attributes:
        model: the model.
        texts: at least one text; none is empty.
        prompt: the prompt before each text.
        truncation: the truncation of long texts.
        path: returns the path of text i in the request, for errors.
        caller: the caller, with priority and deadline.
    """

    model: Model
    texts: Sequence[str]
    prompt: str
    truncation: Truncation
    path: FieldPath
    caller: Caller


@dataclass(frozen=True)
class Inference:
    """The output of a model for the texts of a request.

    Attributes:
        output: float32 (texts, width): vectors or logits, one row for each text.
        tokens: the number of tokens of each text.
        truncated: whether each text was truncated.
        tokenize_seconds: wall time of tokenizing; like the others, 0 if the cache had all texts.
        queue_seconds: wall time in the queue, and of waiting for other calls that ran the same texts.
        infer_seconds: wall time of the model's runs.
    """

    output: Output
    tokens: list[int]
    truncated: list[bool]
    tokenize_seconds: float
    queue_seconds: float
    infer_seconds: float


@dataclass
class _Times:
    """Wall time of the steps of a call, in seconds."""

    tokenize: float = 0.0
    queue: float = 0.0
    infer: float = 0.0


class Inferrer:
    """Runs texts through models. Use from one event loop only.

    Args:
        pool: runs the tokenizer.
        scheduler: the workers.
        cache_bytes: bytes of outputs that the cache keeps at most; 0: none.
    """

    def __init__(self, pool: Executor, scheduler: Scheduler, cache_bytes: int) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self.cache = Cache(cache_bytes)
        self.flights = Flights()
        self._long_turn = asyncio.Semaphore(1)
        #: For each lane, so that no interactive call waits for the texts of many streams.
        self._turns = {lane: asyncio.Semaphore(max(1, usable_cores() // 4)) for lane in Lane}

    async def infer(self, request: InferenceRequest) -> Inference:
        """Run texts through a model.

        Raises:
            ServiceError: as `TextTokenizer.tokenize` and `Scheduler.run` do.
        """
        number, prompt, truncation = request.model.encoder.number, request.prompt, request.truncation
        keys = [Key(number, prompt, truncation, text) for text in request.texts]
        times = _Times()
        entries = self.cache.find(keys)
        places: dict[Key, list[int]] = {}
        for i, key in enumerate(keys):
            if key not in entries:
                places.setdefault(key, []).append(i)
        if places:
            entries |= await self._compute(request, places, times)
        found = [entries[key] for key in keys]
        return Inference(
            output=request.model.finish(np.stack([entry.row for entry in found])),
            tokens=[entry.tokens for entry in found],
            truncated=[entry.truncated for entry in found],
            tokenize_seconds=times.tokenize,
            queue_seconds=times.queue,
            infer_seconds=times.infer,
        )

    async def count_tokens(self, model: Model, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the number of tokens of each text with its prompt, before truncation."""
        return await self._in_pool(texts, lambda stop: model.tokenizer.count(texts, prompt, stop))

    def _turn(self, texts: Sequence[str], lane: Lane) -> asyncio.Semaphore | None:
        """Return the turn that a call must have before its texts are tokenized; None: no turn."""
        if any(len(text) > _MANY_CHARACTERS for text in texts):
            return self._long_turn
        return self._turns[lane] if sum(map(len, texts)) > _TURN_CHARACTERS else None

    async def _in_pool(
        self,
        texts: Sequence[str],
        tokenize: Callable[[Callable[[], bool]], Result],
        lane: Lane = Lane.INTERACTIVE,
    ) -> Result:
        """Tokenize texts in the pool. If the caller leaves, it stops after the present piece of text.

        Args:
            texts: the texts.
            tokenize: tokenizes them; its argument returns whether to stop.
            lane: the lane of the call.
        """
        stop, loop = threading.Event(), asyncio.get_running_loop()
        turn = self._turn(texts, lane)
        if turn is not None:
            await turn.acquire()
        try:
            work = self._pool.submit(tokenize, stop.is_set)
        except BaseException:
            if turn is not None:
                turn.release()
            raise
        if turn is not None:
            # Not already when the caller leaves: the piece takes memory until it is done.
            work.add_done_callback(partial(_end_turn, loop, turn))
        try:
            return await asyncio.wrap_future(work)
        finally:
            stop.set()

    async def _compute(
        self, request: InferenceRequest, places: Mapping[Key, Sequence[int]], times: _Times
    ) -> dict[Key, Entry]:
        """Run each text that the cache does not have once; `places` has its indexes in the request."""
        caller = request.caller
        self._scheduler.check_room(caller)
        missing = await self._tokenize(request, places, times)
        found: dict[Key, Entry] = {}
        while missing:
            lane = self._scheduler.lane(sum(len(text.ids) for text in missing.values()), caller)
            flights = self.flights.find(missing, lane)
            own = {key: text for key, text in missing.items() if key not in flights}
            if own:
                with self.flights.lead(own, lane) as flight:
                    flight.entries = await self._run(request, own, times)
                self.cache.add(flight.entries)
                found |= flight.entries
            start = perf_counter()
            for key, flight in flights.items():
                await flight.landed.wait()
                # A flight that failed, or whose caller left, has no entries: this call then runs the text itself.
                if key in flight.entries:
                    found[key] = flight.entries[key]
            times.queue += perf_counter() - start
            missing = {key: text for key, text in missing.items() if key not in found}
        return found

    async def _tokenize(
        self, request: InferenceRequest, places: Mapping[Key, Sequence[int]], times: _Times
    ) -> dict[Key, TokenizedText]:
        """Tokenize each text once.

        Raises:
            ServiceError: as `TextTokenizer.tokenize` does. The error names all places of an invalid text.
        """
        tokenizer = request.model.tokenizer
        start = perf_counter()
        texts = [key.text for key in places]

        def tokenize(stop: Callable[[], bool]) -> list[TokenizedText]:
            return tokenizer.tokenize(texts, request.prompt, request.truncation, str, stop)

        few = sum(map(len, texts)) <= _FEW_CHARACTERS
        try:
            tokenized = tokenize(never) if few else await self._in_pool(texts, tokenize, request.caller.lane)
        except ServiceError as error:
            if not error.violations:
                raise
            raise _at_all_places(error, list(places.values()), request.path) from error
        times.tokenize = perf_counter() - start
        return dict(zip(places, tokenized, strict=True))

    async def _run(
        self, request: InferenceRequest, texts: Mapping[Key, TokenizedText], times: _Times
    ) -> dict[Key, Entry]:
        ids = [text.ids for text in texts.values()]
        result = await self._scheduler.run(request.model.encoder, ids, request.caller)
        times.queue += result.queue_seconds
        times.infer += result.infer_seconds
        return {
            key: Entry(row, len(text.ids), text.truncated)
            for (key, text), row in zip(texts.items(), result.rows, strict=True)
        }


def _at_all_places(error: ServiceError, places: Sequence[Sequence[int]], path: FieldPath) -> ServiceError:
    """Return an error about distinct texts as an error that names each text of the request, in its order.

    Args:
        error: the error; the field of a violation is the index of a distinct text.
        places: the indexes in the request of each distinct text.
        path: returns the path of a text of the request.
    """
    found = [(i, violation.description) for violation in error.violations for i in places[int(violation.field)]]
    return invalid_fields([Violation(path(i), description) for i, description in sorted(found)])


def _end_turn(loop: asyncio.AbstractEventLoop, turn: asyncio.Semaphore, _: Future[Any]) -> None:
    """End the turn of a call, from any thread."""
    with suppress(RuntimeError):  # the loop is closed, so no call waits for a turn
        loop.call_soon_threadsafe(turn.release)
