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
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from emberpc.bundle import Task
from emberpc.server.engine import Engine, Lane
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.services import replies, requests
from emberpc.server.services.bulk_embedding import GROUP_CHARACTERS, GROUP_TEXTS, GROUPS, BulkEmbedder
from emberpc.server.services.forms import EmbeddingForm, Matrix
from emberpc.server.services.tasks import end, next_of
from emberpc.server.statuses import status_of
from emberpc.v1 import embedding_pb2 as pb

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
    engine.check_room(stream.embedder.caller)
    stream.take_in(message)
    yield pb.EmbedStreamResponse(model=replies.model_version(stream.embedder.model))
    reading: asyncio.Task[pb.EmbedStreamRequest | None] | None = None
    running: set[asyncio.Task[pb.EmbedStreamResponse]] = set()
    try:
        while True:
            while stream.waiting and len(running) < GROUPS:
                running.add(asyncio.create_task(stream.embed(stream.take_group())))
            if reading is None and message is not None and len(stream.waiting) < GROUP_TEXTS:
                reading = asyncio.create_task(next_of(messages))
            if reading is None and not running:
                return
            await asyncio.wait([*running, *([] if reading is None else [reading])], return_when=asyncio.FIRST_COMPLETED)
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
        await end([*running, reading])


@dataclass
class _Stream:
    """What all groups of a stream have in common, and the items that wait to become one."""

    embedder: BulkEmbedder
    form: EmbeddingForm
    waiting: deque[Item] = field(default_factory=deque)

    @classmethod
    def of(
        cls, engine: Engine, limits: requests.Limits, config: pb.EmbedStreamConfig, context: requests.Context
    ) -> _Stream:
        """Read the config of a stream, and check it."""
        model = engine.model(config.model, Task.EMBEDDING, "config.model")
        form = EmbeddingForm.of(model, config, "config.")
        caller = requests.caller(context, config.priority, Lane.BULK, "config.priority")
        embedder = BulkEmbedder(
            engine,
            limits,
            model,
            form.prompt,
            form.truncation,
            caller,
            requests.request_id(context),
            ending=frozenset({Code.UNAVAILABLE}),
        )
        return cls(embedder, form)

    def take_in(self, message: pb.EmbedStreamRequest) -> None:
        """Take the items of a message."""
        if message.items:
            self.embedder.limits.check_count(len(message.items), "items", "text")
        self.waiting.extend(message.items)

    def take_group(self) -> list[Item]:
        """Take out what waits, up to the size of a group; at least one item."""
        group = [self.waiting.popleft()]
        characters = len(group[0].text)
        while self.waiting and len(group) < GROUP_TEXTS:
            characters += len(self.waiting[0].text)
            if characters > GROUP_CHARACTERS:
                break
            group.append(self.waiting.popleft())
        return group

    async def embed(self, group: Sequence[Item]) -> pb.EmbedStreamResponse:
        """Embed a group; each item of it is in the answer, as a vector or as a failure."""
        response = pb.EmbedStreamResponse()
        good = []
        for item in group:
            if item.id:
                good.append(item)
            else:
                error = invalid("id", "is empty; give each text one, since results come in any order")
                self._fail(response, item, error)
        embedded = await self.embedder.embed([item.text for item in good])
        for i, error in embedded.failures.items():
            self._fail(response, good[i], error)
        outputs: list[Matrix] = []
        for places, inference in embedded.parts:
            response.ids.extend(good[i].id for i in places)
            response.usages.extend(replies.usages(inference))
            outputs.append(inference.output)
        if outputs:
            response.embeddings.CopyFrom(self.form.encode(np.concatenate(outputs)))
        return response

    def _fail(self, response: pb.EmbedStreamResponse, item: Item, error: ServiceError) -> None:
        status = status_of(error, self.embedder.request_id)
        response.failures.append(pb.EmbedStreamFailure(id=item.id, error=status))
