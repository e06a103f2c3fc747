"""ModelService: which models are served."""

from __future__ import annotations

from emberpc.bundle import Task
from emberpc.server.engine import Engine, Model
from emberpc.server.paging import decode_token, encode_token
from emberpc.server.services import requests
from emberpc.v1 import model_pb2 as pb
from emberpc.v1 import model_pb2_grpc

_TASKS = {
    Task.EMBEDDING: pb.MODEL_TASK_EMBEDDING,
    Task.CLASSIFICATION: pb.MODEL_TASK_CLASSIFICATION,
}


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Describes the models of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(self, request: pb.ListModelsRequest, context: requests.Context) -> pb.ListModelsResponse:
        """List the models by name."""
        size = requests.page_size(request.page_size)
        after = decode_token(request.page_token)
        models = [model for model in self._engine.models() if model.name > after]
        page = models[:size]
        return pb.ListModelsResponse(
            models=[describe(model) for model in page],
            next_page_token=encode_token(page[-1].name) if len(models) > size else "",
        )

    async def GetModel(self, request: pb.GetModelRequest, context: requests.Context) -> pb.GetModelResponse:
        """Describe one model."""
        return pb.GetModelResponse(model=describe(self._engine.model(request.name, field="name")))


def describe(model: Model) -> pb.Model:
    """Say what a model is."""
    manifest = model.manifest
    description = pb.Model(
        name=model.name,
        task=_TASKS[manifest.task],
        state=pb.MODEL_STATE_READY,
        base_model=manifest.base_model,
        revision=manifest.revision,
        fingerprint=model.fingerprint,
        dimensions=manifest.dimensions,
        matryoshka_dimensions=manifest.matryoshka_dimensions,
        pooling=manifest.pooling,
        normalized=manifest.normalize,
        max_tokens=manifest.max_tokens,
        query_prompt=manifest.prompts.query,
        passage_prompt=manifest.prompts.passage,
        labels=manifest.labels,
        multi_label=manifest.multi_label,
        variant=model.variant.name,
        size_bytes=model.size_bytes,
        quality=manifest.quality,
    )
    description.load_time.FromDatetime(model.loaded)
    return description
