"""Embed the texts of one call, compare the texts of one call, and count their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Task
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import invalid, items_of
from emberpc.server.pipelines.cancel_tasks import cancel_tasks
from emberpc.server.pipelines.limits import Limits

Matrix = npt.NDArray[np.float32]

#: Bytes of a similarity score in the response: a float in a packed field.
_SCORE_BYTES = 4


class InputKind(Enum):
    """The use of a text, as a query or as a passage, which decides which prompt of the model is put before the text."""

    QUERY = "query"
    PASSAGE = "passage"


@dataclass(frozen=True)
class EmbeddingOptions:
    """The options of a request to embed texts.

    Attributes:
        input_kind: decides which prompt is put before each text.
        truncation: the truncation of long texts.
        dimensions: dimensions of the vectors; 0: all dimensions of the model.
        normalize: whether to scale the vectors to length 1; None: as the model's manifest says.
    """

    input_kind: InputKind = InputKind.PASSAGE
    truncation: Truncation = Truncation.REFUSE
    dimensions: int = 0
    normalize: bool | None = None


@dataclass(frozen=True)
class EmbeddedTexts:
    """The vectors of texts.

    Attributes:
        model: the model that embedded the texts.
        vectors: float32 (texts, dimensions), cut and scaled to length 1 as the options say.
        inference: token counts and times, and the unchanged output of the model with all dimensions.
    """

    model: Model
    vectors: Matrix
    inference: Inference


@dataclass(frozen=True)
class SimilarityRequest:
    """Texts to compare: each source with each target.

    Attributes:
        model: name of the model; empty: the only embedding model.
        sources: the sources.
        targets: the targets.
        source_kind: decides which prompt is put before each source.
        target_kind: decides which prompt is put before each target.
        truncation: the truncation of long texts.
    """

    model: str
    sources: Sequence[str]
    targets: Sequence[str]
    source_kind: InputKind
    target_kind: InputKind
    truncation: Truncation


@dataclass(frozen=True)
class Similarities:
    """The similarity of texts.

    Attributes:
        model: the model that embedded the texts.
        scores: float32 (sources, targets): cosines, in [-1, 1]; 0 for a vector of zeros.
        sources: the inference of the sources.
        targets: the inference of the targets.
    """

    model: Model
    scores: Matrix
    sources: Inference
    targets: Inference


@dataclass(frozen=True)
class TokenCounts:
    """The number of tokens of each text, with prompt and special tokens, before truncation; and the model."""

    model: Model
    counts: Sequence[int]


class TextEmbedder:
    """Embeds the texts of a call, compares the texts of a call, and counts their tokens.

    Args:
        engine: the models.
        limits: limits of a call.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits

    async def embed(
        self, model_name: str, texts: Sequence[str], options: EmbeddingOptions, caller: Caller
    ) -> EmbeddedTexts:
        """Return the vectors of texts.

        Args:
            model_name: name of the model; empty: the only embedding model.
            texts: the texts.
            options: how to embed the texts.
            caller: the caller.

        Raises:
            ServiceError: NOT_FOUND if the model is not served; FAILED_PRECONDITION if it is no embedding model, or none
                is served; INVALID_ARGUMENT for no texts, too many texts, a text that is empty or too long, options that
                the model does not support, or if the name is empty and several embedding models are served;
                RESOURCE_EXHAUSTED if the response would be too large or the queue is full; any other error of
                `Inferrer.infer`.
        """
        model = self._engine.model(model_name, Task.EMBEDDING)
        self._check_texts(texts, "texts")
        checked = CheckedOptions.of(model, options)
        # The server holds the vectors as float32 whatever the data type of the response is, so 4 bytes are counted for
        # each number.
        size = 4 * len(texts) * (checked.dimensions or model.manifest.dimensions)
        self._limits.check_response(size, "send fewer texts in one call")
        inference = await self._engine.inferrer.infer(
            InferenceRequest(model, texts, checked.prompt, checked.truncation, items_of("texts"), caller)
        )
        return EmbeddedTexts(model, checked.shape(inference.output), inference)

    async def similarities(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Return the cosine of each source with each target. Sources and targets are embedded concurrently.

        Raises:
            ServiceError: NOT_FOUND if the model is not served; FAILED_PRECONDITION if it is no embedding model, or none
                is served; INVALID_ARGUMENT for no sources, no targets, more sources and targets together than a call
                may have texts, a text that is empty or too long, or if the name is empty and several embedding models
                are served; RESOURCE_EXHAUSTED if the response would be too large or the queue is full; any other error
                of `Inferrer.infer`.
        """
        model = self._engine.model(request.model, Task.EMBEDDING)
        sources, targets = request.sources, request.targets
        self._check_texts(sources, "sources")
        self._check_texts(targets, "targets")
        self._limits.check_count(len(sources) + len(targets), "sources and targets", "text")
        size = _SCORE_BYTES * len(sources) * len(targets)
        self._limits.check_response(size, "compare fewer texts in one call")

        def inference_request(texts: Sequence[str], kind: InputKind, field: str) -> InferenceRequest:
            return InferenceRequest(model, texts, prompt(model, kind), request.truncation, items_of(field), caller)

        sides = [(sources, request.source_kind, "sources"), (targets, request.target_kind, "targets")]
        infer = self._engine.inferrer.infer
        tasks = [asyncio.create_task(infer(inference_request(*side))) for side in sides]
        try:
            source_inference, target_inference = await asyncio.gather(*tasks)
        finally:
            await cancel_tasks(tasks)  # if one side failed, the other is not needed
        source_vectors = shape(source_inference.output, 0, unit=True)
        scores = source_vectors @ shape(target_inference.output, 0, unit=True).T
        return Similarities(model, np.clip(scores, -1, 1), source_inference, target_inference)

    async def count_tokens(self, model_name: str, texts: Sequence[str], kind: InputKind) -> TokenCounts:
        """Count the tokens of each text, with prompt and special tokens, before truncation; a text may be empty.

        Args:
            model_name: name of the model, which may be a classifier. Empty: the only embedding model, or the only model
                if the server has no embedding model.
            texts: the texts.
            kind: decides which prompt is put before each text.

        Raises:
            ServiceError: NOT_FOUND if the model is not served; FAILED_PRECONDITION if no model is served;
                INVALID_ARGUMENT if the name is empty and several models could be meant, or if there are no texts, too
                many texts, or a text that is too long.
        """
        embeds = any(model.manifest.task is Task.EMBEDDING for model in self._engine.models())
        model = self._engine.model(model_name, Task.EMBEDDING if embeds and not model_name else None)
        self._check_texts(texts, "texts", allow_empty=True)
        return TokenCounts(model, await self._engine.inferrer.count_tokens(model, texts, prompt(model, kind)))

    def _check_texts(self, texts: Sequence[str], field: str, *, allow_empty: bool = False) -> None:
        self._limits.check_count(len(texts), field, "text")
        self._limits.check_texts(texts, items_of(field), allow_empty=allow_empty)


@dataclass(frozen=True)
class CheckedOptions:
    """Options that were checked against a model.

    Attributes:
        prompt: the prompt before each text.
        truncation: the truncation of long texts.
        dimensions: number of first dimensions to keep; 0: all.
        unit: whether the model's output must be scaled to length 1 after the cut. False if vectors of length 1 are not
            wanted, or if the output has length 1 already and is not cut.
    """

    prompt: str
    truncation: Truncation
    dimensions: int
    unit: bool

    @classmethod
    def of(cls, model: Model, options: EmbeddingOptions, path: str = "") -> CheckedOptions:
        """Return the options of a request, after a check that the model supports them.

        Args:
            model: the model.
            options: the options.
            path: text before the names of the options in the request, such as `config.`, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT if the model does not support the dimensions, or if `normalize` is False and
                the model's output is always normalized.
        """
        check_dimensions(model, options.dimensions, f"{path}dimensions")
        normalized = model.manifest.normalize
        unit = normalized if options.normalize is None else options.normalize
        if normalized and not unit:
            raise invalid(
                f"{path}normalize", f"is false, and model {model.name!r} gives vectors of length 1 only; leave it"
            )
        return cls(
            prompt(model, options.input_kind),
            options.truncation,
            options.dimensions,
            # A model's normalized output need not be scaled again unless it is cut.
            unit=unit and (bool(options.dimensions) or not normalized),
        )

    def shape(self, output: Matrix) -> Matrix:
        """Return a model's output, float32 (texts, all dimensions), cut and scaled to length 1 as these options say."""
        return shape(output, self.dimensions, unit=self.unit)


def prompt(model: Model, kind: InputKind) -> str:
    """Return the prompt that a model expects before a text of a kind; empty if it expects none."""
    prompts = model.manifest.prompts
    return prompts.query if kind is InputKind.QUERY else prompts.passage


def check_dimensions(model: Model, dimensions: int, field: str = "dimensions") -> None:
    """Raise INVALID_ARGUMENT, naming `field`, unless a model can give vectors of `dimensions` dimensions.

    0 is always valid: it means all dimensions of the model.
    """
    supported = {model.manifest.dimensions, *model.manifest.matryoshka_dimensions} if dimensions else set()
    if dimensions and dimensions not in supported:
        listed = ", ".join(map(str, sorted(supported)))
        fewer = "; fewer dimensions need an export with --matryoshka" if dimensions < max(supported) else ""
        raise invalid(
            field,
            f"is {dimensions}; model {model.name!r} gives vectors of {listed} dimensions, and 0 means "
            f"{model.manifest.dimensions}{fewer}",
        )


def shape(matrix: Matrix, dimensions: int, *, unit: bool) -> Matrix:
    """Cut vectors to their first dimensions, and then scale them to length 1 if `unit` is set.

    Args:
        matrix: float32, shape (rows, all dimensions).
        dimensions: number of first dimensions to keep; 0: all.
        unit: whether to scale the vectors to length 1. A vector of zeros stays unchanged.

    Returns:
        float32, shape (rows, dimensions); without `unit`, `matrix` itself or a view of it.
    """
    cut = matrix[:, :dimensions] if dimensions else matrix
    if not unit:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(np.divide(cut, norms, out=np.zeros_like(cut), where=norms > 0), dtype=np.float32)
