"""Build the gRPC server from its parts, run it until SIGTERM or SIGINT, and stop it."""

from __future__ import annotations

import asyncio
import gc
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from emberpc.server import descriptors
from emberpc.server.collections import IndexBackend
from emberpc.server.engine import Engine, Loader, ModelsDirectory, Registry
from emberpc.server.engine.priority import lower_priority
from emberpc.server.errors import ServiceError, StartupError
from emberpc.server.handlers import Handlers, Observe
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.services.classification import ClassificationService
from emberpc.server.services.embedding import EmbeddingService
from emberpc.server.services.index import IndexService, add_index_service
from emberpc.server.services.models import ModelService
from emberpc.server.services.server_info import ServerService
from emberpc.server.settings import Settings
from emberpc.server.stopping import Stopping
from emberpc.server.tuning_task import TuningTask
from emberpc.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    index_pb2,
    model_pb2,
    model_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

log = logging.getLogger(__name__)

#: Seconds between two attempts of `_revive` to start the missing workers.
_REVIVAL_SECONDS = 1.0

#: gRPC's limits of concurrent calls.
#:
#: `max_concurrent_streams` limits the calls of one connection. gRPC counts a call for some time after its response. So
#: if a connection has more concurrent callers than about 0.7 times the limit, gRPC refuses some calls: UNAVAILABLE,
#: "RST_STREAM with error code 7".
#:
#: The two limits of pending requests are for the calls that gRPC queues before the server accepts them. Above
#: `max_pending_requests` (1,000 by default), gRPC cancels queued calls at random; above the hard limit, it cancels each
#: further call. Both are raised far above the defaults: with these, one connection that opened and reset 4,000 calls
#: per second made gRPC cancel health checks of other callers.
_CALLS = (
    ("grpc.max_concurrent_streams", 4096),
    ("grpc.server.max_pending_requests", 2**17),
    ("grpc.server.max_pending_requests_hard_limit", 2**18),
)
#: Maximum number of bytes of a request stream that gRPC receives before the handler reads them: 1 MiB. With
#: `bdp_probe`, the default, gRPC estimates this number from the speed of the network: on a fast network, it held ten
#: messages of 15 MB of a stream whose handler read none of them.
_RECEIVE_AHEAD = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**20))
#: Settings of HTTP/2 pings, in milliseconds: minimum time between two pings of a client during a call without messages;
#: time between two pings of the server; time in which a client must answer.
#:
#: If a client sends pings more often, gRPC's server closes the connection (`too_many_pings`). By default, it accepts
#: one ping in 300 seconds. emberpc's client sends a ping after 30 seconds, and after two pings without data one a
#: minute. The server sends pings to detect clients that vanished without closing the connection.
_KEEPALIVE = (
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (embedding_pb2, "EmbeddingService"),
        (index_pb2, "IndexService"),
        (classification_pb2, "ClassificationService"),
        (model_pb2, "ModelService"),
        (server_pb2, "ServerService"),
    )
)


async def run(
    settings: Settings,
    workers: int,
    pool: ThreadPoolExecutor,
    threads: int,
    models: Future[Registry],
    stopping: Stopping,
) -> None:
    """Serve until SIGTERM or SIGINT. Then let calls in flight finish, for at most `settings.drain_seconds`.

    Calls that take longer are cancelled.

    Args:
        settings: the settings.
        workers: number of threads that run models, without the express worker.
        pool: thread pool for blocking work, such as tokenizing and calls of the index.
        threads: number of threads of the pool, at least 5.
        models: the models that the setting `model` names; they may still be loading.
        stopping: handles the signals. The shutdown waits for work in progress until the deadline of this object.

    Raises:
        StartupError: the address of the server or of the metrics cannot be bound, a model of `models` cannot be served,
            the models directory does not exist, the data directory cannot be used, or Milvus cannot be used.
        RuntimeError: the system gives no thread for any worker.
    """
    loop = asyncio.get_running_loop()
    stopping.listen()
    async with AsyncExitStack() as stack:
        statuses = health.aio.HealthServicer()
        server, address = _bind(settings)

        def on_failure() -> None:
            asyncio.run_coroutine_threadsafe(_revive(engine, workers, statuses), loop)

        index = await loop.run_in_executor(pool, _open_index, settings)
        # The exit stack runs its callbacks in reverse order, so all users of the index stop before the index is closed.
        stack.callback(lambda: index.close(stopping.deadline))
        engine = Engine(
            await asyncio.wrap_future(models),
            pool,
            workers=workers,
            batch_tokens=settings.batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            cache_bytes=settings.cache_bytes,
            on_failure=on_failure,
        )
        loader = Loader(engine.registry, settings.models_dir, settings.named_variants(), settings.named_options())
        stack.callback(lambda: loader.close(stopping.deadline))
        stack.callback(lambda: engine.close(stopping.deadline))
        if settings.models_dir is not None:
            directory = ModelsDirectory(settings.models_dir, engine.registry, loader, settings.named_models())
            await asyncio.wrap_future(loader.submit(directory.poll))
            if settings.watch_models:
                watch = asyncio.create_task(_watch(directory, loader, settings.watch_models))
                stack.callback(watch.cancel)

        limits = Limits(
            settings.max_texts,
            settings.max_text_bytes,
            settings.max_message_bytes,
            settings.max_response_bytes,
            settings.max_queue_tokens,
            settings.max_collections,
        )
        observe = _serve_metrics(settings, engine, index) if settings.metrics_listen else None
        handlers = Handlers(server, observe, limits.counts, settings.max_in_flight_bytes, settings.max_streams)
        # Heavy calls get half of the threads less one, but at least one. Of the other threads, at most two open
        # collections, so at least one is left for short calls.
        index_pool = IndexPool(pool, heavy=max(1, threads // 2 - 1))
        # Waits until all calls of the index have ended, while the event loop runs. `index.close`, a later step of the
        # shutdown, would also wait for them, but would block the event loop.
        stack.push_async_callback(lambda: stopping.finish(index_pool.close()))
        reembedding = ReembeddingJobs(engine, index, index_pool, limits)
        stack.push_async_callback(lambda: stopping.finish(reembedding.close()))
        _register(
            handlers, engine, loader, IndexService(engine, index, index_pool, limits, reembedding), limits, settings
        )
        handlers.add(health_pb2_grpc.add_HealthServicer_to_server, statuses)
        names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        handlers.add(
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflection.aio.ReflectionServicer(names)
        )
        await reembedding.resume()
        await server.start()
        await _set_health(statuses, serving=True)
        gc.enable()
        # ONNX Runtime runs a batch on the thread that calls it, so this thread has the low priority of the workers.
        measuring = ThreadPoolExecutor(1, thread_name_prefix="measure", initializer=lower_priority)
        stack.callback(measuring.shutdown, wait=False, cancel_futures=True)
        tuning = asyncio.create_task(TuningTask(engine, loader, measuring, stopping).run())
        stack.callback(tuning.cancel)
        stopping.serving()
        log.info("serving on %s with %d workers", address, workers)
        await stopping.requested.wait()
        log.info("stopping: up to %g seconds for calls in flight", settings.drain_seconds)
        await statuses.enter_graceful_shutdown()
        await stopping.finish(server.stop(settings.drain_seconds))


async def _revive(engine: Engine, workers: int, statuses: health.aio.HealthServicer) -> None:
    """Start workers in place of those that died; retry until `workers` run, since the system may refuse new threads.

    Each attempt also starts the express worker if it is missing, but nothing is retried for the express worker alone.
    Each attempt sets the health status of the server and its services: NOT_SERVING if no worker runs, else SERVING.
    """
    while (alive := engine.revive()) < workers:
        log.error("only %d of %d workers run; trying to start the others", alive, workers)
        await _set_health(statuses, serving=bool(alive))
        await asyncio.sleep(_REVIVAL_SECONDS)
    log.info("all %d workers run again", workers)
    await _set_health(statuses, serving=True)


def _bind(settings: Settings) -> tuple[grpc.aio.Server, str]:
    """Create the gRPC server and bind its address.

    `run` calls this before it waits for the models, so an address in use is reported at once.

    Returns:
        The server, and its address as HOST:PORT with the real port.

    Raises:
        StartupError: the address is in use, is not an address of this host, or no file descriptor is free.
    """
    server = grpc.aio.server(
        options=[
            # Without this, a second server could listen on the same port, and calls would reach one of them at random.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # gRPC closes a connection whose HTTP/2 handshake takes longer, so that silent connections cannot use up all
            # file descriptors.
            ("grpc.server_handshake_timeout_ms", int(1000 * settings.handshake_seconds)),
            *_CALLS,
            *_RECEIVE_AHEAD,
            *_KEEPALIVE,
        ],
    )
    host = settings.listen.rpartition(":")[0]
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        if descriptors.none_free():
            raise StartupError(f"cannot listen on {settings.listen}: {descriptors.shortage_at_start()}") from error
        raise StartupError(
            f"cannot listen on {settings.listen}: the port is in use, or this host has no such address; stop the other "
            "program, or choose another address with --listen HOST:PORT"
        ) from error
    return server, f"{host}:{port}"


def _serve_metrics(settings: Settings, engine: Engine, index: IndexBackend) -> Observe:
    from emberpc.server.metrics import serve_metrics  # noqa: PLC0415 - slow to import, and few servers need it

    try:
        return serve_metrics(settings.metrics_listen, engine, index).observe
    except (OSError, UnicodeError) as error:  # UnicodeError: the name of the host is not valid in DNS
        if isinstance(error, OSError) and descriptors.is_shortage(error):
            message = f"cannot listen on {settings.metrics_listen}: {descriptors.shortage_at_start()}"
            raise StartupError(message) from error
        raise StartupError(
            f"cannot listen on {settings.metrics_listen}: the port is in use, or this host has no such address; choose "
            "another --metrics-listen"
        ) from error


async def _watch(directory: ModelsDirectory, loader: Loader, seconds: float) -> None:
    """Follow the changes in the models directory until cancelled: call `directory.poll` after each `seconds` seconds.

    The first call is after `seconds` seconds too. An error is logged, and the calls continue.
    """
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.wrap_future(loader.submit(directory.poll))
        except Exception:  # an error must not stop the watching
            log.exception("cannot check the models directory; the next check is in %g seconds", seconds)


def _open_index(settings: Settings) -> IndexBackend:
    return _milvus_index(settings) if settings.index_backend == "milvus" else _embedded_index(settings)


def _embedded_index(settings: Settings) -> IndexBackend:
    from emberpc.server.index import Index  # noqa: PLC0415 - needs hnswlib, which a server on Milvus does not need

    try:
        return Index(
            settings.data_dir,
            record_cache_bytes=settings.record_cache_bytes,
            probe_share=settings.recall_probe,
            max_response_bytes=settings.max_response_bytes,
            max_collections=settings.max_collections,
            max_open=settings.max_open_collections,
            idle_seconds=settings.close_idle_seconds,
        )
    except ServiceError as error:
        raise StartupError(error.message) from error
    except OSError as error:
        what = f"the data directory {settings.data_dir} cannot be used ({error.strerror or type(error).__name__})"
        raise StartupError(f"{what}; see to its disk and permissions, or choose another --data-dir") from error


def _milvus_index(settings: Settings) -> IndexBackend:
    from emberpc.server.milvus import MilvusIndex  # noqa: PLC0415 - needs an extra that few servers install

    try:
        return MilvusIndex(settings.milvus_uri, settings.milvus_token)
    except ServiceError as error:
        raise StartupError(f"{error.message}; or give another --milvus-uri") from error


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
    features = [f"index_backend:{settings.index_backend}", *(["model_admin"] if settings.model_admin else [])]
    handlers.add(server_pb2_grpc.add_ServerServiceServicer_to_server, ServerService(limits, features))


async def _set_health(statuses: health.aio.HealthServicer, *, serving: bool) -> None:
    check = health_pb2.HealthCheckResponse
    for name in ("", *SERVICE_NAMES):
        await statuses.set(name, check.SERVING if serving else check.NOT_SERVING)
