"""Embed groups of texts for streams and jobs. A text that cannot be embedded fails alone.

While the queue is full, a group is tried again for some seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.pipelines.limits import EMPTY_RECORD, Limits

log = logging.getLogger(__name__)

#: Maximum number of texts of a group: usually enough for several micro-batches, and few enough for a small response
#: with their vectors.
GROUP_TEXTS = 64
#: Maximum number of characters of the ids and texts of a group of an embedding stream; a group of a single text may
#: have more. In upsert streams and jobs, groups have no limit of characters.
GROUP_CHARACTERS = 2**16
#: Maximum number of groups of a stream that are embedded at a time: enough for a few workers to find texts of similar
#: length. More would fill a greater part of the queue.
GROUPS = 8
#: Codes of errors that are not the fault of a text. With such an error, an upsert stream ends, and a reembedding tries
#: again later; the texts do not count as failed. Of these errors, only UNAVAILABLE ends an embedding stream; the others
#: fail its texts.
SERVER_ERRORS = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED})
#: Seconds for which texts are tried again while the queue is full.
_RETRY_SECONDS = 20.0
#: The shortest and the longest pause between two tries, in seconds. Between these limits, the pause is the
#: `retry_after` of the error.
_PAUSES = (0.05, 2.0)

_PATH = items_of("items", "text")


@dataclass
class EmbeddedGroup:
    """The inferences and the failures of a group of texts. Each text has either a row of an inference or a failure.

    Attributes:
        parts: the inferences, each with the indexes of its texts in the group: row k belongs to the k-th index.
        failures: the error of each text that has no vector, by the index of the text in the group.
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
        ending: codes of errors of the model run that `embed` raises. Errors with other codes fail texts.
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

        A text that is empty or too long, or on which the model fails, fails alone. If an error does not name the text,
        the group is split to find it. Any other error, such as a passed deadline, fails all texts that were run
        together, unless its code is in `self.ending`. While the queue is full, texts are tried again for 20 seconds,
        but not after the deadline; after a split, each part of the group is tried again for that long.

        Raises:
            ServiceError: the first error whose code is in `self.ending`; the inferences so far are lost.
        """
        group = EmbeddedGroup()
        valid = []
        for i, text in enumerate(texts):
            try:
                # An empty text is that of a record: the stream of texts has refused its empty texts before.
                self.limits.check_texts([text], lambda _: "text", remedy=EMPTY_RECORD)
            except ServiceError as error:
                group.failures[i] = error
            else:
                valid.append(i)
        await self._embed(texts, valid, group)
        return group

    async def _embed(self, texts: Sequence[str], indexes: list[int], group: EmbeddedGroup) -> None:
        """Embed the texts at some indexes, and add their inferences and failures to `group`.

        If an error names texts, the named texts fail, and the other texts are run again. If an error INVALID_ARGUMENT
        or INTERNAL names none of several texts, this function is called for each half of the texts. Any other error
        fails all the texts.

        Raises:
            ServiceError: an error whose code is in `self.ending`.
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
                # The texts have more tokens together than the queue ever takes, or the model fails on one of the texts.
                half = len(indexes) // 2
                await self._embed(texts, indexes[:half], group)
                await self._embed(texts, indexes[half:], group)
            else:
                self._log(error, len(indexes))
                group.failures |= dict.fromkeys(indexes, error)

    async def _infer(self, texts: Sequence[str]) -> Inference:
        """Run texts through the model. While the queue is full, retry for 20 seconds, but not after the deadline.

        Raises:
            ServiceError: any error of `Inferrer.infer`; RESOURCE_EXHAUSTED with the reason QUEUE_FULL only if no time
                is left for another retry.
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
