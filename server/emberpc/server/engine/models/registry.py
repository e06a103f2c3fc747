"""Hold the served models by name. A call holds the version of a model that it uses, even after a reload or unload."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from emberpc.bundle import Task
from emberpc.bundle.contents import Contents
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.choices import SAME_MODEL, Runtimes
from emberpc.server.engine.models.agreement import agreement, encoder_of
from emberpc.server.engine.models.encoders import Encoder, Encoders
from emberpc.server.engine.models.model import Model, ModelLoadError, OnStage
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.errors import Code, ServiceError, invalid, not_found
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)


class _Version:
    """A loaded model, and the calls that use the model.

    A version is retired when another version replaces it or the model is unloaded. When no call uses a retired version
    any more, a thread of the pool sets `model` to None, which frees the model, unless the registry is closed.
    """

    def __init__(self, model: Model) -> None:
        self.model: Model | None = model
        self.calls: set[asyncio.Task[Any]] = set()
        self.retired = False
        #: Done when the version is retired, no call uses it, and its memory was returned to the system. It is done
        #: without the return of the memory if the registry is closed, or another object still refers to the model or
        #: its encoder. The result is None.
        self.gone: Future[None] = Future()


class Registry:
    """Models by name. Thread-safe.

    A call that looks up a model with `find` holds that version until the call's asyncio task ends. A replaced or
    removed version is freed after the last call that holds it has ended.

    Args:
        pool: thread pool that frees memory, which would block an event loop for some milliseconds.
        runtimes: the engine and the precision of each model; None: ONNX Runtime.
    """

    def __init__(self, pool: Executor, runtimes: Runtimes | None = None) -> None:
        self.runtimes = runtimes or Runtimes({"": "onnxruntime"})
        #: Encoders in use, which models can share.
        self.encoders = Encoders()
        #: Encoders of all versions that are in memory. Retired versions are included, since a thread may still load a
        #: session for their encoder.
        self._served: weakref.WeakSet[Encoder] = weakref.WeakSet()
        self._pool = pool
        self._lock = threading.RLock()
        self._versions: dict[str, _Version] = {}
        self._closed = False

    def load(
        self,
        name: str,
        folder: Path,
        variant: str = "",
        options: Mapping[str, str] | None = None,
        *,
        fresh: bool = False,
        on_stage: OnStage = lambda stage: None,
    ) -> Model:
        """Load a bundle or a foreign folder, serve its model under a name, and return the model. Takes seconds.

        A served model of that name is replaced.

        Args:
            name: the name.
            folder: the folder.
            variant: name of the variant; empty: the first.
            options: options of a foreign model; see `emberpc.bundle.Stated`. A bundle takes none.
            fresh: whether to load the encoder even if another model could share its encoder; see `Model.load`.
            on_stage: called on this thread with the name of each stage of loading as it begins.

        Raises:
            ModelLoadError: the model cannot be loaded, or a check of its outputs failed; see `Model.load`. Nothing is
                replaced then.
        """
        load = partial(Model.load, name, folder, variant, options, self.encoders, fresh=fresh, on_stage=on_stage)
        try:
            model = load(self.runtimes)
        except ModelLoadError as error:
            if len(self.runtimes.candidates(name, "").runtimes) == 1:
                raise
            try:
                model = load(self.runtimes.unmeasured())
            except ModelLoadError:
                raise error from error.__cause__
            log.warning("%s; the engine that was measured to be fastest is not used", error)
        if self._counts_as_fp32(model, on_stage):  # the fingerprint becomes that of fp32
            model = load(self.runtimes)
        self.put(model)
        log.info("model %s (%s, %s) from %s", name, model.manifest.task.value, model.variant.name, folder)
        return model

    def _counts_as_fp32(self, model: Model, on_stage: OnStage) -> bool:
        """If the agreement of a model's precision with fp32 is unknown, measure it; return whether it is high enough.

        Returns:
            False if the agreement was known before, or the model runs in fp32.
        """
        choices, runtime = self.runtimes.choices, model.plan.runtime
        if runtime.same_model:
            return False
        known = choices.agreement(model.encoder.sha256, runtime.engine, runtime.precision)
        found = known
        if found is None:
            on_stage(f"comparing {runtime.precision} with fp32")
            exact = encoder_of(model, Runtime(model.variant.engine or "onnxruntime"), Contents())
            found = agreement(model, choices, runtime, exact, model.encoder, lambda: False)
            log.info("model %s: %s agrees with fp32 in %.2f %%", model.name, runtime.precision, 100 * found)
        if found < SAME_MODEL:
            log.warning(
                "model %s: %s agrees with fp32 in %.2f %%, less than %.0f %%, so the vectors count as those of another "
                "model, and collections with vectors of fp32 refuse them; to use these collections, serve the model "
                "with --precision %s=fp32",
                *(model.name, runtime.precision, 100 * found, 100 * SAME_MODEL, model.name),
            )
        return known is None and found >= SAME_MODEL

    def put(self, model: Model) -> None:
        """Serve a model under its name. A served model of that name is replaced.

        Other served models with the same fingerprint, length limit and engine get the encoder of `model`, so that the
        weights are in memory once. This gives them a new version, too.
        """
        with self._lock:
            self._replace(model)
            for other in self.models():
                if _alike(other, model) and other.encoder is not model.encoder:
                    self._replace(replace(other, encoder=model.encoder))

    def _replace(self, model: Model) -> None:
        old = self._versions.get(model.name)
        self._served.add(model.encoder)
        self._versions[model.name] = _Version(model)
        if old is not None:
            self._retire(old)

    def remove(self, name: str) -> Future[None]:
        """Stop serving a model; later calls do not find it.

        Returns:
            `_Version.gone` of the version: done when the calls that use it have ended and, if nothing else needs its
            memory, the memory was returned to the system.

        Raises:
            ServiceError: NOT_FOUND if no model has that name.
        """
        with self._lock:
            version = self._versions.pop(name, None)
            if version is None:
                raise self._not_found(name)
            self._retire(version)
        return version.gone

    def models(self) -> list[Model]:
        """Return the served models, sorted by name. They are not held for a call."""
        with self._lock:
            found = [self._versions[name].model for name in sorted(self._versions)]
        return [model for model in found if model is not None]

    def get(self, name: str) -> Model:
        """Return the served model with a name. Unlike `find`, this does not count the task as a user of the version.

        Raises:
            ServiceError: NOT_FOUND if no model has that name.
        """
        with self._lock:
            model = self.served(name)
            if model is None:
                raise self._not_found(name)
        return model

    def served(self, name: str) -> Model | None:
        """Return the served model with a name; None if no model has that name. It is not held for a call."""
        version = self._versions.get(name)
        return None if version is None else version.model

    def calls(self, name: str) -> int:
        """Return the number of calls that hold the served version of a model; 0 if no model has that name.

        Calls that still hold a replaced version are not counted.
        """
        with self._lock:
            return len(self._versions[name].calls) if name in self._versions else 0

    def find(self, name: str, task: Task | None = None, field: str = "model") -> Model:
        """Return a model for a call; the running asyncio task holds this version of the model until the task ends.

        Outside of an asyncio task, the version is not held.

        Args:
            name: name of the model; empty: the only served model with the task.
            task: task that the model must have; None: any task.
            field: request field that holds the name, for errors.

        Raises:
            ServiceError: NOT_FOUND if no model has that name; FAILED_PRECONDITION if the model has another task, or the
                name is empty and no model has the task; INVALID_ARGUMENT if the name is empty and several models have
                the task.
        """
        with self._lock:
            model = self._named(name, task) if name else self._only(task, field)
            self._hold(self._versions[model.name])
        return model

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the threads that load sessions with several threads, and wait for them. The models can still run.

        From now on, the memory of retired versions is not returned to the system, since the process ends.

        Args:
            deadline: until when to wait for the threads; None: without limit.

        Returns:
            Whether all these threads have ended.
        """
        with self._lock:
            self._closed = True
            served = list(self._served)
        now, deadline = Deadline(0), deadline or Deadline()
        waiting = [encoder for encoder in served if not encoder.close(now)]  # stops all before it waits for any
        return all(encoder.close(deadline) for encoder in waiting)

    def _named(self, name: str, task: Task | None) -> Model:
        model = self.served(name)
        if model is None:
            raise self._not_found(name, task)
        if task not in (None, model.manifest.task):
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"model {name!r} is for {model.manifest.task.value}, not for {task.value if task else ''}; "
                f"{self._fitting(task)}",
                reason="WRONG_MODEL_TASK",
                metadata={"model": name, "task": model.manifest.task.value},
            )
        return model

    def _only(self, task: Task | None, field: str) -> Model:
        fitting = [model for model in self.models() if task in (None, model.manifest.task)]
        kind = f"{task.value} model" if task else "model"
        if not fitting:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"no {kind} is served; start the server with --model NAME=DIR",
                reason="NO_MODEL",
            )
        if len(fitting) > 1:
            names = ", ".join(repr(model.name) for model in fitting)
            raise invalid(field, f"is empty, and there are several {kind}s to choose from; name one of: {names}")
        return fitting[0]

    def _not_found(self, name: str, task: Task | None = None) -> ServiceError:
        return not_found("model", name, self._fitting(task))

    def _fitting(self, task: Task | None) -> str:
        """Return a clause that names all served models with the task; None: all served models."""
        names = [repr(model.name) for model in self.models() if task in (None, model.manifest.task)]
        kind = f"{task.value} models" if task else "models"
        return f"the {kind} are: {', '.join(names) or 'none'}"

    def _hold(self, version: _Version) -> None:
        """Add the running asyncio task, if there is one, to the calls of a version, until the task ends."""
        try:
            call = asyncio.current_task()
        except RuntimeError:  # no event loop runs in this thread, so this is no call
            return
        if call is not None and call not in version.calls:
            version.calls.add(call)
            call.add_done_callback(lambda done: self._leave(version, done))

    def _leave(self, version: _Version, call: asyncio.Task[Any]) -> None:
        with self._lock:
            version.calls.discard(call)
            if version.retired and not version.calls:
                self._let_go(version)

    def _retire(self, version: _Version) -> None:
        version.retired = True
        if not version.calls:
            self._let_go(version)

    def _let_go(self, version: _Version) -> None:
        if self._closed:
            version.gone.set_result(None)
        else:
            self._pool.submit(self._free, version)

    def _free(self, version: _Version) -> None:
        """Drop a version's reference to its model, return free memory to the system, and complete `gone`."""
        model, version.model = version.model, None
        if model is not None:
            rest = weakref.ref(model)
            del model
            if rest() is not None:
                gc.collect()  # a failed call may have left a cycle of an exception and its frames
            if (lingering := rest()) is not None:
                # Another object still refers to the model, for example a measurement of the best size of micro-batches.
                log.debug("an old version of model %s is still referred to after its last call", lingering.name)
                weakref.finalize(lingering, self._return_late).atexit = False
                del lingering
        return_memory()
        version.gone.set_result(None)

    def _return_late(self) -> None:
        """Return free memory to the system, on a thread of the pool. Called when a model is freed late.

        A model is freed late if an object still refers to it when its last call has ended.
        """
        with suppress(RuntimeError):  # the pool is shut down, and the process ends
            self._pool.submit(return_memory)


def _alike(one: Model, other: Model) -> bool:
    """Return whether two models can share an encoder: they have the same fingerprint, length limit and engine."""
    return (one.fingerprint, one.manifest.max_tokens, one.plan.runtime) == (
        other.fingerprint,
        other.manifest.max_tokens,
        other.plan.runtime,
    )
