"""State of one call of `Client.embed_stream`: which texts are read, sent and answered. Nothing here does I/O."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator

from emberpc.client._core import checks
from emberpc.client._core.details import model_version
from emberpc.client._core.embedding import EmbedOptions
from emberpc.client._core.request_chunks import chunks
from emberpc.client._core.rpc_call import Call, Method, check_count
from emberpc.client._core.streams import StreamState
from emberpc.client.details import ModelVersion
from emberpc.client.exceptions import FailedPrecondition, InputError, InputTypeError, Internal, from_status
from emberpc.client.types import StreamedEmbedding, StreamItem
from emberpc.v1 import embedding_pb2 as pb
from emberpc.wire import vectors

EMBED_STREAM = Method("/emberpc.v1.EmbeddingService/EmbedStream", pb.EmbedStreamResponse)

#: Stop reading texts while this many characters or more are read and not yet answered, so that memory stays bounded.
_WINDOW_CHARACTERS = 2**24


class EmbedStreamState(StreamState[StreamItem, pb.EmbedStreamRequest, pb.EmbedStreamResponse, StreamedEmbedding]):
    """The texts of one stream that are read and not yet answered, and the requests that send them.

    On the wire the id of a text is its index in the stream, so that the caller's ids may have any form and occur twice.

    Args:
        items: the caller's texts, each alone or with an id. The constructor only checks that this is an iterable, and
            reads no item; `add` takes each item.
        options: options of the stream.
        batch_size: maximum number of texts of a request.
        window: maximum number of texts that are read and not yet answered.

    Raises:
        InputTypeError: `items` is no iterable, or is a str, bytes or a mapping; or another argument has the wrong type.
        InputError: an option is wrong, or `batch_size` or `window` is out of range.
    """

    def __init__(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        options: EmbedOptions,
        *,
        batch_size: int,
        window: int,
    ) -> None:
        if isinstance(items, checks.SINGLE) or not isinstance(items, (Iterable, AsyncIterable)):
            raise InputTypeError(
                f"items is of type {type(items).__name__}; it must be an iterable of texts or (id, text)"
            )
        config = pb.EmbedStreamConfig(**options.fields())
        super().__init__(batch_size, window)
        self._config = pb.EmbedStreamRequest(config=config)
        self.call = Call(EMBED_STREAM, self._config, self._results)
        self._count = 0
        self._characters = 0
        #: Texts that are read and not yet answered: (the caller's id, the text) by id on the wire, in reading order.
        self._unanswered: dict[str, tuple[str, str]] = {}
        self._unsent: list[str] = []
        self._refused: list[StreamedEmbedding] = []
        self._model: ModelVersion | None = None

    @property
    def waiting(self) -> int:
        """Number of texts that are read and not answered, without those that cannot be sent."""
        return len(self._unanswered)

    @property
    def full(self) -> bool:
        """Whether the texts that are read and not answered have 2**24 characters or more together."""
        return self._characters >= _WINDOW_CHARACTERS

    @property
    def unsent(self) -> int:
        """Number of texts that are read and not sent over the present connection.

        Texts that cannot be sent count until `refused` returns them.
        """
        return len(self._unsent) + len(self._refused)

    def add(self, item: StreamItem) -> None:
        """Add an item of the caller.

        A text with a lone surrogate cannot be sent. It becomes a result with an error, which `refused` returns.

        Raises:
            InputTypeError: the item is neither a str nor a tuple (id, text) of two str.
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
            text = checks.text(text, f"items[{number}]")
        except InputError as error:
            self._refused.append(StreamedEmbedding(given, error=error))
            return
        self._unanswered[number] = (given, text)
        self._unsent.append(number)
        self._characters += len(text)

    def refused(self) -> list[StreamedEmbedding]:
        """Return a result with an error for each text that cannot be sent.

        Only texts that were added since the last call of this method count.
        """
        refused, self._refused = self._refused, []
        return refused

    def first_message(self) -> pb.EmbedStreamRequest:
        """Return the first request of a connection, which has the config, and mark all unanswered texts as not sent."""
        self._unsent = list(self._unanswered)
        return self._config

    def further_messages(self) -> Iterator[pb.EmbedStreamRequest]:
        """Yield the requests with the texts that are not sent yet.

        All these texts are marked as sent when the first request is read, so the iterator must be read to its end.
        """
        keys, self._unsent = self._unsent, []
        items = (pb.EmbedStreamItem(id=key, text=self._unanswered[key][1]) for key in keys)
        # A character counts as 4 bytes, the maximum in UTF-8: counting the exact bytes would take more time.
        for _, part in chunks(items, self.batch_size, lambda item: 4 * len(item.text)):
            yield pb.EmbedStreamRequest(items=part)

    def _results(self, response: pb.EmbedStreamResponse) -> list[StreamedEmbedding]:
        if response.HasField("model"):
            self._check_model(model_version(response.model))
        matrix = vectors.decode(response.embeddings)
        check_count(len(matrix), len(response.ids), "vectors")
        check_count(len(response.usages), len(response.ids), "usages")
        # A row of `matrix` is a view, so a caller that keeps one row would keep the vectors of the whole response in
        # memory. So each row is copied.
        results = [
            StreamedEmbedding(
                self._answered(key), row.copy(), tokens=usage.tokens, truncated=usage.truncated, model=self._model
            )
            for key, row, usage in zip(response.ids, matrix, response.usages, strict=True)
        ]
        results += [
            StreamedEmbedding(self._answered(failure.id), error=from_status(failure.error), model=self._model)
            for failure in response.failures
        ]
        return results

    def _answered(self, key: str) -> str:
        if key not in self._unanswered:
            raise Internal(f"the server answered text {key!r}, which it was not asked or has answered; it is broken")
        given, text = self._unanswered.pop(key)
        self._characters -= len(text)
        return given

    def _check_model(self, model: ModelVersion) -> None:
        known = self._model.fingerprint if self._model else ""
        if known and model.fingerprint != known:
            raise FailedPrecondition(
                f"another model {model.name!r} is served than when the stream began, and its vectors do not go with "
                "those that came before; begin again",
                reason="MODEL_CHANGED",
                metadata={"model": model.name},
            )
        self._model = model
        self.greeted = self.accepted = True
