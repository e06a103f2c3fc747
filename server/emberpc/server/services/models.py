"""ModelService: list, describe, load, reload and unload models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from emberpc.bundle import Task
from emberpc.server.engine import Engine, Loader, Model, OnStage
from emberpc.server.errors import Code, ServiceError
from emberpc.server.paging import decode_token
from emberpc.server.services import requests, responses
from emberpc.v1 import model_pb2 as pb
from emberpc.v1 import model_pb2_grpc

_TASKS = {
    Task.EMBEDDING: pb.MODEL_TASK_EMBEDDING,
    Task.CLASSIFICATION: pb.MODEL_TASK_CLASSIFICATION,
}


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Implements the ModelService of model.proto.

    Args:
        engine: the models.
        loader: loads, reloads and unloads models.
        admin: whether callers may load, reload and unload models. If not, these calls fail with PERMISSION_DENIED.
    """

    def __init__(self, engine: Engine, loader: Loader, *, admin: bool) -> None:
        self._engine = engine
        self._loader = loader
        self._admin = admin

    async def ListModels(self, request: pb.ListModelsRequest, context: requests.Context) -> pb.ListModelsResponse:
        """Return a page of the models, sorted by name; INVALID_ARGUMENT for a wrong page size or page token.

        A page of more than 1 MiB is shortened, but has at least one model.
        """
        size = requests.page_size(request.page_size)
        after = decode_token(request.page_token)
        page, token = responses.model_page(self._engine.models(), after, size, responses.MAX_PAGE_BYTES, describe)
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, context: requests.Context) -> pb.GetModelResponse:
        """Return the description of the model `request.name` (empty: the only model); errors as `Engine.model`."""
        return pb.GetModelResponse(model=describe(self._engine.model(request.name, field="name")))

    async def LoadModel(
        self, request: pb.LoadModelRequest, context: requests.Context
    ) -> AsyncIterator[pb.LoadModelResponse]:
        """Load a bundle or foreign folder and serve it under a new name; yield the progress, then the served model.

        Errors are those of `Loader.load`; PERMISSION_DENIED if callers may not change models.
        """
        self._check_admin()
        async for model, stage in self._follow(
            request.name, lambda on_stage: self._loader.load(request.name, request.path, request.variant, on_stage)
        ):
            yield pb.LoadModelResponse(model=model, stage=stage)

    async def ReloadModel(
        self, request: pb.ReloadModelRequest, context: requests.Context
    ) -> AsyncIterator[pb.ReloadModelResponse]:
        """Load the folder of a served model again, or another folder; yield the progress, then the new model.

        Errors are those of `Loader.reload`, and then the old model stays; PERMISSION_DENIED if callers may not change
        models.
        """
        self._check_admin()
        async for model, stage in self._follow(
            request.name, lambda on_stage: self._loader.reload(request.name, request.path, request.variant, on_stage)
        ):
            yield pb.ReloadModelResponse(model=model, stage=stage)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: requests.Context) -> pb.UnloadModelResponse:
        """Stop serving a model, and wait until the calls that use the model have ended, as `Loader.unload` describes.

        If the caller leaves while the call waits for other changes of models, the model stays; if later, the model is
        unloaded. NOT_FOUND if no model has the name; PERMISSION_DENIED if callers may not change models.
        """
        self._check_admin()
        closed = await asyncio.wrap_future(self._loader.submit(lambda: self._loader.unload(request.name)))
        await asyncio.shield(asyncio.wrap_future(closed))
        return pb.UnloadModelResponse()

    def _check_admin(self) -> None:
        if not self._admin:
            raise ServiceError(
                Code.PERMISSION_DENIED,
                "this server does not let callers change its models; start it with --model-admin to allow that",
                reason="MODEL_ADMIN_OFF",
            )

    async def _follow(self, name: str, change: Callable[[OnStage], Model]) -> AsyncIterator[tuple[pb.Model, str]]:
        """Run a change of a model in the loader, after the changes that were submitted before, and yield its progress.

        Even if the caller leaves, the change runs to its end, unless it still waits when the loader is closed.

        Args:
            name: name of the model.
            change: loads a model and returns it. Its argument is a function that it calls with the name of each stage
                as the stage begins.

        Yields:
            For each stage, a message with only the name of the model and the state LOADING, and the name of the stage;
            at the end, the description of the served model and `ready`.

        Raises:
            ServiceError: as `change` does.
        """
        loop = asyncio.get_running_loop()
        stages: asyncio.Queue[str | None] = asyncio.Queue()

        def on_stage(stage: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped, and no caller waits
                loop.call_soon_threadsafe(stages.put_nowait, stage)

        work = self._loader.submit(lambda: change(on_stage))
        work.add_done_callback(lambda _: on_stage(None))
        while (stage := await stages.get()) is not None:
            yield pb.Model(name=name, state=pb.MODEL_STATE_LOADING), stage
        yield describe(work.result()), "ready"


def describe(model: Model) -> pb.Model:
    """Return the message that describes a served model, with state READY."""
    manifest = model.manifest
    description = pb.Model(
        name=model.name,
        task=_TASKS[manifest.task],
        state=pb.MODEL_STATE_READY,
        base_model=manifest.base_model,
        revision=manifest.revision,
        fingerprint=model.fingerprint,
        classifier_fingerprint=model.classifier_fingerprint,
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
        engine=model.plan.runtime.engine,
        precision=model.plan.runtime.precision,
        engine_reason=model.plan.reason,
        quality=manifest.quality,
    )
    description.load_time.FromDatetime(model.loaded)
    return description
