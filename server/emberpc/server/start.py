"""The server as a process. At its start, what takes long is done side by side: imports, models, a look at hnswlib."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING

from emberpc.server import descriptors
from emberpc.server.cores import usable_cores
from emberpc.server.errors import StartupError
from emberpc.server.memory import keep_freed_memory, limit_heaps
from emberpc.server.portable import hnswlib_problem
from emberpc.server.settings import Settings
from emberpc.server.stopping import Stopping

if TYPE_CHECKING:
    from emberpc.server.engine import Registry

log = logging.getLogger(__name__)

#: How long a thread that runs Python may keep others waiting that want to. A short call changes threads several times;
#: with Python's 5 ms it took 67 ms at the 99th percentile while a call of 10,000 texts was tokenised.
_SWITCH_SECONDS = 0.0005
#: Threads for tokenising, index and disk, beyond one for each worker: a few slow calls must not hold up the others.
_EXTRA_THREADS = 4
#: MiB of address space without which a library ends the process by a signal: measured, 600 MB are too little for two
#: workers and 700 MB enough. Each thread has a stack and a heap of its own.
_ADDRESS_SPACE, _ADDRESS_SPACE_OF_WORKER = 640, 64


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then let calls in flight finish.

    Returns, or ends the process with exit code 0, at most two seconds after the drain time.

    Raises:
        StartupError: there is too little address space, the address is taken, a model cannot be served, the data
            directory cannot be used, or hnswlib does not run on this processor.
    """
    gc.disable()  # an eighth of a start otherwise: imports make much, and nothing of it is garbage; `run` has it back
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    before, now = descriptors.raise_limit()
    if now > before:
        log.info("raised the limit of file descriptors from %d to %d", before, now)
    sys.setswitchinterval(_SWITCH_SECONDS)
    workers = settings.workers or usable_cores()
    _check_address_space(workers)
    limit_heaps(max(2, workers))
    # Before it is used on another thread: two that import the same modules can see one half done.
    import_module("emberpc.server.engine")
    threads = workers + _EXTRA_THREADS
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pool")
    stopping = Stopping(settings.drain_seconds)
    try:
        models = pool.submit(_load_models, settings, pool)
        if settings.index_backend == "embedded":
            if problem := hnswlib_problem(settings.data_dir, lambda: import_module("emberpc.server.handlers")):
                raise StartupError(problem)
            import_module("emberpc.server.index")
        from emberpc.server.app import run  # noqa: PLC0415 - its import takes as long as loading a model

        asyncio.run(run(settings, workers, pool, threads, models, stopping))
    finally:
        # Unlike a `with` of the pool, it waits no longer than the deadline, which is infinite without a signal.
        stopping.end(pool)


def _check_address_space(workers: int) -> None:
    """Check that the process may have as much address space as it needs without models.

    Raises:
        StartupError: it may not.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed = _ADDRESS_SPACE + _ADDRESS_SPACE_OF_WORKER * workers
    if limit != resource.RLIM_INFINITY and limit < needed * 2**20:
        raise StartupError(
            f"the address space of the process is limited to {limit // 2**20} MiB (RLIMIT_AS, `ulimit -v`); with "
            f"{workers} workers it needs at least {needed} MiB, and more for models; raise or remove the limit, or "
            "give fewer --workers"
        )


def _load_models(settings: Settings, pool: Executor) -> Registry:
    """Load what the settings name.

    Raises:
        StartupError: a model cannot be served.
    """
    from emberpc.server.engine import ModelLoadError, Registry  # noqa: PLC0415 - imported by `serve`

    keep_freed_memory()
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        raise StartupError(f"--models-dir: there is no folder {settings.models_dir}; make it, or name another")
    registry = Registry(pool)
    variants, options = settings.named_variants(), settings.named_options()
    for name, folder in settings.named_models().items():
        try:
            registry.load(name, folder, variants.get(name, ""), options.get(name, {}))
        except ModelLoadError as error:
            raise StartupError(str(error)) from error
    return registry
