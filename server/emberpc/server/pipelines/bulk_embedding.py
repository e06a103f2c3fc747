"""Embed groups of texts for streams and jobs. A wrong text fails alone, and a group waits while the queue is full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.pipelines.limits import Limits

log = logging.getLogger(__name__)

#: Most texts of a group: enough for several micro-batches, and few enough for a small response with their vectors.
GROUP_TEXTS = 64
#: Most characters of a group of an embedding stream; a group of a single text may have more. Groups of upsert streams
#: and of jobs have no such limit.
GROUP_CHARACTERS = 2**16
#: Most groups of a stream that are embedded at a time. They are enough for a few workers to find texts of similar
#: length, and fill only a small part of the queue.
GROUPS = 8
#: Codes of errors that are not the fault of a text. Work that stores the vectors (upsert streams, jobs) ends with such
#: an error or retries, and does not count the texts as failed. An embedding stream ends only with UNAVAILABLE.
SERVER_ERRORS = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED})
#: Seconds for which the texts of a group are tried again while the queue is full.
_RETRY_SECONDS = 20.0
#: The shortest and the longest pause between two tries, in seconds; within them, the error says how long to wait.
_PAUSES = (0.05, 2.0)

_PATH = items_of("items", "text")


@dataclass
class EmbeddedGroup:
    """The inferences and the failures of a group of texts. Each text has either an inference or a failure.

    Attributes:
        parts: the inferences, each with the indexes of its texts in the group: row k belongs to the k-th index.
        failures: the error of each text that has no vector, by the index of the text.
    """

    parts: list[tuple[list[int], Inference]] = field(default_factory=list)
    failures: dict[int, ServiceError] = field(default_factory=dict)


@dataclass(frozen=True)
class BulkEmbedder:
    """Embeds the groups of texts of one stream or job.

    Args:
        engine: runs the model.
        limits: limits of a text.
        model: the model.
        prompt: the prompt before each text.
        truncation: the truncation of long texts.
        caller: the caller of the stream or job.
        request_id: the request id of the stream, or the name of the job, for the log.
        ending: codes of the errors that `embed` raises. Errors with other codes fail texts.
    """

    engine: Engine
    limits: Limits
    model: Model
    prompt: str
    truncation: Truncation
    caller: Caller
    request_id: str
    ending: frozenset[Code]

    async def embed(self, texts: Sequence[str]) -> EmbeddedGroup:
        """Embed texts, and return their inferences and failures.

        A text that is empty, too long, or on which the model fails, fails alone. Any other error, such as a passed
        deadline, fails all texts that were run together, unless its code is in `self.ending`. While the queue is full,
        texts are tried again for up to 20 seconds or until the deadline; after a split of the group, each part for that
        long.

        Raises:
            ServiceError: an error whose code is in `self.ending`.
        """
        group = EmbeddedGroup()
        valid = []
        for i, text in enumerate(texts):
            try:
                self.limits.check_texts([text], lambda _: "text")
            except ServiceError as error:
                group.failures[i] = error
            else:
                valid.append(i)
        await self._embed(texts, valid, group)
        return group

    async def _embed(self, texts: Sequence[str], indexes: list[int], group: EmbeddedGroup) -> None:
        """Embed the texts at some indexes, and add their inferences and failures to `group`.

        If an error names texts, these fail, and the others are embedded again. If an error INVALID_ARGUMENT or INTERNAL
        names no text, each half of the texts is embedded by itself, until the texts that cause the error are found. Any
        other error, or the error of a single text, fails the texts.

        Raises:
            ServiceError: an error with a code of `self.ending`.
        """
        if not indexes:
            return
        try:
            group.parts.append((indexes, await self._infer([texts[i] for i in indexes])))
        except ServiceError as error:
            if error.code in self.ending:
                raise  # the server failed, not these texts: another server may embed them
            refused = {violation.field: violation.description for violation in error.violations}
            wrong = {indexes[k]: refused[_PATH(k)] for k in range(len(indexes)) if _PATH(k) in refused}
            if wrong:
                group.failures |= {i: invalid("text", description) for i, description in wrong.items()}
                await self._embed(texts, [i for i in indexes if i not in wrong], group)
            elif error.code in (Code.INVALID_ARGUMENT, Code.INTERNAL) and len(indexes) > 1:
                # The texts have more tokens together than may ever wait in the queue, or the model fails on a text.
                half = len(indexes) // 2
                await self._embed(texts, indexes[:half], group)
                await self._embed(texts, indexes[half:], group)
            else:
                self._log(error, len(indexes))
                group.failures |= dict.fromkeys(indexes, error)

    async def _infer(self, texts: Sequence[str]) -> Inference:
        """Run texts through the model. While the queue is full, retry for up to 20 seconds or until the deadline.

        Raises:
            ServiceError: any error of `Inferrer.infer`; QUEUE_FULL only after the last retry.
        """
        request = InferenceRequest(self.model, texts, self.prompt, self.truncation, _PATH, self.caller)
        until = min(perf_counter() + _RETRY_SECONDS, self.caller.deadline)
        while True:
            try:
                return await self.engine.inferrer.infer(request)
            except ServiceError as error:
                shortest, longest = _PAUSES
                pause = min(max(error.retry_after or 0.0, shortest), longest)
                if error.reason != "QUEUE_FULL" or perf_counter() + pause > until:
                    raise
            await asyncio.sleep(pause)

    def _log(self, error: ServiceError, count: int) -> None:
        if error.code is Code.INTERNAL:
            log.error("%d texts of a stream failed, request %s: %s", count, self.request_id, error.message)
