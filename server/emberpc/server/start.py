"""Start the server process. Slow steps run concurrently: most imports, loading models, and the check of hnswlib."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING

from emberpc.bundle.cores import usable_cores
from emberpc.server import descriptors
from emberpc.server.errors import StartupError
from emberpc.server.memory import keep_freed_memory, limit_heaps
from emberpc.server.portable import hnswlib_problem
from emberpc.server.settings import Settings
from emberpc.server.stopping import Stopping

if TYPE_CHECKING:
    from emberpc.server.engine import Registry

log = logging.getLogger(__name__)

#: Seconds after which a thread that runs Python must let a waiting thread run (`sys.setswitchinterval`). A short call
#: changes threads several times, and may wait at each change. With Python's default of 0.005, the 99th percentile of
#: the latency of short calls was 67 ms while another call with 10,000 texts was tokenized.
_SWITCH_SECONDS = 0.0005
#: Number of threads of the pool in addition to one per worker. The pool runs tokenizing, calls of the index and work on
#: the disk; with these threads, a few slow calls do not delay other calls.
_EXTRA_THREADS = 4
#: Minimum limit of the address space in MiB: for the process, and in addition for each worker, whose thread has its own
#: stack and heap. With a lower limit, a library may end the process by a signal. Measured with two workers: 600 MB are
#: too little, 700 MB are enough.
_ADDRESS_SPACE, _ADDRESS_SPACE_OF_WORKER = 640, 64
#: Name of the logger of gRPC's event loop.
_GRPC_LOGGER = "grpc._cython.cygrpc"
#: Minimum limit of the open files of the process. With a limit of 20 the data directory cannot be opened, and each open
#: collection has at most 11 open files.
_OPEN_FILES = 64


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight finish.

    The drain time begins at the signal: `drain_seconds`, or 0 s if the server does not serve yet. At most two seconds
    after the drain time, this function returns or ends the process: with exit code 0, or with 1 if a library call holds
    the interpreter lock until then. The function changes settings of the whole process: logging, limit of open files,
    number of glibc's heaps, garbage collection, switch interval, signal handlers.

    Raises:
        StartupError: there is too little address space, the limit of open files is too low, an address cannot be used,
            a model cannot be served, the models directory does not exist, the data directory cannot be used, hnswlib
            does not run on this processor, or Milvus cannot be used.
    """
    # Garbage collection would take an eighth of the time of the start for nothing: imports create many objects, but no
    # garbage. `run` of `emberpc.server.app` turns it on again when the server serves.
    gc.disable()
    set_up_logging(settings.log_level)
    before, now = descriptors.raise_limit()
    if now > before:
        log.info("raised the limit of file descriptors from %d to %d", before, now)
    _check_open_files()
    sys.setswitchinterval(_SWITCH_SECONDS)
    workers = settings.workers or usable_cores()
    _check_address_space(workers)
    limit_heaps(max(2, workers))
    # The module is imported here, before other threads use it: if two threads import the same modules at a time, one
    # may see a module that is not initialized yet.
    import_module("emberpc.server.engine")
    threads = workers + _EXTRA_THREADS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pool")
    stopping = Stopping(settings.drain_seconds)
    try:
        models = pool.submit(_load_models, settings, workers, pool)
        if settings.index_backend == "embedded":
            if problem := hnswlib_problem(settings.data_dir, lambda: import_module("emberpc.server.handlers")):
                raise StartupError(problem)
            import_module("emberpc.server.index")
        from emberpc.server.app import run  # noqa: PLC0415 - its import takes as long as loading a model

        asyncio.run(run(settings, workers, pool, threads, models, stopping))
    finally:
        # A `with` block of the pool would always wait for the pool's threads without a limit. `end` waits until the
        # deadline of the shutdown. There is no deadline if no signal came, as after a StartupError.
        stopping.end(pool)


def set_up_logging(level: str) -> None:
    """Log to stderr.

    gRPC logs an error with a traceback if it cannot send a response or a status. The usual reason is that the caller
    left at that moment. Such an error is logged as a warning without the traceback, which has frames of gRPC only.

    Args:
        level: minimum level of the messages that are logged, such as `info`.
    """
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger(_GRPC_LOGGER).addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Change gRPC's error about a response that it cannot send to a warning; return True, which keeps the record."""
    if str(record.msg).startswith("ExecuteBatchError raised in core"):
        record.msg = f"a response or a status could not be sent; the caller may have left: {record.getMessage()}"
        record.args = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.exc_info = record.exc_text = None
    return True


def _check_open_files() -> None:
    """Check that the process may have 64 open files: enough for the server, a collection and some connections.

    Raises:
        StartupError: the limit is lower.
    """
    if (limit := descriptors.limit()) < _OPEN_FILES:
        raise StartupError(
            f"the process may have only {limit} open files (RLIMIT_NOFILE); the server needs at least {_OPEN_FILES}, "
            "and 1024 or more for many collections or connections; raise the limit (ulimit -n, LimitNOFILE of systemd)"
        )


def _check_address_space(workers: int) -> None:
    """Check that the limit of the process's address space is enough for the server, without models.

    Args:
        workers: number of threads that run models.

    Raises:
        StartupError: the limit is less than 640 MiB plus 64 MiB for each worker.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = _ADDRESS_SPACE + _ADDRESS_SPACE_OF_WORKER * workers
    if limit != resource.RLIM_INFINITY and limit < needed * 2**20:
        raise StartupError(
            f"the address space of the process is limited to {limit // 2**20} MiB (RLIMIT_AS, `ulimit -v`); with "
            f"{workers} workers it needs at least {needed} MiB, and more for models; raise or remove the limit, or "
            "give fewer --workers"
        )


def _load_models(settings: Settings, workers: int, pool: Executor) -> Registry:
    """Load the models of the setting `model`. The bundles in the models directory are loaded later, by `run`.

    First make glibc keep freed memory, see `keep_freed_memory`.

    Args:
        settings: the settings.
        workers: number of threads that run models, without the express worker.
        pool: thread pool in which the registry frees the memory of unloaded models.

    Returns:
        The registry, which has these models.

    Raises:
        StartupError: a model cannot be served, or the models directory does not exist.
    """
    from emberpc.server.engine import ModelLoadError, Registry  # noqa: PLC0415 - imported by `serve`
    from emberpc.server.measure_models import runtimes_of  # noqa: PLC0415 - imports the engine, too

    keep_freed_memory()
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        raise StartupError(f"--models-dir: there is no folder {settings.models_dir}; make it, or name another")
    registry = Registry(pool, runtimes_of(settings, workers))
    variants, options = settings.named_variants(), settings.named_options()
    for name, folder in settings.named_models().items():
        try:
            registry.load(name, folder, variants.get(name, ""), options.get(name, {}))
        except ModelLoadError as error:
            raise StartupError(str(error)) from error
    return registry
