"""Return the model's outputs for the texts of a call: from the cache, from another call's run, or from an own run."""

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
from emberpc.server.engine.cache import Cache, CachedOutput, Key, SharedRuns
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenizedText, Truncation, never
from emberpc.server.errors import FieldPath, ServiceError, Violation, invalid_fields

#: Texts of `infer` with at most this many characters together, without prompts and cached texts, are tokenized on the
#: event loop: to hand them to a thread of the pool would take longer than to tokenize them. Texts whose tokens are only
#: counted always go to the pool.
_FEW_CHARACTERS = 2000
#: A text with more characters than this takes much memory, and occupies a thread of the pool for long. So calls with
#: such a text are tokenized one at a time, whatever their lanes.
_MANY_CHARACTERS = 2**16
#: Calls whose texts have more characters than this together also take turns, a few calls at a time. The tokenizer holds
#: the interpreter lock most of the time, so many threads of the pool would compete with the event loop for it.
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
        caller: the caller, with lane and deadline.
    """

    model: Model
    texts: Sequence[str]
    prompt: str
    truncation: Truncation
    path: FieldPath
    caller: Caller


@dataclass(frozen=True)
class Inference:
    """The output of a model for the texts of a request. All three times are 0 if the cache had all texts.

    Attributes:
        output: float32 (texts, width): vectors or logits, one row for each text.
        encoded: the output before `Model.finish`, float32: if the model has a head, the vectors that the head takes;
            otherwise the same array as `output`.
        tokens: the number of tokens of each text, with prompt and special tokens, after truncation.
        truncated: whether each text was truncated.
        tokenize_seconds: wall time of tokenizing, with the wait for a turn and a thread.
        queue_seconds: wall time in the queue, and after that of waiting for other calls that run the same texts.
        infer_seconds: wall time of the call's own batches, from start to end; 0 if other calls or the cache had all
            texts.
    """

    output: Output
    encoded: Output
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
        pool: thread pool that runs the tokenizer.
        scheduler: runs the models.
        cache_bytes: maximum number of bytes of the cache of outputs; 0: nothing is cached.
    """

    def __init__(self, pool: Executor, scheduler: Scheduler, cache_bytes: int) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self.cache = Cache(cache_bytes)
        self.shared_runs = SharedRuns()
        self._long_turn = asyncio.Semaphore(1)
        #: Turns to tokenize, for calls with many characters. Each lane has turns of its own, so that interactive calls
        #: do not wait for the turns of bulk calls. All lanes share one turn for calls with a very long text:
        #: `_long_turn`.
        self._turns = {lane: asyncio.Semaphore(max(1, usable_cores() // 4)) for lane in Lane}

    async def infer(self, request: InferenceRequest) -> Inference:
        """Return the output of a model for each text of a request; equal texts of the request are run once.

        If the cache has all texts, nothing is checked, and no ServiceError is raised.

        Raises:
            ServiceError: INVALID_ARGUMENT for texts that cannot be tokenized or are too long (see
                `TextTokenizer.tokenize`), or if the call has more tokens than may wait; RESOURCE_EXHAUSTED if too many
                tokens wait or the call would probably miss its deadline; DEADLINE_EXCEEDED if the call waited too long
                to meet its deadline; INTERNAL if the model failed; UNAVAILABLE if the server is stopping or has no
                worker.
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
        encoded = np.stack([entry.row for entry in found])
        return Inference(
            output=request.model.finish(encoded),
            encoded=encoded,
            tokens=[entry.tokens for entry in found],
            truncated=[entry.truncated for entry in found],
            tokenize_seconds=times.tokenize,
            queue_seconds=times.queue,
            infer_seconds=times.infer,
        )

    async def count_tokens(self, model: Model, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the number of tokens of each text, with prompt and special tokens, before truncation.

        Args:
            model: the model whose tokenizer counts.
            texts: the texts.
            prompt: the prompt before each text.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming each text that the tokenizer can read neither in pieces nor at once.
        """
        return await self._in_pool(texts, lambda stop: model.tokenizer.count(texts, prompt, stop))

    def _turn(self, texts: Sequence[str], lane: Lane) -> asyncio.Semaphore | None:
        """Return the semaphore that a call must hold while its texts are tokenized; None if none is needed.

        It is `_long_turn` if a text has more than 65,536 characters, else that of the lane if all texts together have
        more than 16,384 characters.
        """
        if any(len(text) > _MANY_CHARACTERS for text in texts):
            return self._long_turn
        return self._turns[lane] if sum(map(len, texts)) > _TURN_CHARACTERS else None

    async def _in_pool(
        self,
        texts: Sequence[str],
        tokenize: Callable[[Callable[[], bool]], Result],
        lane: Lane = Lane.INTERACTIVE,
    ) -> Result:
        """Tokenize texts on a thread of the pool, and return the result; if `_turn` asks for it, wait for a turn first.

        If the caller leaves (this coroutine is cancelled), tokenizing stops before the next group of texts or piece of
        a long text.

        Args:
            texts: the texts, for the choice of the turn.
            tokenize: tokenizes the texts. Its argument is a function that returns whether to stop.
            lane: the lane of the call.

        Raises:
            ServiceError: any error of `tokenize`.
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
            # The turn ends with the work, not when the caller leaves: until then the work takes memory.
            work.add_done_callback(partial(_end_turn, loop, turn))
        try:
            return await asyncio.wrap_future(work)
        finally:
            stop.set()

    async def _compute(
        self, request: InferenceRequest, places: Mapping[Key, Sequence[int]], times: _Times
    ) -> dict[Key, CachedOutput]:
        """Return an entry for each key of `places`: from this call's run, or from another call's run of the same text.

        The entries of this call's run are added to the cache.

        Args:
            request: the request.
            places: the keys that the cache does not have, each with the indexes of its text in the request.
            times: the times of the call, which receive the times of the steps.

        Raises:
            ServiceError: any error of the tokenizer or the scheduler.
        """
        caller = request.caller
        self._scheduler.check_space(caller)
        missing = await self._tokenize(request, places, times)
        found: dict[Key, CachedOutput] = {}
        while missing:
            runs = self.shared_runs.find(missing, self._lane(missing, caller))
            own = {key: text for key, text in missing.items() if key not in runs}
            if own:
                with self.shared_runs.register(own, self._lane(own, caller)) as run:
                    run.entries = await self._run(request, own, times)
                self.cache.add(run.entries)
                found |= run.entries
            start = perf_counter()
            for key, run in runs.items():
                await run.ended.wait()
                # A run that failed, or whose caller left, has no entries. Then the next round of the loop runs the
                # text, or finds another run.
                if key in run.entries:
                    found[key] = run.entries[key]
            times.queue += perf_counter() - start
            missing = {key: text for key, text in missing.items() if key not in found}
        return found

    def _lane(self, texts: Mapping[Key, TokenizedText], caller: Caller) -> Lane:
        return self._scheduler.lane(sum(len(text.ids) for text in texts.values()), caller)

    async def _tokenize(
        self, request: InferenceRequest, places: Mapping[Key, Sequence[int]], times: _Times
    ) -> dict[Key, TokenizedText]:
        """Tokenize the text of each key of `places` once, and set `times.tokenize`.

        Args:
            request: the request.
            places: the keys, each with the indexes of its text in the request.
            times: the times of the call.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming all places of each text that cannot be tokenized or is too long.
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
    ) -> dict[Key, CachedOutput]:
        ids = [text.ids for text in texts.values()]
        result = await self._scheduler.run(request.model.encoder, ids, request.caller)
        times.queue += result.queue_seconds
        times.infer += result.infer_seconds
        return {
            key: CachedOutput(row, len(text.ids), text.truncated)
            for (key, text), row in zip(texts.items(), result.rows, strict=True)
        }


def _at_all_places(error: ServiceError, places: Sequence[Sequence[int]], path: FieldPath) -> ServiceError:
    """Convert an error about the distinct texts of a request to an error that names each invalid text of the request.

    Args:
        error: the error; the field of each violation is the index of a distinct text, as a decimal number.
        places: for each distinct text, its indexes in the request.
        path: returns the path of text i of the request.

    Returns:
        An INVALID_ARGUMENT error with a violation for each invalid text, in the order of the request.
    """
    found = [(i, violation.description) for violation in error.violations for i in places[int(violation.field)]]
    return invalid_fields([Violation(path(i), description) for i, description in sorted(found)])


def _end_turn(loop: asyncio.AbstractEventLoop, turn: asyncio.Semaphore, _: Future[Any]) -> None:
    """Release the semaphore `turn` on its event loop; do nothing if the loop is closed. For any thread.

    The last argument is the finished work, which a callback of a future receives.
    """
    with suppress(RuntimeError):  # the loop is closed, so no call waits for a turn
        loop.call_soon_threadsafe(turn.release)
