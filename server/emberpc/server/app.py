"""The server as a process: put together, started, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

# gRPC's core would write a line of its own about every failure that is reported here in a better one.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from emberpc.server.cores import usable_cores
from emberpc.server.engine import Engine, Loader, ModelLoadError, ModelsDirectory
from emberpc.server.engine.memory import keep_freed_memory
from emberpc.server.errors import ServiceError
from emberpc.server.handlers import Handlers, Observe
from emberpc.server.index import Index, IndexBackend
from emberpc.server.services.classification import ClassificationService
from emberpc.server.services.embedding import EmbeddingService
from emberpc.server.services.index import IndexService, add_index_service
from emberpc.server.services.models import ModelService
from emberpc.server.services.reembedding import Reembedder
from emberpc.server.services.requests import Limits
from emberpc.server.settings import Settings
from emberpc.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    index_pb2,
    model_pb2,
    model_pb2_grpc,
)

log = logging.getLogger(__name__)

#: How long a thread that runs Python may keep others waiting that want to. A short call changes threads several times;
#: with Python's 5 ms it took 67 ms at the 99th percentile while a call of 10,000 texts was tokenised.
_SWITCH_SECONDS = 0.0005
#: Between tries to start the workers that are missing.
_REVIVAL_SECONDS = 1.0
#: Threads for tokenising, index and disk, beyond one for each worker: a few slow calls must not hold up the others.
_EXTRA_THREADS = 4

SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (embedding_pb2, "EmbeddingService"),
        (index_pb2, "IndexService"),
        (classification_pb2, "ClassificationService"),
        (model_pb2, "ModelService"),
    )
)


class StartupError(Exception):
    """The server cannot start; the message says why and the remedy."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight finish.

    Raises:
        StartupError: the address is taken, a bundle is wrong, or the data directory cannot be used.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        workers = settings.workers or usable_cores()
        pool = stack.enter_context(ThreadPoolExecutor(workers + _EXTRA_THREADS, thread_name_prefix="pool"))
        statuses = health.aio.HealthServicer()
        server, address = _bind(settings)

        def on_failure() -> None:
            asyncio.run_coroutine_threadsafe(_revive(engine, workers, statuses), loop)

        engine = Engine(
            pool,
            workers=workers,
            batch_tokens=settings.batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            cache_bytes=settings.cache_bytes,
            on_failure=on_failure,
        )
        loader = Loader(engine.registry, settings.models_dir, settings.named_variants(), settings.named_options())
        stack.callback(loader.close)
        stack.callback(engine.close)
        index = await loop.run_in_executor(pool, _open_index, settings)
        stack.callback(index.close)
        await loop.run_in_executor(pool, _load_models, engine, settings)
        if settings.models_dir is not None:
            directory = ModelsDirectory(settings.models_dir, engine.registry, loader, settings.named_models())
            await asyncio.wrap_future(loader.submit(directory.poll))
            if settings.watch_models:
                watch = asyncio.create_task(_watch(directory, loader, settings.watch_models))
                stack.callback(watch.cancel)

        handlers = Handlers(server, *([_serve_metrics(settings, engine, index)] if settings.metrics_listen else []))
        limits = Limits(settings.max_texts, settings.max_text_bytes)
        reembedder = Reembedder(engine, index, pool, limits)
        stack.push_async_callback(reembedder.close)
        _register(handlers, engine, loader, IndexService(engine, index, pool, limits, reembedder), limits, settings)
        health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
        reflection.enable_server_reflection((*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await reembedder.resume()
        await server.start()
        await _set_health(statuses, serving=True)
        if not settings.batch_tokens:
            calibrating = loop.run_in_executor(pool, engine.calibrate, settings.data_dir / "calibration.json")
            stack.push_async_callback(asyncio.wait, [calibrating])
        log.info("serving on %s with %d workers", address, workers)
        await stopping.wait()
        log.info("stopping: up to %g seconds for calls in flight", settings.drain_seconds)
        await statuses.enter_graceful_shutdown()
        await server.stop(settings.drain_seconds)


async def _revive(engine: Engine, workers: int, statuses: health.aio.HealthServicer) -> None:
    """Start workers that are missing as soon as the system gives threads again; not ready while there is none."""
    while (alive := engine.revive()) < workers:
        log.error("%d of %d workers are left", alive, workers)
        await _set_health(statuses, serving=bool(alive))
        await asyncio.sleep(_REVIVAL_SECONDS)
    log.info("all %d workers are back", workers)
    await _set_health(statuses, serving=True)


def _bind(settings: Settings) -> tuple[grpc.aio.Server, str]:
    """Make the server and take its address, so that a taken one is known before any model is loaded."""
    server = grpc.aio.server(
        options=[
            # Two servers on one port would share its calls at random; the second must fail instead.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ],
    )
    host = settings.listen.rpartition(":")[0]
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {settings.listen}: it is in use or not an address of this host; choose another --listen"
        ) from error
    return server, f"{host}:{port}"


def _serve_metrics(settings: Settings, engine: Engine, index: IndexBackend) -> Observe:
    from emberpc.server.metrics import serve_metrics  # noqa: PLC0415 - takes time at the start, and few have need of it

    try:
        return serve_metrics(settings.metrics_listen, engine, index).observe
    except OSError as error:
        raise StartupError(
            f"cannot listen on {settings.metrics_listen}: it is in use or not an address of this host; choose another "
            "--metrics-listen"
        ) from error


async def _watch(directory: ModelsDirectory, loader: Loader, seconds: float) -> None:
    """Look into the models directory again and again."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.wrap_future(loader.submit(directory.poll))
        except Exception:  # whatever one look runs into, the next ones must come
            log.exception("a look into the models directory failed; the next one is in %g seconds", seconds)


def _open_index(settings: Settings) -> IndexBackend:
    if settings.index_backend == "milvus":
        return _milvus_index(settings)
    try:
        return Index(
            settings.data_dir, record_cache_bytes=settings.record_cache_bytes, probe_share=settings.recall_probe
        )
    except ServiceError as error:
        raise StartupError(error.message) from error


def _milvus_index(settings: Settings) -> IndexBackend:
    try:
        from emberpc.server.milvus import MilvusIndex  # noqa: PLC0415 - an extra, which few have need of
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--index-backend milvus needs {error.name}, which is not installed; run: pip install 'emberpc[milvus]'"
        ) from error
    try:
        return MilvusIndex(settings.milvus_uri, settings.milvus_token)
    except ServiceError as error:
        raise StartupError(f"{error.message}; or give another --milvus-uri") from error


def _load_models(engine: Engine, settings: Settings) -> None:
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        raise StartupError(f"--models-dir: there is no folder {settings.models_dir}; make it, or name another")
    variants, options = settings.named_variants(), settings.named_options()
    for name, folder in settings.named_models().items():
        try:
            model = engine.load(name, folder, variants.get(name, ""), options.get(name, {}))
        except ModelLoadError as error:
            raise StartupError(str(error)) from error
        log.info("model %s (%s, %s) from %s", name, model.manifest.task.value, model.variant.name, folder)


def _register(
    handlers: Handlers,
    engine: Engine,
    loader: Loader,
    index: IndexService,
    limits: Limits,
    settings: Settings,
) -> None:
    handlers.add(embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server, EmbeddingService(engine, limits))
    handlers.add(add_index_service, index)
    handlers.add(
        classification_pb2_grpc.add_ClassificationServiceServicer_to_server, ClassificationService(engine, limits)
    )
    handlers.add(
        model_pb2_grpc.add_ModelServiceServicer_to_server, ModelService(engine, loader, admin=settings.model_admin)
    )


async def _set_health(statuses: health.aio.HealthServicer, *, serving: bool) -> None:
    check = health_pb2.HealthCheckResponse
    for name in ("", *SERVICE_NAMES):
        await statuses.set(name, check.SERVING if serving else check.NOT_SERVING)
