"""EmbeddingService: embed texts, compare them, and count their tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

import numpy as np
import numpy.typing as npt

from emberpc.server.engine import Engine, Lane
from emberpc.server.errors import invalid
from emberpc.server.pipelines.embedding import EmbeddingOptions, SimilarityRequest, TextEmbedder
from emberpc.server.pipelines.embedding_stream import EmbeddedTextGroup, EmbeddingStream, StreamText, TextMessage
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services import requests, responses
from emberpc.server.services.record_bytes import varint
from emberpc.server.statuses import status_of
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc, types_pb2
from emberpc.wire import vectors

_DTYPES = frozenset(types_pb2.DataType.values())


class EmbeddingService(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Implements the EmbeddingService of embedding.proto.

    Args:
        engine: the models.
        limits: limits of a call.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._embedder = TextEmbedder(engine, limits)

    async def Embed(self, request: pb.EmbedRequest, context: requests.Context) -> pb.EmbedResponse:
        """Embed the texts of a request, and return their vectors in the order of the texts.

        Errors are those of `TextEmbedder.embed`; INVALID_ARGUMENT, too, for an unknown enum value.
        """
        options = _options(request)
        caller = requests.caller(context, request.priority)
        embedded = await self._embedder.embed(request.model, list(request.texts), options, caller)
        return pb.EmbedResponse(
            embeddings=vectors.encode(embedded.vectors, request.dtype),
            usages=responses.usages(embedded.inference),
            model=responses.model_version(embedded.model),
            timings=responses.timings([embedded.inference]),
        )

    async def EmbedStream(
        self, request_iterator: AsyncIterator[pb.EmbedStreamRequest], context: requests.Context
    ) -> AsyncIterator[pb.EmbedStreamResponse]:
        """Embed the texts of a stream of any length; yield the results in the order in which they are ready.

        The first response has only the model. A text that cannot be embedded does not end the call: its error is in a
        response.

        Raises:
            ServiceError: INVALID_ARGUMENT if the first message has no config, a later message has a config, or the
                config has an unknown enum value; as `EmbeddingStream` and its methods `add` and `run` do.
        """
        first = await anext(request_iterator, None)
        if first is None or not first.HasField("config"):
            raise invalid("config", "is missing; the first message of a stream must have a config")
        # A copy, since a reference to `first.config` would keep the whole message `first` with its texts in memory.
        config, request_id = pb.EmbedStreamConfig(), requests.request_id(context)
        config.CopyFrom(first.config)
        options = _options(config, "config.")
        caller = requests.caller(context, config.priority, Lane.BULK, "config.priority")
        stream = EmbeddingStream(self._engine, self._limits, config.model, options, caller, request_id)
        stream.add(_text_message(request_iterator, first))
        del first
        yield pb.EmbedStreamResponse(model=responses.model_version(stream.model))
        async with aclosing(stream.run(request_iterator, partial(_later_message, request_iterator))) as groups:
            async for group in groups:
                yield _group_response(group, config.dtype, request_id)

    async def CountTokens(self, request: pb.CountTokensRequest, context: requests.Context) -> pb.CountTokensResponse:
        """Return the number of tokens of each text, with prompt and special tokens, before truncation.

        Errors are those of `TextEmbedder.count_tokens`; INVALID_ARGUMENT, too, for an unknown input kind.
        """
        kind = requests.input_kind(request.input_kind)
        counted = await self._embedder.count_tokens(request.model, request.texts, kind)
        return pb.CountTokensResponse(
            token_counts=counted.counts,
            max_tokens=counted.model.manifest.max_tokens,
            model=responses.model_version(counted.model),
        )

    async def ComputeSimilarity(
        self, request: pb.ComputeSimilarityRequest, context: requests.Context
    ) -> pb.ComputeSimilarityResponse:
        """Return the cosine similarity of each source text to each target text.

        Errors are those of `TextEmbedder.similarities`; INVALID_ARGUMENT, too, for an unknown input kind or truncation.
        """
        similarity_request = SimilarityRequest(
            request.model,
            request.sources,
            request.targets,
            requests.input_kind(request.source_kind, "source_kind"),
            requests.input_kind(request.target_kind, "target_kind"),
            requests.truncation(request.truncation),
        )
        found = await self._embedder.similarities(similarity_request, requests.caller(context))
        response = _with_scores(found.scores)
        response.rows, response.columns = found.scores.shape
        response.usages.extend([*responses.usages(found.sources), *responses.usages(found.targets)])
        response.model.CopyFrom(responses.model_version(found.model))
        response.timings.CopyFrom(responses.timings([found.sources, found.targets]))
        return response


def _options(message: pb.EmbedRequest | pb.EmbedStreamConfig, path: str = "") -> EmbeddingOptions:
    """Read the embedding options of a message. The field `dtype` is checked, but is no part of the result.

    Args:
        message: the message.
        path: path of the message in the request, with a dot at the end, such as `config.`; for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT for an enum value that this server does not know.
    """
    if message.dtype not in _DTYPES:
        raise invalid(f"{path}dtype", f"is {message.dtype}, which is not a DataType")
    return EmbeddingOptions(
        requests.input_kind(message.input_kind, f"{path}input_kind"),
        requests.truncation(message.truncation, f"{path}truncation"),
        message.dimensions,
        message.normalize if message.HasField("normalize") else None,
    )


def _text_message(messages: AsyncIterator[pb.EmbedStreamRequest], message: pb.EmbedStreamRequest) -> TextMessage:
    """Convert `message`, the latest of the stream `messages`, to the message of the pipeline.

    The bytes of `message` stay counted in `max_in_flight_bytes` until the pipeline calls `release` of the result.
    """
    return TextMessage([StreamText(item.id, item.text) for item in message.items], requests.hold(messages).release)


def _later_message(messages: AsyncIterator[pb.EmbedStreamRequest], message: pb.EmbedStreamRequest) -> TextMessage:
    """Convert a message that is not the first, as `_text_message` does; INVALID_ARGUMENT if it has a config."""
    if message.HasField("config"):
        raise invalid("config", "is set again; only the first message of a stream may have a config")
    return _text_message(messages, message)


def _group_response(
    group: EmbeddedTextGroup, dtype: types_pb2.DataType.ValueType, request_id: str
) -> pb.EmbedStreamResponse:
    response = pb.EmbedStreamResponse(
        ids=group.ids,
        failures=[pb.EmbedStreamFailure(id=id_, error=status_of(error, request_id)) for id_, error in group.failures],
    )
    for inference in group.inferences:
        response.usages.extend(responses.usages(inference))
    if group.vectors is not None:
        response.embeddings.CopyFrom(vectors.encode(group.vectors, dtype))
    return response


def _with_scores(scores: npt.NDArray[np.float32]) -> pb.ComputeSimilarityResponse:
    """Return a response with only the field `scores`: the items of a float32 array (rows, columns), row by row.

    The response is parsed from bytes. To assign the numbers to the field would copy them one by one, which takes half a
    second for four million numbers and holds the interpreter's lock.
    """
    data = scores.astype("<f4").tobytes()
    field = pb.ComputeSimilarityResponse.DESCRIPTOR.fields_by_name["scores"].number
    # The bytes are tag, length and data, see https://protobuf.dev/programming-guides/encoding/. A packed list of
    # numbers has wire type 2.
    return pb.ComputeSimilarityResponse.FromString(bytes([field << 3 | 2]) + varint(len(data)) + data)
