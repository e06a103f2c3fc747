"""EmbedStream: a corpus of any size, embedded in pipelined groups.

One loop reads, runs and answers, so that each holds back the one before it:
nothing more is read while enough texts wait, no group is started while enough
are under way, and while an answer is being written nothing else happens. A
stream thus holds at most the groups under way, one group that waits and the
message that it came in, whatever the size of the corpus and however slow its
reader. Texts never wait for company: what is there goes as soon as there is
room, so a client may wait for an answer before it sends more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from emberpc.bundle import Task
from emberpc.server.engine import Caller, Engine, Inference, Lane, Model
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.services import replies, requests
from emberpc.server.services.forms import EmbeddingForm, Matrix
from emberpc.server.statuses import status_of
from emberpc.v1 import embedding_pb2 as pb

log = logging.getLogger(__name__)

#: Texts of a group, and their characters unless one alone has more: several micro-batches, and an answer that is small.
_GROUP_TEXTS = 64
_GROUP_CHARACTERS = 2**16
#: Groups under way at once: enough for a few workers to find texts of like length, and a small part of the queue.
_GROUPS = 8
#: Seconds for which a group comes back to a queue that is full, and the pauses between.
_PATIENCE = 20.0
_PAUSES = (0.05, 2.0)

_PATH = items_of("items", "text")

Item = pb.EmbedStreamItem


async def embed_stream(
    engine: Engine,
    limits: requests.Limits,
    messages: AsyncIterator[pb.EmbedStreamRequest],
    context: requests.Context,
) -> AsyncIterator[pb.EmbedStreamResponse]:
    """Embed what comes, and answer in the order in which it is ready; the first answer names the model only.

    Raises:
        ServiceError: INVALID_ARGUMENT if the first message has no config, a later one has one, or it is wrong; as
            `Engine.model` says; RESOURCE_EXHAUSTED if there is no room for more work when it opens; UNAVAILABLE if the
            server is stopping or has no workers. A text fails alone.
    """
    message = await anext(messages, None)
    if message is None or not message.HasField("config"):
        raise invalid("config", "is missing; the first message of a stream must have one")
    stream = _Stream.of(engine, limits, message.config, context)
    engine.check_room(stream.caller)
    stream.take_in(message)
    yield pb.EmbedStreamResponse(model=replies.model_version(stream.model))
    reading: asyncio.Task[pb.EmbedStreamRequest | None] | None = None
    running: set[asyncio.Task[pb.EmbedStreamResponse]] = set()
    try:
        while True:
            while stream.waiting and len(running) < _GROUPS:
                running.add(asyncio.create_task(stream.embed(stream.take_group())))
            if reading is None and message is not None and len(stream.waiting) < _GROUP_TEXTS:
                reading = asyncio.create_task(_next(messages))
            if reading is None and not running:
                return
            await asyncio.wait({*running, *_task(reading)}, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                message, reading = reading.result(), None
                if message is not None and message.HasField("config"):
                    raise invalid("config", "is there again; only the first message of a stream may have one")
                if message is not None:
                    stream.take_in(message)
            for group in [each for each in running if each.done()]:
                running.remove(group)
                yield group.result()
    finally:
        left = [*running, *_task(reading)]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _task(reading: asyncio.Task[Any] | None) -> list[asyncio.Task[Any]]:
    return [] if reading is None else [reading]


async def _next(messages: AsyncIterator[pb.EmbedStreamRequest]) -> pb.EmbedStreamRequest | None:
    """Return the next message; None at the end."""
    return await anext(messages, None)


@dataclass
class _Stream:
    """What all groups of a stream have in common, and the items that wait to become one."""

    engine: Engine
    limits: requests.Limits
    model: Model
    form: EmbeddingForm
    caller: Caller
    request_id: str
    waiting: deque[Item] = field(default_factory=deque)

    @classmethod
    def of(
        cls, engine: Engine, limits: requests.Limits, config: pb.EmbedStreamConfig, context: requests.Context
    ) -> _Stream:
        """Read the config of a stream, and check it."""
        model = engine.model(config.model, Task.EMBEDDING, "config.model")
        return cls(
            engine=engine,
            limits=limits,
            model=model,
            form=EmbeddingForm.of(model, config, "config."),
            caller=requests.caller(context, config.priority, Lane.BULK, "config.priority"),
            request_id=requests.request_id(context),
        )

    def take_in(self, message: pb.EmbedStreamRequest) -> None:
        """Take the items of a message."""
        if message.items:
            self.limits.check_count(len(message.items), "items", "text")
        self.waiting.extend(message.items)

    def take_group(self) -> list[Item]:
        """Take out what waits, up to the size of a group; at least one item."""
        group = [self.waiting.popleft()]
        characters = len(group[0].text)
        while self.waiting and len(group) < _GROUP_TEXTS:
            characters += len(self.waiting[0].text)
            if characters > _GROUP_CHARACTERS:
                break
            group.append(self.waiting.popleft())
        return group

    async def embed(self, group: Sequence[Item]) -> pb.EmbedStreamResponse:
        """Embed a group; each item of it is in the answer, as a vector or as a failure."""
        response = pb.EmbedStreamResponse()
        good = []
        for item in group:
            try:
                self._check(item)
            except ServiceError as error:
                self._fail(response, [item], error)
            else:
                good.append(item)
        outputs: list[Matrix] = []
        await self._embed_good(good, response, outputs)
        if outputs:
            response.embeddings.CopyFrom(self.form.encode(np.concatenate(outputs)))
        return response

    def _check(self, item: Item) -> None:
        if not item.id:
            raise invalid("id", "is empty; give each text one, since results come in any order")
        self.limits.check_texts([item.text], lambda _: "text")

    async def _embed_good(self, items: Sequence[Item], response: pb.EmbedStreamResponse, outputs: list[Matrix]) -> None:
        """Embed items; if they fail for what some of them are, these fail alone and the rest is embedded."""
        if not items:
            return
        try:
            inference = await self._infer([item.text for item in items])
        except ServiceError as error:
            if error.code is Code.UNAVAILABLE:
                raise  # it is the server that cannot go on, not these items: another one may
            refused = {violation.field: violation.description for violation in error.violations}
            bad = {i: refused[_PATH(i)] for i in range(len(items)) if _PATH(i) in refused}
            if bad:
                for i, description in bad.items():
                    self._fail(response, [items[i]], invalid("text", description))
                await self._embed_good([item for i, item in enumerate(items) if i not in bad], response, outputs)
            elif error.code is Code.INVALID_ARGUMENT and len(items) > 1:
                # Together they are more than the queue may ever hold; that need not be true of each.
                half = len(items) // 2
                await self._embed_good(items[:half], response, outputs)
                await self._embed_good(items[half:], response, outputs)
            else:
                self._fail(response, items, error)
            return
        response.ids.extend(item.id for item in items)
        response.usages.extend(replies.usages(inference))
        outputs.append(inference.output)

    async def _infer(self, texts: Sequence[str]) -> Inference:
        """Run texts through the model; come back if the queue is full, since a stream that was taken can wait."""
        until = min(perf_counter() + _PATIENCE, self.caller.deadline)
        while True:
            try:
                return await self.engine.infer(
                    self.model, texts, self.form.prompt, self.form.truncation, _PATH, self.caller
                )
            except ServiceError as error:
                least, most = _PAUSES
                pause = min(max(error.retry_after or 0.0, least), most)
                if error.reason != "QUEUE_FULL" or perf_counter() + pause > until:
                    raise
            await asyncio.sleep(pause)

    def _fail(self, response: pb.EmbedStreamResponse, items: Sequence[Item], error: ServiceError) -> None:
        if error.code is Code.INTERNAL:
            log.error("%d texts of a stream failed, request %s: %s", len(items), self.request_id, error.message)
        status = status_of(error, self.request_id)
        response.failures.extend(pb.EmbedStreamFailure(id=item.id, error=status) for item in items)
