"""Embed a stream of texts of any size in pipelined groups.

One loop reads messages, starts groups and returns results, so that each step limits the one before it. The loop reads
no message while enough texts or characters wait. It starts no group while enough groups or characters run. It does
nothing else while the caller receives a result. A text that is refused is not kept. A stream thus holds at most the
groups that run, one group that waits, and the message of that group, whatever the size of the corpus and however slow
the reader. Texts never wait for a group to fill: a group starts as soon as there is room, so a client may wait for a
result before it sends more texts.
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

#: Start another group only while those that run have fewer characters, unless none runs. A group may be one long text.
_RUNNING_CHARACTERS = GROUPS * GROUP_CHARACTERS

Message = TypeVar("Message")


class StreamText(NamedTuple):
    """A text of a stream with its id. A tuple, since a stream has millions."""

    id: str
    text: str


@dataclass(frozen=True)
class TextMessage:
    """The texts of one message.

    Attributes:
        texts: the texts.
        release: called when fewer than `GROUP_CHARACTERS` characters of the message wait.
    """

    texts: Sequence[StreamText]
    release: Callable[[], None]


class _WaitingText(NamedTuple):
    """A text that waits for a group.

    Attributes:
        id: its id.
        text: the text; empty if it was refused.
        error: the reason for which it was refused.
        release: called when it waits no longer; the last text of a message has it.
    """

    id: str
    text: str
    error: ServiceError | None
    release: Callable[[], None] | None

    @property
    def characters(self) -> int:
        """Return the characters that the stream holds. Ids count, since they have no limit of their own."""
        return len(self.id) + len(self.text)


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
        self._waiting: deque[_WaitingText] = deque()
        self._waiting_characters = 0
        engine.check_room(caller)

    def add(self, message: TextMessage) -> None:
        """Add the texts of a message to those that wait; INVALID_ARGUMENT if there are too many."""
        if message.texts:
            self._limits.check_count(len(message.texts), "items", "text")
        added = [self._checked(text) for text in message.texts]
        characters = sum(text.characters for text in added)
        # Refused texts are not kept: then the message is held no longer, and what is kept of it is not large.
        if characters < GROUP_CHARACTERS:
            message.release()
        else:
            added[-1] = added[-1]._replace(release=message.release)
        self._waiting.extend(added)
        self._waiting_characters += characters

    def _checked(self, text: StreamText) -> _WaitingText:
        """Return a text with the reason for which it is refused. A text that is refused is not kept."""
        error = self._refusal(text)
        return _WaitingText(text.id, text.text if error is None else "", error, None)

    def _refusal(self, text: StreamText) -> ServiceError | None:
        """Return the error of a text that is refused. It is not raised, since its traceback would keep the text."""
        if not text.id:
            return invalid("id", "is empty; give each text an id, since results come in any order")
        problem = self._limits.text_problem(text.text)
        return invalid("text", problem) if problem else None

    async def run(
        self, messages: AsyncIterator[Message], read: Callable[[Message], TextMessage]
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
        #: The groups that run, with their characters.
        running: dict[asyncio.Task[EmbeddedTextGroup], int] = {}
        ended = False
        try:
            while True:
                while self._waiting and len(running) < GROUPS and sum(running.values()) < _RUNNING_CHARACTERS:
                    group = self._take_group()
                    running[asyncio.create_task(self._embed(group))] = sum(text.characters for text in group)
                    del group  # the texts are not kept when the group has ended
                if reading is None and not ended and self._has_room:
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
                    del message  # not kept until the next one comes
                for task in [each for each in running if each.done()]:
                    del running[task]
                    yield task.result()
        finally:
            await cancel_tasks([*running, reading])

    @property
    def _has_room(self) -> bool:
        """Return whether to read another message."""
        return len(self._waiting) < GROUP_TEXTS and self._waiting_characters < GROUP_CHARACTERS

    def _take_group(self) -> list[_WaitingText]:
        """Remove and return a group of the texts that wait; at least one text."""
        group = [self._take()]
        characters = group[0].characters
        while self._waiting and len(group) < GROUP_TEXTS:
            characters += self._waiting[0].characters
            if characters > GROUP_CHARACTERS:
                break
            group.append(self._take())
        return group

    def _take(self) -> _WaitingText:
        """Remove and return the text that waits longest."""
        text = self._waiting.popleft()
        self._waiting_characters -= text.characters
        if text.release is not None:
            text.release()
        return text

    async def _embed(self, texts: Sequence[_WaitingText]) -> EmbeddedTextGroup:
        failures = [(text.id, text.error) for text in texts if text.error is not None]
        valid = [text for text in texts if text.error is None]
        embedded = await self._embedder.embed([text.text for text in valid])
        failures += [(valid[i].id, error) for i, error in embedded.failures.items()]
        ids = [valid[i].id for indexes, _ in embedded.parts for i in indexes]
        inferences = [inference for _, inference in embedded.parts]
        vectors = None
        if inferences:
            vectors = self._options.shape(np.concatenate([inference.output for inference in inferences]))
        return EmbeddedTextGroup(ids, vectors, inferences, failures)
