# Generated from ../_sync/texts.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about texts: embed texts, count their tokens, compare them, classify them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import embedding
from emberpc.client._core.embed_stream import EmbedStreamState
from emberpc.client._core.embedding import EmbedOptions
from emberpc.client.classification import Classification
from emberpc.client.details import Details
from emberpc.client.types import DType, InputKind, Matrix, Priority, Progress, StreamedEmbedding, StreamItem, Truncation


class AsyncTextMethods:
    """Methods of `AsyncClient` that embed, count, compare and classify texts."""

    _runner: AsyncRunner

    async def embed(
        self,
        texts: Iterable[str],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        dimensions: int = 0,
        truncation: Truncation = "refuse",
        dtype: DType = "float32",
        normalize: bool | None = None,
        priority: Priority = "interactive",
        batch_size: int = 256,
        progress: Progress | None = None,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> Matrix:
        """Embed texts.

        Args:
            texts: a list or another iterable of texts; at least one, none empty or only white space. A single str is
                refused: write `[text]`.
            model: name of the embedding model; empty: the only embedding model of the server.
            input_kind: purpose of the texts; decides which prompt of the model the server puts before each text.
            dimensions: number of first dimensions to return (Matryoshka), one of the model's `matryoshka_dimensions`,
                or all its dimensions; 0: all.
            truncation: how texts with too many tokens are truncated.
            dtype: element type of the vectors in the response: `float32`, 4 bytes for each number; `float16`, 2 bytes;
                `int8`, 1 byte; or `binary`, 1 bit, the sign. The client converts all of them to float32; `binary` gives
                -1 and 1.
            normalize: whether to scale the vectors to length 1; None: as `normalized` of the model states. The server
                refuses False if `normalized` is true.
            priority: urgency of the call; the server may delay `bulk` calls in favour of `interactive` calls.
            batch_size: maximum number of texts of one request.
            progress: called after each response with the number of texts embedded so far; None: no calls.
            details: called with the `ResponseDetails` of each response: the model that answered, times, tokens of the
                texts.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            float32, shape (texts, dimensions); row i is the vector of `texts[i]`.

        Raises:
            InputError: the client refuses an argument; nothing was sent.
            InputTypeError: an argument has the wrong type; nothing was sent.
            EmberpcError: a request failed, for example with NotFound for an unknown model, or with InvalidArgument for
                a text that is empty or has too many tokens; see `emberpc.client.exceptions`.
        """
        options = EmbedOptions(
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority,
        )
        calls = embedding.embed(texts, options, batch_size=batch_size, progress=progress, details=details)
        return await self._runner.run(calls, timeout)

    def embed_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        dimensions: int = 0,
        truncation: Truncation = "refuse",
        dtype: DType = "float32",
        normalize: bool | None = None,
        priority: Priority = "bulk",
        batch_size: int = 64,
        window: int = 1024,
        timeout: float | None = None,
    ) -> AsyncIterator[StreamedEmbedding]:
        """Embed any number of texts. `embed` describes the options in more detail.

        Results arrive as soon as they are ready, in any order. Each text has one result. A text that cannot be embedded
        fails alone: its result has an error instead of a vector. If the connection breaks or the server is restarted,
        the texts without a result are sent again over a new connection.

        Args:
            items: texts, or tuples (id, text). The result has the id; without an id, the number of the text in the
                stream, from "0".
                The iterable is read as needed, in the task that takes the results. It may be asynchronous.
            model: name of the embedding model; empty: the only embedding model of the server.
            input_kind: purpose of the texts; decides which prompt of the model the server puts before each text.
            dimensions: number of first dimensions to return (Matryoshka); 0: all.
            truncation: how texts with too many tokens are truncated. With `refuse`, only these texts fail.
            dtype: element type of the vectors in the responses; the client converts all of them to float32.
            normalize: whether to scale the vectors to length 1; None: as `normalized` of the model states.
            priority: urgency of the call; the server may delay `bulk` calls in favour of `interactive` calls.
            batch_size: maximum number of texts of one request; `window` if that is less. A request is sent when this
                many texts are read, or no further text can be read, so choose a smaller number if the texts arrive
                slowly.
            window: maximum number of texts that are read and have no result yet. Reading also stops while these texts
                have 2**24 characters or more.
            timeout: maximum seconds without a result, attempts to connect again included, but not the time of reading
                `items`; None: the `timeout` of the constructor.

        Returns:
            An iterator over the results.
            To stop early, await `aclose()` of the iterator.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type, and nothing was sent; or, when the next result is taken, an
                item is neither a text nor a tuple (id, text), which ends the stream.
            EmberpcError: the stream as a whole failed; raised when the next result is taken. For example
                FailedPrecondition: the stream had to connect again, and the server then had another model.
        """
        options = EmbedOptions(
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority,
        )
        return self._runner.stream(
            EmbedStreamState(items, options, batch_size=batch_size, window=window), items, timeout
        )

    async def count_tokens(
        self,
        texts: Iterable[str],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        batch_size: int = 256,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Count the tokens of texts, prompt and special tokens included. The model does not run.

        Errors are those of `embed`, but a text may be empty.

        Args:
            texts: a list or another iterable of texts, at least one.
            model: name of the embedding model or classifier; empty: the only embedding model of the server, or the only
                model if no model embeds texts.
            input_kind: purpose of the texts; decides which prompt of the model the server puts before each text.
            batch_size: maximum number of texts of one request.
            details: called with the `ResponseDetails` of each response: the model, and `max_tokens`, the maximum number
                of tokens of a text that the model reads.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Item i is the number of tokens of `texts[i]`, before any truncation.
        """
        calls = embedding.count_tokens(
            texts, model=model, input_kind=input_kind, batch_size=batch_size, details=details
        )
        return await self._runner.run(calls, timeout)

    async def similarity(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        model: str = "",
        source_kind: InputKind = "passage",
        target_kind: InputKind = "passage",
        truncation: Truncation = "refuse",
        details: Details | None = None,
        timeout: float | None = None,
    ) -> Matrix:
        """Compare each source with each target, in one request. Errors are those of `embed`.

        Sources and targets together must be within the server's limit of texts (by default 4096).

        Args:
            sources: texts, at least one, none empty or only white space.
            targets: texts to compare the sources with; at least one, none empty or only white space.
            source_kind: purpose of the sources; decides which prompt of the model the server puts before each source.
            target_kind: purpose of the targets; decides which prompt of the model the server puts before each target.
            model: name of the embedding model; empty: the only embedding model of the server.
            truncation: how texts with too many tokens are truncated.
            details: called with the `ResponseDetails` of the response.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            float32, shape (sources, targets): cosine similarities in [-1, 1]; 0 for a vector of zeros.
        """
        call = embedding.similarity(
            sources,
            targets,
            model=model,
            source_kind=source_kind,
            target_kind=target_kind,
            truncation=truncation,
            details=details,
        )
        return await self._runner.run_one(call, timeout)

    async def classify(
        self,
        texts: Iterable[str],
        classifier: str = "",
        *,
        top_k: int = 0,
        truncation: Truncation = "refuse",
        priority: Priority = "interactive",
        batch_size: int = 256,
        progress: Progress | None = None,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Classify texts. Errors are those of `embed`.

        Args:
            texts: a list or another iterable of texts; at least one, none empty or only white space.
            classifier: name of the classifier; empty: the only classifier of the server.
            top_k: maximum number of labels to return with their probabilities for each text, the most probable first;
                0: all. The predicted labels are not limited.
            truncation: how texts with too many tokens are truncated.
            priority: urgency of the call; the server may delay `bulk` calls in favour of `interactive` calls.
            batch_size: maximum number of texts of one request.
            progress: called after each response with the number of texts classified so far; None: no calls.
            details: called with the `ResponseDetails` of each response.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Item i is the result for `texts[i]`: predicted labels, probabilities, and whether the text is rejected.
        """
        calls = embedding.classify(
            texts,
            classifier,
            top_k=top_k,
            truncation=truncation,
            priority=priority,
            batch_size=batch_size,
            progress=progress,
            details=details,
        )
        return await self._runner.run(calls, timeout)
