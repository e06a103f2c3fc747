"""EmbeddingService: texts to vectors."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Task
from emberpc.server.engine import Engine, Model
from emberpc.server.errors import invalid, items_of
from emberpc.server.services import replies, requests
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc, types_pb2
from emberpc.wire import vectors

Matrix = npt.NDArray[np.float32]


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Serves the embedding models of an engine."""

    def __init__(self, engine: Engine, limits: requests.Limits) -> None:
        self._engine = engine
        self._limits = limits

    async def Embed(self, request: pb.EmbedRequest, context: requests.Context) -> pb.EmbedResponse:
        """Embed texts."""
        model = self._engine.model(request.model, Task.EMBEDDING)
        self._limits.check_count(len(request.texts), "texts", "text")
        self._limits.check_texts(request.texts, items_of("texts"))
        check_dimensions(model, request.dimensions)
        if request.dtype not in types_pb2.DataType.values():
            raise invalid("dtype", f"is {request.dtype}, which is no DataType")
        unit = request.normalize if request.HasField("normalize") else model.manifest.normalize
        if model.manifest.normalize and not unit:
            raise invalid("normalize", f"is false, and model {model.name!r} gives vectors of length 1 only; leave it")
        inference = await self._engine.infer(
            model,
            request.texts,
            requests.prompt(model.manifest.prompts, request.input_kind),
            requests.truncation(request.truncation),
            items_of("texts"),
            requests.caller(context, request.priority),
        )
        matrix = shape(inference.output, request.dimensions, unit=unit)
        return pb.EmbedResponse(
            embeddings=vectors.encode(matrix, request.dtype),
            usages=replies.usages(inference),
            model=replies.model_version(model),
            timings=replies.timings([inference]),
        )

    async def CountTokens(self, request: pb.CountTokensRequest, context: requests.Context) -> pb.CountTokensResponse:
        """Count the tokens of texts."""
        model = self._engine.model(request.model)
        self._limits.check_count(len(request.texts), "texts", "text")
        self._limits.check_texts(request.texts, items_of("texts"), allow_empty=True)
        prompt = requests.prompt(model.manifest.prompts, request.input_kind)
        return pb.CountTokensResponse(
            token_counts=await self._engine.count_tokens(model, request.texts, prompt),
            max_tokens=model.manifest.max_tokens,
            model=replies.model_version(model),
        )

    async def ComputeSimilarity(
        self, request: pb.ComputeSimilarityRequest, context: requests.Context
    ) -> pb.ComputeSimilarityResponse:
        """Compare each source with each target."""
        model = self._engine.model(request.model, Task.EMBEDDING)
        self._limits.check_count(len(request.sources), "sources", "text")
        self._limits.check_texts(request.sources, items_of("sources"))
        self._limits.check_count(len(request.targets), "targets", "text")
        self._limits.check_texts(request.targets, items_of("targets"))
        self._limits.check_count(len(request.sources) + len(request.targets), "sources and targets", "text")
        truncation = requests.truncation(request.truncation)
        prompts, caller = model.manifest.prompts, requests.caller(context)
        sources, targets = await asyncio.gather(
            self._engine.infer(
                model,
                request.sources,
                requests.prompt(prompts, request.source_kind, "source_kind"),
                truncation,
                items_of("sources"),
                caller,
            ),
            self._engine.infer(
                model,
                request.targets,
                requests.prompt(prompts, request.target_kind, "target_kind"),
                truncation,
                items_of("targets"),
                caller,
            ),
        )
        scores = shape(sources.output, 0, unit=True) @ shape(targets.output, 0, unit=True).T
        return pb.ComputeSimilarityResponse(
            scores=np.clip(scores, -1, 1).ravel(),
            rows=len(request.sources),
            columns=len(request.targets),
            usages=[*replies.usages(sources), *replies.usages(targets)],
            model=replies.model_version(model),
            timings=replies.timings([sources, targets]),
        )


def check_dimensions(model: Model, dimensions: int, field: str = "dimensions") -> None:
    """Raise INVALID_ARGUMENT unless a model can give vectors of a size; 0 stands for its own."""
    sizes = sorted({model.manifest.dimensions, *model.manifest.matryoshka_dimensions})
    if dimensions and dimensions not in sizes:
        listed = ", ".join(map(str, sizes))
        raise invalid(field, f"is {dimensions}; model {model.name!r} gives vectors of {listed} dimensions")


def shape(matrix: Matrix, dimensions: int, *, unit: bool) -> Matrix:
    """Cut vectors to their first dimensions and give them length 1.

    Args:
        matrix: float32, shape (rows, all dimensions).
        dimensions: how many to keep; 0: all.
        unit: whether to give them length 1; a vector of zeros stays one.
    """
    cut = matrix[:, :dimensions] if dimensions else matrix
    if not unit:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(np.divide(cut, norms, out=np.zeros_like(cut), where=norms > 0), dtype=np.float32)
