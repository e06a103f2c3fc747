"""Embed a stream of texts of any size in pipelined groups.

One loop reads messages, starts groups and returns results, so that each step limits the one before it. The loop reads
no message while enough texts wait. It starts no group while enough groups run. It does nothing else while the caller
receives a result. A stream thus holds at most the groups that run, one group that waits, and the message of that
group, whatever the size of the corpus and however slow the reader. Texts never wait for a group to fill: a group starts
as soon as there is room, so a client may wait for a result before it sends more texts.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from emberpc.bundle import Task
from emberpc.server.engine import Caller, Engine, Inference, Model
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.pipelines.bulk_embedding import GROUP_CHARACTERS, GROUP_TEXTS, GROUPS, BulkEmbedder
from emberpc.server.pipelines.embedding import CheckedOptions, EmbeddingOptions, Matrix
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.stream_tasks import cancel_tasks, next_message

Message = TypeVar("Message")


class StreamText(NamedTuple):
    """A text of a stream with its id. A tuple, since a stream has millions."""

    id: str
    text: str


@dataclass(frozen=True)
class EmbeddedTextGroup:
    """The results of a group of texts; each text has a vector or a failure.

    Attributes:
        ids: ids of the texts with vectors.
        vectors: float32 (ids, dimensions); None if there are no ids.
        inferences: the inferences of these texts; together they have the order of `ids`.
        failures: ids and errors of the other texts.
    """

    ids: Sequence[str]
    vectors: Matrix | None
    inferences: Sequence[Inference]
    failures: Sequence[tuple[str, ServiceError]]


class EmbeddingStream:
    """Embeds the texts of one stream.

    Args:
        engine: the models.
        limits: limits of a message and a text.
        model_name: name of the model.
        options: the options of the stream.
        caller: the caller.
        request_id: the request id, for the log.

    Raises:
        ServiceError: as `Engine.model` does; INVALID_ARGUMENT for options that the model does not support;
            RESOURCE_EXHAUSTED if the queue is full.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        model_name: str,
        options: EmbeddingOptions,
        caller: Caller,
        request_id: str,
    ) -> None:
        self.model: Model = engine.model(model_name, Task.EMBEDDING, "config.model")
        self._options = CheckedOptions.of(self.model, options, "config.")
        self._limits = limits
        self._embedder = BulkEmbedder(
            engine,
            limits,
            self.model,
            self._options.prompt,
            self._options.truncation,
            caller,
            request_id,
            ending=frozenset({Code.UNAVAILABLE}),
        )
        self._waiting: deque[StreamText] = deque()
        engine.check_room(caller)

    def add(self, texts: Sequence[StreamText]) -> None:
        """Add the texts of a message to those that wait; INVALID_ARGUMENT if there are too many."""
        if texts:
            self._limits.check_count(len(texts), "items", "text")
        self._waiting.extend(texts)

    async def run(
        self, messages: AsyncIterator[Message], read: Callable[[Message], Sequence[StreamText]]
    ) -> AsyncGenerator[EmbeddedTextGroup, None]:
        """Embed the texts that wait and those of all messages; yield groups in the order in which they are ready.

        Args:
            messages: the messages.
            read: returns the texts of a message.

        Raises:
            ServiceError: as `read` and `add` do; UNAVAILABLE if the server stops or has no workers. All other errors
                fail single texts.
        """
        reading: asyncio.Task[Message | None] | None = None
        running: set[asyncio.Task[EmbeddedTextGroup]] = set()
        ended = False
        try:
            while True:
                while self._waiting and len(running) < GROUPS:
                    running.add(asyncio.create_task(self._embed(self._take_group())))
                if reading is None and not ended and len(self._waiting) < GROUP_TEXTS:
                    reading = asyncio.create_task(next_message(messages))
                if reading is None and not running:
                    return
                tasks = [*running, *([] if reading is None else [reading])]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if reading is not None and reading.done():
                    message, reading = reading.result(), None
                    if message is None:
                        ended = True
                    else:
                        self.add(read(message))
                for task in [each for each in running if each.done()]:
                    running.remove(task)
                    yield task.result()
        finally:
            await cancel_tasks([*running, reading])

    def _take_group(self) -> list[StreamText]:
        """Remove and return a group of the texts that wait; at least one text."""
        group = [self._waiting.popleft()]
        characters = len(group[0].text)
        while self._waiting and len(group) < GROUP_TEXTS:
            characters += len(self._waiting[0].text)
            if characters > GROUP_CHARACTERS:
                break
            group.append(self._waiting.popleft())
        return group

    async def _embed(self, texts: Sequence[StreamText]) -> EmbeddedTextGroup:
        failures: list[tuple[str, ServiceError]] = []
        valid = []
        for text in texts:
            if text.id:
                valid.append(text)
            else:
                error = invalid("id", "is empty; give each text an id, since results come in any order")
                failures.append((text.id, error))
        embedded = await self._embedder.embed([text.text for text in valid])
        failures += [(valid[i].id, error) for i, error in embedded.failures.items()]
        ids = [valid[i].id for indexes, _ in embedded.parts for i in indexes]
        inferences = [inference for _, inference in embedded.parts]
        vectors = None
        if inferences:
            vectors = self._options.shape(np.concatenate([inference.output for inference in inferences]))
        return EmbeddedTextGroup(ids, vectors, inferences, failures)
