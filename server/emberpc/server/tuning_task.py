"""A task of the server: it measures how each model is run fastest on this host, and runs the model in that way."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from functools import partial
from weakref import WeakKeyDictionary, WeakSet

from emberpc.server.engine import Engine, Loader, Model
from emberpc.server.stopping import Stopping

log = logging.getLogger(__name__)

#: Seconds between two looks for models to measure.
_LOOK_SECONDS = 60.0
#: Maximum number of looks from a measurement on a busy host to the next measurement of the same model.
_LONGEST_PAUSE = 60


class TuningTask:
    """Measures the models of an engine while the server serves.

    A model is measured if the settings leave something open and it has no measurement of the last 30 days on this host.
    Models with a new choice are reloaded, also those that share the ONNX file of a measured one. If the host has too
    little free processor time or memory, the model is measured again after a pause of 1 minute, and each time the pause
    is twice as long, at most an hour. Other models do not wait: a model that is loaded later is measured within a
    minute. After an error, which is logged, a model is not measured or reloaded again until it is loaded again by a
    call or from the models directory.

    Args:
        engine: the engine with the models.
        loader: reloads models.
        thread: runs the measurements.
        stopping: says whether the server stops.
    """

    def __init__(self, engine: Engine, loader: Loader, thread: Executor, stopping: Stopping) -> None:
        self._engine = engine
        self._loader = loader
        self._thread = thread
        self._stopping = stopping
        self._failed: WeakSet[Model] = WeakSet()
        #: Models that were measured on a busy host, with the number of looks to leave out and the last pause in looks.
        self._waiting: WeakKeyDictionary[Model, tuple[int, int]] = WeakKeyDictionary()

    async def run(self) -> None:
        """Look for models to measure once a minute, until the task is cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self) -> None:
        """Measure and reload each model that needs it.

        This function exists so that its local variables, and so the memory of replaced models, are freed before the
        next pause.
        """
        for model in (*self._engine.due(), *self._engine.outdated()):
            if model in self._failed:
                continue
            try:
                if model in self._engine.due():
                    await self._measure(model)
                if model in self._engine.outdated():
                    await asyncio.wrap_future(self._loader.submit(partial(self._loader.reload, model.name)))
            except Exception:  # the model does not change
                self._failed.add(model)
                if not self._stopping.requested.is_set():
                    log.exception("cannot measure how model %s is run fastest; nothing changes", model.name)

    async def _measure(self, model: Model) -> None:
        """Measure a model unless it waits for a later look. The errors of `Engine.tune` pass through."""
        left, pause = self._waiting.get(model, (0, 0))
        if left:
            self._waiting[model] = left - 1, pause
            return
        run = asyncio.get_running_loop().run_in_executor
        if not await run(self._thread, self._engine.tune, model, self._stopping.requested.is_set):
            pause = min(max(1, 2 * pause), _LONGEST_PAUSE)
            self._waiting[model] = pause - 1, pause
        else:
            self._waiting.pop(model, None)
