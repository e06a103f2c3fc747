"""Embed the texts of one call, compare texts, and count tokens."""

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
from emberpc.server.pipelines.limits import Limits

Matrix = npt.NDArray[np.float32]

#: Bytes of a similarity score in the response: a packed float.
_SCORE_BYTES = 4


class InputKind(Enum):
    """Which of a model's prompts goes before a text."""

    QUERY = "query"
    PASSAGE = "passage"


@dataclass(frozen=True)
class EmbeddingOptions:
    """How to embed texts, as a request says it.

    Attributes:
        input_kind: which prompt goes before each text.
        truncation: the truncation of long texts.
        dimensions: dimensions of the vectors; 0: all that the model has.
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
        model: the model that made them.
        vectors: float32 (texts, dimensions), as the options say.
        inference: token counts and timings; its output has all dimensions of the model.
    """

    model: Model
    vectors: Matrix
    inference: Inference


@dataclass(frozen=True)
class SimilarityRequest:
    """Texts to compare: each source with each target."""

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
        model: the model that embedded them.
        scores: float32 (sources, targets): cosines, in [-1, 1].
        sources: the inference of the sources.
        targets: the inference of the targets.
    """

    model: Model
    scores: Matrix
    sources: Inference
    targets: Inference


@dataclass(frozen=True)
class TokenCounts:
    """The number of tokens of each text, with the prompt and before truncation, and the model that counted them."""

    model: Model
    counts: Sequence[int]


class TextEmbedder:
    """Embeds the texts of one call.

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

        Raises:
            ServiceError: as `Engine.model` and `Inferrer.infer` do; INVALID_ARGUMENT for wrong texts, or for options
                that the model does not support; RESOURCE_EXHAUSTED if the response would be too large.
        """
        model = self._engine.model(model_name, Task.EMBEDDING)
        self._check_texts(texts, "texts")
        checked = CheckedOptions.of(model, options)
        # The server holds the vectors as float32, whatever the data type of the response.
        size = 4 * len(texts) * (checked.dimensions or model.manifest.dimensions)
        self._limits.check_response(size, "send fewer texts in one call")
        inference = await self._engine.inferrer.infer(
            InferenceRequest(model, texts, checked.prompt, checked.truncation, items_of("texts"), caller)
        )
        return EmbeddedTexts(model, checked.shape(inference.output), inference)

    async def similarities(self, request: SimilarityRequest, caller: Caller) -> Similarities:
        """Compare each source with each target; the sources and targets are embedded concurrently.

        Raises:
            ServiceError: as `embed` does.
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

        source_inference, target_inference = await asyncio.gather(
            self._engine.inferrer.infer(inference_request(sources, request.source_kind, "sources")),
            self._engine.inferrer.infer(inference_request(targets, request.target_kind, "targets")),
        )
        source_vectors = shape(source_inference.output, 0, unit=True)
        scores = source_vectors @ shape(target_inference.output, 0, unit=True).T
        return Similarities(model, np.clip(scores, -1, 1), source_inference, target_inference)

    async def count_tokens(self, model_name: str, texts: Sequence[str], kind: InputKind) -> TokenCounts:
        """Count the tokens of texts; a text may be empty.

        An empty name is the only embedding model, as in `embed`, or the only model if no model embeds texts.

        Raises:
            ServiceError: as `Engine.model` does; INVALID_ARGUMENT for too many or too long texts.
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
    """Options that a model supports.

    Attributes:
        prompt: the prompt before each text.
        truncation: the truncation of long texts.
        dimensions: dimensions to keep; 0: all.
        unit: whether the vectors still have to be scaled to length 1.
    """

    prompt: str
    truncation: Truncation
    dimensions: int
    unit: bool

    @classmethod
    def of(cls, model: Model, options: EmbeddingOptions, path: str = "") -> CheckedOptions:
        """Check the options of a request.

        Args:
            model: the model.
            options: the options.
            path: prefix of the names of the options in the request, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT if the model does not support the dimensions, or cannot return vectors that
                are not scaled to length 1.
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
            # Normalized vectors keep length 1 unless they are cut.
            unit=unit and (bool(options.dimensions) or not normalized),
        )

    def shape(self, output: Matrix) -> Matrix:
        """Return a model's output, float32 (texts, all dimensions), with the dimensions and length of the options."""
        return shape(output, self.dimensions, unit=self.unit)


def prompt(model: Model, kind: InputKind) -> str:
    """Return a model's prompt for a kind of input."""
    prompts = model.manifest.prompts
    return prompts.query if kind is InputKind.QUERY else prompts.passage


def check_dimensions(model: Model, dimensions: int, field: str = "dimensions") -> None:
    """Raise INVALID_ARGUMENT unless a model supports vectors with `dimensions`; 0 stands for all its dimensions."""
    supported = {model.manifest.dimensions, *model.manifest.matryoshka_dimensions} if dimensions else set()
    if dimensions and dimensions not in supported:
        listed = ", ".join(map(str, sorted(supported)))
        raise invalid(field, f"is {dimensions}; model {model.name!r} gives vectors of {listed} dimensions")


def shape(matrix: Matrix, dimensions: int, *, unit: bool) -> Matrix:
    """Cut vectors to their first dimensions and scale them to length 1.

    Args:
        matrix: float32, shape (rows, all dimensions).
        dimensions: dimensions to keep; 0: all.
        unit: whether to scale the vectors to length 1. A vector of zeros stays as it is.

    Returns:
        float32, shape (rows, dimensions); `matrix` itself if nothing changes.
    """
    cut = matrix[:, :dimensions] if dimensions else matrix
    if not unit:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(np.divide(cut, norms, out=np.zeros_like(cut), where=norms > 0), dtype=np.float32)
