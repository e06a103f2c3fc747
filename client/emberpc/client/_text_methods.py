"""The methods of `Client` about texts and what they come to."""

from __future__ import annotations

# What the methods have in common is said once, in the docstring of `Client`.
# ruff: noqa: D417
from collections.abc import Iterable, Iterator

from emberpc.client import _embedding
from emberpc.client._embed_stream import EmbedJob
from emberpc.client._running import Runner
from emberpc.client.types import (
    Classification,
    DType,
    InputKind,
    Matrix,
    Priority,
    Progress,
    StreamedEmbedding,
    StreamItem,
    Truncation,
)


class TextMethods:
    """Embeds, counts, compares and classifies texts; `Client` says what its methods have in common."""

    _runner: Runner

    def embed(
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
        timeout: float | None = None,
    ) -> Matrix:
        """Turn texts into vectors.

        Args:
            texts: the texts, a list or another iterable; at least one, none empty. One str is refused: write `[text]`.
            model: the embedding model; empty: the only one served.
            input_kind: what the texts are for; decides the prompt that the server puts before them.
            dimensions: keep the first so many (Matryoshka); 0: all.
            truncation: what to do with a text of more tokens than the model takes.
            dtype: element type on the wire: `float16` halves the bytes, `int8` quarters them, `binary` keeps signs.
            normalize: whether vectors have length 1; None: as the model was exported.
            priority: `bulk` lets others go first.

        Returns:
            float32, shape (texts, dimensions); row i is the vector of `texts[i]`.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type; nothing was sent.
            EmberpcError: the call failed; see `emberpc.client.exceptions`.
        """
        return self._runner.run(
            _embedding.embed(
                texts,
                model=model,
                input_kind=input_kind,
                dimensions=dimensions,
                truncation=truncation,
                dtype=dtype,
                normalize=normalize,
                priority=priority,
                batch_size=batch_size,
                progress=progress,
            ),
            timeout,
        )

    def embed_stream(
        self,
        items: Iterable[StreamItem],
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
    ) -> Iterator[StreamedEmbedding]:
        """Turn a corpus of any size into vectors; other arguments are those of `embed`.

        Results come as they are ready, in any order, each text exactly once, and
        a bad text fails alone: its result has an error in place of a vector. If
        the connection breaks or the server is restarted, what was not answered
        is sent again.

        Args:
            items: the texts, alone or as (id, text); read as they are needed, in the thread that takes the results.
            batch_size: texts of one request. They are sent when so many are read: where they come slowly, give fewer.
            window: most texts that are read and not yet answered; fewer if they have more than 2**24 characters.
            timeout: seconds in which no text at all is answered, attempts to connect again included.

        Returns:
            The results, to be taken one by one. To stop early, `close()` the iterator or let it go.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument or an item has the wrong type.
            EmberpcError: the stream as a whole failed, as `embed` would; FailedPrecondition if another model is served
                under the name since the stream began. Raised when the next result is asked for.
        """
        job = EmbedJob(
            items,
            model=model,
            input_kind=input_kind,
            dimensions=dimensions,
            truncation=truncation,
            dtype=dtype,
            normalize=normalize,
            priority=priority,
            batch_size=batch_size,
            window=window,
        )
        return self._runner.stream(job, iter(items), timeout)

    def count_tokens(
        self,
        texts: Iterable[str],
        *,
        model: str = "",
        input_kind: InputKind = "passage",
        batch_size: int = 256,
        timeout: float | None = None,
    ) -> list[int]:
        """Count the tokens that texts would use, prompt and special tokens included.

        Arguments and errors are those of `embed`, but a text may be empty.

        Returns:
            Item i: the tokens of `texts[i]`, before any truncation.
        """
        job = _embedding.count_tokens(texts, model=model, input_kind=input_kind, batch_size=batch_size)
        return self._runner.run(job, timeout)

    def similarity(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        model: str = "",
        source_kind: InputKind = "passage",
        target_kind: InputKind = "passage",
        truncation: Truncation = "refuse",
        timeout: float | None = None,
    ) -> Matrix:
        """Compare each source with each target, in one request; other arguments and errors are those of `embed`.

        Args:
            sources: texts; none empty.
            targets: texts to compare them with; none empty.
            source_kind: what the sources are for.
            target_kind: what the targets are for.

        Returns:
            float32, shape (sources, targets): cosine similarities in [-1, 1].
        """
        call = _embedding.similarity(
            sources,
            targets,
            model=model,
            source_kind=source_kind,
            target_kind=target_kind,
            truncation=truncation,
        )
        return self._runner.run_one(call, timeout)

    def classify(
        self,
        texts: Iterable[str],
        classifier: str = "",
        *,
        top_k: int = 0,
        truncation: Truncation = "refuse",
        priority: Priority = "interactive",
        batch_size: int = 256,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> list[Classification]:
        """Give texts labels; other arguments and errors are those of `embed`.

        Args:
            texts: the texts; at least one, none empty.
            classifier: the classifier; empty: the only one there is.
            top_k: most labels to list for a text, best first; 0: all.

        Returns:
            Item i: what `texts[i]` is.
        """
        job = _embedding.classify(
            texts,
            classifier,
            top_k=top_k,
            truncation=truncation,
            priority=priority,
            batch_size=batch_size,
            progress=progress,
        )
        return self._runner.run(job, timeout)
