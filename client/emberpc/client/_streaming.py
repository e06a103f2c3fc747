"""What `embed_stream` has read, sent and got back; nothing here does I/O."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from time import monotonic

from emberpc.client import _checks
from emberpc.client._calls import Call, Method, check_count, chunks
from emberpc.client._words import DTYPES, INPUT_KINDS, PRIORITIES, TRUNCATIONS, value_of
from emberpc.client.exceptions import (
    EmberpcError,
    FailedPrecondition,
    InputError,
    InputTypeError,
    Internal,
    ResourceExhausted,
    Unavailable,
    from_status,
)
from emberpc.client.types import DType, InputKind, Priority, StreamedEmbedding, StreamItem, Truncation
from emberpc.v1 import embedding_pb2 as pb
from emberpc.wire import vectors

EMBED_STREAM = Method("/emberpc.v1.EmbeddingService/EmbedStream", pb.EmbedStreamResponse)

#: From so many characters on that are read and not yet answered, no more texts are read.
_WINDOW_CHARACTERS = 2**24
#: Pauses before a broken stream is opened again, in seconds: the first, and the longest that they grow to.
_PAUSES = (0.1, 2.0)
#: So often a stream is opened that no server has taken yet, as often as gRPC tries any other call.
_OPENINGS = 5


class StreamJob:
    """The texts of one stream that are read and not yet answered, and what is to be sent of them.

    On the wire a text's id is its number, so that the caller's may be anything, and be there twice.

    Attributes:
        call: for errors, and to read answers with.
        exhausted: whether the caller has no more texts.
    """

    def __init__(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        model: str,
        input_kind: InputKind,
        dimensions: int,
        truncation: Truncation,
        dtype: DType,
        normalize: bool | None,
        priority: Priority,
        batch_size: int,
        window: int,
    ) -> None:
        if isinstance(items, (str, bytes)) or not isinstance(items, (Iterable, AsyncIterable)):
            raise InputTypeError(f"items is of type {type(items).__name__}; it must be an iterable of texts")
        config = pb.EmbedStreamConfig(
            model=_checks.text(model, "model"),
            input_kind=value_of("input_kind", input_kind, INPUT_KINDS),
            dimensions=_checks.count(dimensions, "dimensions"),
            truncation=value_of("truncation", truncation, TRUNCATIONS),
            dtype=value_of("dtype", dtype, DTYPES),
            normalize=normalize,
            priority=value_of("priority", priority, PRIORITIES),
        )
        self._window = _checks.count(window, "window", 1)
        self._batch_size = min(_checks.count(batch_size, "batch_size", 1), self._window)
        self._config = pb.EmbedStreamRequest(config=config)
        self.call = Call(EMBED_STREAM, self._config, self._results)
        self.exhausted = False
        self._count = 0
        self._characters = 0
        #: By id on the wire, in the order of reading: the caller's id, and the text.
        self._unanswered: dict[str, tuple[str, str]] = {}
        self._unsent: list[str] = []
        self._refused: list[StreamedEmbedding] = []
        self._fingerprint = ""
        self._greeted = False
        self._openings = 0

    @property
    def may_read(self) -> bool:
        """Whether there is room for the texts of another request."""
        room = (
            self._greeted
            and self._window - len(self._unanswered) >= self._batch_size
            and self._characters < _WINDOW_CHARACTERS
        )
        return room and not self.exhausted

    @property
    def read_enough(self) -> bool:
        """Whether the texts that are read and not sent are enough for a request."""
        read = len(self._unsent) + len(self._refused)
        return self.exhausted or read >= self._batch_size or self._characters >= _WINDOW_CHARACTERS

    @property
    def sent(self) -> bool:
        """Whether `requests` has given all that there is to send."""
        return self.exhausted and self._greeted

    @property
    def done(self) -> bool:
        """Whether every text was answered, and there are no more."""
        return self.exhausted and not self._unanswered

    def add(self, item: StreamItem) -> None:
        """Take in one item of the caller's; a text that cannot be sent is a result already.

        Raises:
            InputTypeError: it is neither a text nor (id, text).
        """
        number = str(self._count)
        if isinstance(item, tuple) and len(item) == 2:
            given, text = item
            if not isinstance(given, str):
                raise InputTypeError(f"items[{number}] has an id of type {type(given).__name__}; it must be a str")
        else:
            given, text = number, item
        self._count += 1
        try:
            text = _checks.text(text, f"items[{number}]")
        except InputError as error:
            self._refused.append(StreamedEmbedding(given, error=error))
            return
        self._unanswered[number] = (given, text)
        self._unsent.append(number)
        self._characters += len(text)

    def refused(self) -> list[StreamedEmbedding]:
        """Return the results of texts that cannot be sent, once."""
        refused, self._refused = self._refused, []
        return refused

    def opening(self) -> list[pb.EmbedStreamRequest]:
        """Return the first message of a connection; what other ones left unanswered is to be sent again.

        Texts follow when the server has answered this one. Until then it may refuse the stream, and grpc.aio may
        report a request that fails to be sent in place of the reason (grpc/grpc#36066).
        """
        self._greeted = False
        self._openings += 1
        self._unsent = list(self._unanswered)
        return [self._config]

    def requests(self) -> Iterator[pb.EmbedStreamRequest]:
        """Return the messages that send what was not sent yet."""
        if not self._greeted:
            return
        keys, self._unsent = self._unsent, []
        items = (pb.EmbedStreamItem(id=key, text=self._unanswered[key][1]) for key in keys)
        # A character has at most four bytes; counting them all is not worth the time.
        for _, part in chunks(items, self._batch_size, lambda item: 4 * len(item.text)):
            yield pb.EmbedStreamRequest(items=part)

    def may_go_on(self, error: EmberpcError) -> bool:
        """Whether another connection may do better: the server went away, has not come yet, or has no room now."""
        passing = isinstance(error, (Unavailable, ResourceExhausted))
        if not self._fingerprint:
            return passing and self._openings < _OPENINGS
        return passing or (isinstance(error, Internal) and not error.reason)

    def take(self, response: pb.EmbedStreamResponse) -> Sequence[StreamedEmbedding]:
        """Return the results in a message of the server.

        Raises:
            Internal: it contradicts itself, or answers what was not asked.
            FailedPrecondition: another model answers than before.
        """
        return self.call.read(response)

    def _results(self, response: pb.EmbedStreamResponse) -> list[StreamedEmbedding]:
        if response.HasField("model"):
            self._check_model(response.model.name, response.model.fingerprint)
        matrix = vectors.decode(response.embeddings)
        check_count(len(matrix), len(response.ids), "vectors")
        check_count(len(response.usages), len(response.ids), "usages")
        # Each vector is copied: one that is kept must not keep all those that came with it.
        results = [
            StreamedEmbedding(self._answered(key), row.copy(), tokens=usage.tokens, truncated=usage.truncated)
            for key, row, usage in zip(response.ids, matrix, response.usages, strict=True)
        ]
        results += [
            StreamedEmbedding(self._answered(failure.id), error=from_status(failure.error))
            for failure in response.failures
        ]
        return results

    def _answered(self, key: str) -> str:
        if key not in self._unanswered:
            raise Internal(f"the server answered text {key!r}, which it was not asked or has answered; it is broken")
        given, text = self._unanswered.pop(key)
        self._characters -= len(text)
        return given

    def _check_model(self, name: str, fingerprint: str) -> None:
        if self._fingerprint and fingerprint != self._fingerprint:
            raise FailedPrecondition(
                f"another model {name!r} is served than when the stream began, and its vectors do not go with those "
                "that came before; begin again",
                reason="MODEL_CHANGED",
                metadata={"model": name},
            )
        self._fingerprint = fingerprint
        self._greeted = True


class Patience:
    """How long a stream may go without a result, and how long to wait before it is opened again.

    Attributes:
        reason: why the last connection broke; None if none has since the last result.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Begin anew: there was a result."""
        self.reason: EmberpcError | None = None
        self._until = monotonic() + self._seconds
        self._pause = _PAUSES[0]

    @property
    def left(self) -> float:
        """Seconds that may still pass."""
        return max(self._until - monotonic(), 0.0)

    def pause(self, error: EmberpcError) -> float | None:
        """Return the seconds to wait before the next try after an error; None if there is no time for one."""
        # grpc.aio may report a request that failed to be sent, as INTERNAL, in place of why (grpc/grpc#36066).
        if self.reason is None or not isinstance(error, Internal):
            self.reason = error
        pause = max(self._pause, error.retry_after or 0.0)
        self._pause = min(2 * self._pause, _PAUSES[1])
        return pause if pause < self.left else None


def ended_early() -> Internal:
    """Return the error for a server that ended a stream without having answered all of it."""
    return Internal("the server ended the stream before it had answered every text; it is another version, or broken")
