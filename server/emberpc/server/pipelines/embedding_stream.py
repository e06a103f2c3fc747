"""Embed a stream of texts of any size, in groups that run concurrently.

One loop reads messages, starts groups and yields results, so the loop pauses while the caller receives a result. The
loop reads a message only while fewer than 64 texts with fewer than 65,536 characters wait. It starts a group only while
fewer than 8 groups with fewer than 524,288 characters run. The content of a refused text is dropped. So a stream holds
at most 8 groups with their results, less than one group of waiting texts, and the latest message, however many texts it
has and however slowly the caller reads. The loop does not wait for a group to fill, so a client may wait for a result
before it sends more texts.
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
from emberpc.server.pipelines.cancel_tasks import cancel_tasks
from emberpc.server.pipelines.embedding import CheckedOptions, EmbeddingOptions, Matrix
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.next_message import next_message

#: Another group is started only while the running groups together have fewer characters than this. A limit of the
#: number of groups would not suffice, since a group may be one long text.
_RUNNING_CHARACTERS = GROUPS * GROUP_CHARACTERS

Message = TypeVar("Message")


class StreamText(NamedTuple):
    """A text of a stream with its id. It is a tuple, which is quick to create, since a stream may have millions."""

    id: str
    text: str


@dataclass(frozen=True)
class TextMessage:
    """The texts of one message.

    Attributes:
        texts: the texts; may be empty.
        release: the stream calls this once, when it keeps little of the message: in `add` if all ids and the accepted
            texts have fewer than 65,536 characters together, otherwise when the last text is taken into a group. Not
            called if `add` fails, or if the stream ends before.
    """

    texts: Sequence[StreamText]
    release: Callable[[], None]


class _WaitingText(NamedTuple):
    """A text that waits for a group.

    Attributes:
        id: id of the text; empty if the client gave none.
        text: the text; empty if the text was refused.
        error: the error of a text that was refused; None for other texts.
        release: called when the text is taken into a group; None except for the last text of a message that `add` did
            not release.
    """

    id: str
    text: str
    error: ServiceError | None
    release: Callable[[], None] | None

    @property
    def characters(self) -> int:
        """Return the number of characters of id and text. Ids are counted, since an id has no limit of its own."""
        return len(self.id) + len(self.text)


@dataclass(frozen=True)
class EmbeddedTextGroup:
    """The results of a group of texts; each text has a vector or a failure.

    Attributes:
        ids: ids of the texts with vectors.
        vectors: float32 (ids, dimensions), as the options of the stream demand: row i belongs to `ids[i]`; None if
            there are no ids.
        inferences: the inferences of the texts in `ids`: several if the group was split after an error. Their rows,
            one inference after the other, are in the order of `ids`.
        failures: the id and the error of each text without a vector.
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
        model_name: name of the model; empty: the only embedding model.
        options: how to embed the texts.
        caller: the caller, with lane and deadline.
        request_id: the request id, for the log.

    Raises:
        ServiceError: NOT_FOUND if the model is not served; FAILED_PRECONDITION if the model is no embedding model, or
            the name is empty and no embedding model is served; INVALID_ARGUMENT for options that the model does not
            support, or if the name is empty and several embedding models are served; RESOURCE_EXHAUSTED if the queue is
            full, or so long that the deadline would probably pass.
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
        engine.check_space(caller)

    def add(self, message: TextMessage) -> None:
        """Add the texts of a message to the waiting texts; release the message if little of it is kept.

        A text without an id, or one that is empty or has too many bytes, is added without its content and fails alone.

        Raises:
            ServiceError: INVALID_ARGUMENT if the message has too many texts; no text is added.
        """
        if message.texts:
            self._limits.check_count(len(message.texts), "items", "text")
        added = [self._checked(text) for text in message.texts]
        characters = sum(text.characters for text in added)
        # `characters` counts only what is kept of the message: the ids and the accepted texts. If that is little, the
        # message need not count in `max_in_flight_bytes` any longer.
        if characters < GROUP_CHARACTERS:
            message.release()
        else:
            added[-1] = added[-1]._replace(release=message.release)
        self._waiting.extend(added)
        self._waiting_characters += characters

    def _checked(self, text: StreamText) -> _WaitingText:
        """Return a waiting text for a text of the stream. If the text is refused, it has an error and no content."""
        error = self._refusal(text)
        return _WaitingText(text.id, text.text if error is None else "", error, None)

    def _refusal(self, text: StreamText) -> ServiceError | None:
        """Return the error of a text without an id, or one that is empty or has too many bytes; None for other texts.

        The error is not raised, since its traceback would keep the text in memory.
        """
        if not text.id:
            return invalid("id", "is empty; give each text an id, since results come in any order")
        problem = self._limits.text_problem(text.text)
        return invalid("text", problem) if problem else None

    async def run(
        self, messages: AsyncIterator[Message], read: Callable[[Message], TextMessage]
    ) -> AsyncGenerator[EmbeddedTextGroup, None]:
        """Embed the waiting texts and the texts of all further messages; yield the results of each group after its end.

        If the generator is closed early, the groups that run are cancelled. Call this once.

        Args:
            messages: the further messages of the stream.
            read: returns the texts of a message.

        Raises:
            ServiceError: INVALID_ARGUMENT if a message has too many texts; UNAVAILABLE if the server stops or has no
                workers; any error of `messages` or `read`. Any other ServiceError of the engine fails only the text
                that causes it, or all texts that were run together, as when the queue is full for 20 seconds.
        """
        reading: asyncio.Task[Message | None] | None = None
        #: The tasks of the groups whose results were not yielded yet, each with the number of its characters.
        running: dict[asyncio.Task[EmbeddedTextGroup], int] = {}
        ended = False
        try:
            while True:
                while self._waiting and len(running) < GROUPS and sum(running.values()) < _RUNNING_CHARACTERS:
                    group = self._take_group()
                    running[asyncio.create_task(self._embed(group))] = sum(text.characters for text in group)
                    del group  # the texts are not kept when the group has ended
                if reading is None and not ended and self._has_space:
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
    def _has_space(self) -> bool:
        """Return whether to read another message: fewer than 64 texts wait, with fewer than 65,536 characters.

        The characters of the ids count too.
        """
        return len(self._waiting) < GROUP_TEXTS and self._waiting_characters < GROUP_CHARACTERS

    def _take_group(self) -> list[_WaitingText]:
        """Remove and return the next group of the waiting texts, the oldest first. At least one text must wait.

        A group has at most 64 texts with at most 65,536 characters together, ids included. A single text may have more.
        """
        group = [self._take()]
        characters = group[0].characters
        while self._waiting and len(group) < GROUP_TEXTS:
            characters += self._waiting[0].characters
            if characters > GROUP_CHARACTERS:
                break
            group.append(self._take())
        return group

    def _take(self) -> _WaitingText:
        """Remove and return the text that has waited longest; call its `release` if it has one."""
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
