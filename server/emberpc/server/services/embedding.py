"""EmbeddingService: texts to vectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Task
from emberpc.server.engine import Engine
from emberpc.server.errors import items_of
from emberpc.server.services import replies, requests
from emberpc.server.services.forms import EmbeddingForm, shape
from emberpc.server.services.streaming import embed_stream
from emberpc.server.services.wire_hits import varint
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc

#: Bytes of a score of ComputeSimilarity, a packed float.
_SCORE_BYTES = 4


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Serves the embedding models of an engine."""

    def __init__(self, engine: Engine, limits: requests.Limits) -> None:
        self._engine = engine
        self._limits = limits

    async def Embed(self, request: pb.EmbedRequest, context: requests.Context) -> pb.EmbedResponse:
        """Embed texts."""
        model = self._engine.model(request.model, Task.EMBEDDING)
        texts = list(request.texts)
        self._limits.check_count(len(texts), "texts", "text")
        self._limits.check_texts(texts, items_of("texts"))
        form = EmbeddingForm.of(model, request)
        self._limits.check_response(len(texts) * form.bytes_per_text(model), "send fewer texts in one call")
        inference = await self._engine.infer(
            model,
            texts,
            form.prompt,
            form.truncation,
            items_of("texts"),
            requests.caller(context, request.priority),
        )
        return pb.EmbedResponse(
            embeddings=form.encode(inference.output),
            usages=replies.usages(inference),
            model=replies.model_version(model),
            timings=replies.timings([inference]),
        )

    def EmbedStream(
        self, request_iterator: AsyncIterator[pb.EmbedStreamRequest], context: requests.Context
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """Embed a corpus of any size."""
        return embed_stream(self._engine, self._limits, request_iterator, context)

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
        size = _SCORE_BYTES * len(request.sources) * len(request.targets)
        self._limits.check_response(size, "compare fewer texts in one call")
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
        response = _with_scores(np.clip(scores, -1, 1))
        response.rows, response.columns = len(request.sources), len(request.targets)
        response.usages.extend([*replies.usages(sources), *replies.usages(targets)])
        response.model.CopyFrom(replies.model_version(model))
        response.timings.CopyFrom(replies.timings([sources, targets]))
        return response


def _with_scores(scores: npt.NDArray[np.float32]) -> pb.ComputeSimilarityResponse:
    """Return a response with scores, float32 (rows, columns).

    From bytes: protobuf takes one number after the other from an array, half a second for four million, and holds the
    interpreter meanwhile.
    """
    data = scores.astype("<f4").tobytes()
    field = pb.ComputeSimilarityResponse.DESCRIPTOR.fields_by_name["scores"].number
    # A tag and a length, as of https://protobuf.dev/programming-guides/encoding/: packed numbers have wire type 2.
    return pb.ComputeSimilarityResponse.FromString(bytes([field << 3 | 2]) + varint(len(data)) + data)
