"""Texts of a stream through a model: a bad one fails alone, and a full queue is waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from emberpc.server.engine import Caller, Engine, Inference, Model, Truncation
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.services.requests import Limits

log = logging.getLogger(__name__)

#: Texts of a group, and their characters unless one alone has more: several micro-batches, and an answer that is small.
GROUP_TEXTS = 64
GROUP_CHARACTERS = 2**16
#: Groups of a stream under way at once: enough for a few workers to find texts of like length, and a small part of the
#: queue.
GROUPS = 8
#: Seconds for which a group comes back to a queue that is full, and the pauses between.
_PATIENCE = 20.0
_PAUSES = (0.05, 2.0)

_PATH = items_of("items", "text")


@dataclass
class Embedded:
    """What became of a group of texts: each is in one of the two.

    Attributes:
        parts: which texts an inference was of, in its order.
        failures: why a text has no vector.
    """

    parts: list[tuple[list[int], Inference]] = field(default_factory=list)
    failures: dict[int, ServiceError] = field(default_factory=dict)


@dataclass(frozen=True)
class BulkEmbedder:
    """Embeds the groups of one stream.

    Args:
        engine: where the model runs.
        limits: how large a text may be.
        model: the model.
        prompt: what goes before each text.
        truncation: what happens to over-long texts.
        caller: whose stream it is.
        request_id: the id of its call, for the log.
        ending: the codes that end the stream. Others fail the texts that they are about.
    """

    engine: Engine
    limits: Limits
    model: Model
    prompt: str
    truncation: Truncation
    caller: Caller
    request_id: str
    ending: frozenset[Code]

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed texts; if they fail for what some of them are, these fail alone.

        Raises:
            ServiceError: one of a code that ends the stream.
        """
        embedded = Embedded()
        good = []
        for i, text in enumerate(texts):
            try:
                self.limits.check_texts([text], lambda _: "text")
            except ServiceError as error:
                embedded.failures[i] = error
            else:
                good.append(i)
        await self._embed_good(texts, good, embedded)
        return embedded

    async def _embed_good(self, texts: Sequence[str], wanted: list[int], embedded: Embedded) -> None:
        if not wanted:
            return
        try:
            embedded.parts.append((wanted, await self._infer([texts[i] for i in wanted])))
        except ServiceError as error:
            if error.code in self.ending:
                raise  # it is the server that cannot go on, not these texts: another one may
            refused = {violation.field: violation.description for violation in error.violations}
            bad = {wanted[k]: refused[_PATH(k)] for k in range(len(wanted)) if _PATH(k) in refused}
            if bad:
                embedded.failures |= {i: invalid("text", description) for i, description in bad.items()}
                await self._embed_good(texts, [i for i in wanted if i not in bad], embedded)
            elif error.code in (Code.INVALID_ARGUMENT, Code.INTERNAL) and len(wanted) > 1:
                # Together they are more than the queue may ever hold, or the model fails on one of them.
                half = len(wanted) // 2
                await self._embed_good(texts, wanted[:half], embedded)
                await self._embed_good(texts, wanted[half:], embedded)
            else:
                self._log(error, len(wanted))
                embedded.failures |= dict.fromkeys(wanted, error)

    async def _infer(self, texts: Sequence[str]) -> Inference:
        """Run texts through the model; come back if the queue is full, since a stream that was taken can wait."""
        until = min(perf_counter() + _PATIENCE, self.caller.deadline)
        while True:
            try:
                return await self.engine.infer(self.model, texts, self.prompt, self.truncation, _PATH, self.caller)
            except ServiceError as error:
                least, most = _PAUSES
                pause = min(max(error.retry_after or 0.0, least), most)
                if error.reason != "QUEUE_FULL" or perf_counter() + pause > until:
                    raise
            await asyncio.sleep(pause)

    def _log(self, error: ServiceError, count: int) -> None:
        if error.code is Code.INTERNAL:
            log.error("%d texts of a stream failed, request %s: %s", count, self.request_id, error.message)
