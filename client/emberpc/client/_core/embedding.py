"""Embed texts, count their tokens, compare and classify them: build requests, decode responses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emberpc.client._core import checks
from emberpc.client._core.details import report
from emberpc.client._core.enums import DTYPES, INPUT_KINDS, PRIORITIES, TRUNCATIONS, value_of
from emberpc.client._core.joined_calls import JoinedCalls, ListCollector
from emberpc.client._core.request_chunks import chunks, divisible
from emberpc.client._core.rpc_call import Call, Method, check_count
from emberpc.client.classification import Classification, LabelScore
from emberpc.client.details import Details
from emberpc.client.exceptions import Internal
from emberpc.client.types import DType, InputKind, Matrix, Priority, Progress, Truncation
from emberpc.v1 import classification_pb2, embedding_pb2
from emberpc.wire import vectors

EMBED = Method("/emberpc.v1.EmbeddingService/Embed", embedding_pb2.EmbedResponse)
COUNT_TOKENS = Method("/emberpc.v1.EmbeddingService/CountTokens", embedding_pb2.CountTokensResponse)
COMPUTE_SIMILARITY = Method("/emberpc.v1.EmbeddingService/ComputeSimilarity", embedding_pb2.ComputeSimilarityResponse)
CLASSIFY = Method("/emberpc.v1.ClassificationService/Classify", classification_pb2.ClassifyResponse)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """The options that `embed` and `embed_stream` share, as the caller gave them; `fields` validates them.

    They are model, purpose of the texts, dimensions, truncation, element type, normalization and priority, with the
    meanings that `Client.embed` documents.
    """

    model: str
    input_kind: InputKind
    dimensions: int
    truncation: Truncation
    dtype: DType
    normalize: bool | None
    priority: Priority

    def fields(self) -> dict[str, Any]:
        """Validate the options and return them as the fields that EmbedRequest and EmbedStreamConfig share.

        Raises:
            InputTypeError: an option has the wrong type.
            InputError: `dimensions` is out of range, an option is not a known word, or `model` has a lone surrogate.
        """
        return {
            "model": checks.text(self.model, "model"),
            "input_kind": value_of("input_kind", self.input_kind, INPUT_KINDS),
            "dimensions": checks.count(self.dimensions, "dimensions"),
            "truncation": value_of("truncation", self.truncation, TRUNCATIONS),
            "dtype": value_of("dtype", self.dtype, DTYPES),
            "normalize": None if self.normalize is None else checks.flag(self.normalize, "normalize"),
            "priority": value_of("priority", self.priority, PRIORITIES),
        }


_CHANGED = "its model was changed meanwhile, or the servers behind the target serve different ones"
_TWO_MODELS = f"the server answered with vectors of two models, which cannot be compared; {_CHANGED}"


class _Rows:
    """Collects the vectors of several responses in one array.

    The array is allocated when the first vectors are added, since their dimensions are not known before.

    Args:
        rows: number of all vectors.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._filled = 0
        self._matrix = np.empty((rows, 0), dtype=np.float32)

    def add(self, part: Matrix) -> None:
        """Add the next vectors: float32, shape (rows of this part, dimensions).

        Raises:
            Internal: the vectors have other dimensions than those before.
        """
        if not self._filled:
            self._matrix = np.empty((self._rows, part.shape[1]), dtype=np.float32)
        if part.shape[1] != self._matrix.shape[1]:
            raise Internal(
                f"the server answered with vectors of {self._matrix.shape[1]} dimensions, then of {part.shape[1]}; "
                f"{_CHANGED}"
            )
        self._matrix[self._filled : self._filled + len(part)] = part
        self._filled += len(part)

    def result(self) -> Matrix:
        """Return the array: float32, shape (rows, dimensions). Call this only when all vectors were added."""
        return self._matrix


def embed(
    texts: Iterable[str], options: EmbedOptions, *, batch_size: int, progress: Progress | None, details: Details | None
) -> JoinedCalls[Matrix, Matrix]:
    """Return the calls of `Client.embed`. A wrong argument raises InputError or InputTypeError."""
    checks.function(details, "details")
    checked = checks.texts(texts, "texts")
    template = embedding_pb2.EmbedRequest(**options.fields())
    fingerprints: set[str] = set()

    def call(first: int, part: list[str]) -> Call[embedding_pb2.EmbedResponse, Matrix]:
        def decode(response: embedding_pb2.EmbedResponse) -> Matrix:
            check_count(response.embeddings.rows, len(part), "vectors")
            fingerprints.add(response.model.fingerprint)
            if len(fingerprints) > 1:
                raise Internal(_TWO_MODELS)
            matrix = vectors.decode(response.embeddings)
            report(details, response, first, len(part))
            return matrix

        request = embedding_pb2.EmbedRequest(texts=part)
        request.MergeFrom(template)
        return Call(EMBED, request, decode, "texts", first, len(part), divisible(call, first, part))

    return JoinedCalls(
        (call(*part) for part in _text_chunks(checked, batch_size)), _Rows(len(checked)), progress=progress
    )


def count_tokens(
    texts: Iterable[str], *, model: str, input_kind: InputKind, batch_size: int, details: Details | None
) -> JoinedCalls[list[int], list[int]]:
    """Return the calls of `Client.count_tokens`. A wrong argument raises InputError or InputTypeError."""
    checks.function(details, "details")
    checked = checks.texts(texts, "texts")
    model = checks.text(model, "model")
    kind = value_of("input_kind", input_kind, INPUT_KINDS)

    def call(first: int, part: list[str]) -> Call[embedding_pb2.CountTokensResponse, list[int]]:
        def decode(response: embedding_pb2.CountTokensResponse) -> list[int]:
            check_count(len(response.token_counts), len(part), "counts")
            report(details, response, first, len(part))
            return list(response.token_counts)

        request = embedding_pb2.CountTokensRequest(model=model, texts=part, input_kind=kind)
        return Call(COUNT_TOKENS, request, decode, "texts", first, len(part))

    return JoinedCalls((call(*part) for part in _text_chunks(checked, batch_size)), ListCollector[int]())


def similarity(
    sources: Iterable[str],
    targets: Iterable[str],
    *,
    model: str,
    source_kind: InputKind,
    target_kind: InputKind,
    truncation: Truncation,
    details: Details | None,
) -> Call[embedding_pb2.ComputeSimilarityResponse, Matrix]:
    """Return the call of `Client.similarity`. A wrong argument raises InputError or InputTypeError."""
    checks.function(details, "details")
    request = embedding_pb2.ComputeSimilarityRequest(
        model=checks.text(model, "model"),
        sources=checks.texts(sources, "sources"),
        targets=checks.texts(targets, "targets"),
        source_kind=value_of("source_kind", source_kind, INPUT_KINDS),
        target_kind=value_of("target_kind", target_kind, INPUT_KINDS),
        truncation=value_of("truncation", truncation, TRUNCATIONS),
    )
    shape = (len(request.sources), len(request.targets))

    def decode(response: embedding_pb2.ComputeSimilarityResponse) -> Matrix:
        check_count(len(response.scores), shape[0] * shape[1], "scores")
        report(details, response)
        return np.array(response.scores, dtype=np.float32).reshape(shape)

    return Call(COMPUTE_SIMILARITY, request, decode)


def classify(
    texts: Iterable[str],
    classifier: str,
    *,
    top_k: int,
    truncation: Truncation,
    priority: Priority,
    batch_size: int,
    progress: Progress | None,
    details: Details | None,
) -> JoinedCalls[list[Classification], list[Classification]]:
    """Return the calls of `Client.classify`. A wrong argument raises InputError or InputTypeError."""
    checks.function(details, "details")
    checked = checks.texts(texts, "texts")
    template = classification_pb2.ClassifyRequest(
        classifier=checks.text(classifier, "classifier"),
        top_k=checks.count(top_k, "top_k"),
        truncation=value_of("truncation", truncation, TRUNCATIONS),
        priority=value_of("priority", priority, PRIORITIES),
    )

    def call(first: int, part: list[str]) -> Call[classification_pb2.ClassifyResponse, list[Classification]]:
        def decode(response: classification_pb2.ClassifyResponse) -> list[Classification]:
            check_count(len(response.classifications), len(part), "classifications")
            report(details, response, first, len(part))
            return [_classification(message) for message in response.classifications]

        request = classification_pb2.ClassifyRequest(texts=part)
        request.MergeFrom(template)
        return Call(CLASSIFY, request, decode, "texts", first, len(part), divisible(call, first, part))

    calls = (call(*part) for part in _text_chunks(checked, batch_size))
    return JoinedCalls(calls, ListCollector[Classification](), progress=progress)


def _text_chunks(texts: list[str], batch_size: int) -> list[tuple[int, list[str]]]:
    # A character counts as 4 bytes, the maximum in UTF-8: counting the exact bytes would take more time.
    return list(chunks(texts, checks.count(batch_size, "batch_size", 1), lambda text: 4 * len(text)))


def _classification(message: classification_pb2.Classification) -> Classification:
    return Classification(
        labels=tuple(message.labels),
        scores=tuple(LabelScore(score.label, score.score) for score in message.scores),
        rejected=message.rejected,
        tokens=message.usage.tokens,
        truncated=message.usage.truncated,
        rejection_score=message.rejection_score if message.HasField("rejection_score") else None,
    )
