"""The models that are served, by name; which calls hold which version of one; and the end of an old version."""

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
from pathlib import Path
from typing import Any

from emberpc.bundle import Task
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.models.encoders import Encoder, Encoders
from emberpc.server.engine.models.model import Model, Tell
from emberpc.server.errors import Code, ServiceError, invalid, not_found
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)


class _Version:
    """One model as it was loaded, and the calls that hold it."""

    def __init__(self, model: Model) -> None:
        self.model: Model | None = model
        self.calls: set[asyncio.Task[Any]] = set()
        self.retired = False
        #: Done when no call holds the retired version any more and its memory was returned.
        self.gone: Future[None] = Future()


class Registry:
    """Models by name. Safe to use from several threads.

    A call that looks a model up holds that very version until the asyncio task
    that it runs in is done. A version that was replaced or removed is let go of
    when the last call that holds it is done.

    Args:
        pool: where memory is returned, which takes some milliseconds.
    """

    def __init__(self, pool: Executor) -> None:
        #: What the models have in common.
        self.encoders = Encoders()
        #: Of all versions, the retired ones too: a thread may still make a session of one.
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
        tell: Tell = lambda stage: None,
    ) -> Model:
        """Load a bundle and serve it under a name, instead of one that has the name already. Takes seconds.

        The arguments and errors are those of `Model.load`.
        """
        model = Model.load(name, folder, variant, options, self.encoders, fresh=fresh, tell=tell)
        self.put(model)
        log.info("model %s (%s, %s) from %s", name, model.manifest.task.value, model.variant.name, folder)
        return model

    def put(self, model: Model) -> None:
        """Serve a model under its name from now on, instead of one that has the name already.

        Others with the same weights go over to its encoder, or the weights would be in memory twice.
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
        """Serve a model no more.

        Returns:
            A future that is done when the last call that holds the model is done and its memory was returned.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name.
        """
        with self._lock:
            version = self._versions.pop(name, None)
            if version is None:
                raise self._not_found(name)
            self._retire(version)
        return version.gone

    def models(self) -> list[Model]:
        """Return the models by name; no call holds them for that."""
        with self._lock:
            found = [self._versions[name].model for name in sorted(self._versions)]
        return [model for model in found if model is not None]

    def get(self, name: str) -> Model:
        """Return a model; no call holds it for that.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name.
        """
        with self._lock:
            if name not in self._versions or (model := self._versions[name].model) is None:
                raise self._not_found(name)
        return model

    def served(self, name: str) -> Model | None:
        """Return a model, None if there is none of that name; no call holds it for that."""
        version = self._versions.get(name)
        return None if version is None else version.model

    def calls(self, name: str) -> int:
        """Return how many calls hold the version of a model that is served now; 0 if there is none of that name."""
        with self._lock:
            return len(self._versions[name].calls) if name in self._versions else 0

    def find(self, name: str, task: Task | None = None, field: str = "model") -> Model:
        """Return a model for a call, which holds this version of it until its asyncio task is done.

        Args:
            name: its name; empty: the only one served that does the task.
            task: what it must do; None: anything.
            field: what the request calls the name, for errors.

        Raises:
            ServiceError: NOT_FOUND if there is none of that name, FAILED_PRECONDITION if it does something else or
                none does the task, INVALID_ARGUMENT if the name is empty and there are several.
        """
        with self._lock:
            model = self._named(name, task) if name else self._only(task, field)
            self._hold(self._versions[model.name])
        return model

    def close(self, deadline: Deadline | None = None) -> bool:
        """Return no more memory, since the process and the pool end, and close the encoders.

        Args:
            deadline: until when to wait for the encoders' threads; None: without limit.

        Returns:
            Whether no thread of an encoder runs any more.
        """
        with self._lock:
            self._closed = True
            served = list(self._served)
        now, deadline = Deadline(0), deadline or Deadline()
        waiting = [encoder for encoder in served if not encoder.close(now)]  # all are stopped before any is waited for
        return all(encoder.close(deadline) for encoder in waiting)

    def _named(self, name: str, task: Task | None) -> Model:
        model = self.get(name)
        if task not in (None, model.manifest.task):
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"model {name!r} is for {model.manifest.task.value}, not for {task.value if task else ''}",
                reason="WRONG_MODEL_TASK",
                metadata={"model": name, "task": model.manifest.task.value},
            )
        return model

    def _only(self, task: Task | None, field: str) -> Model:
        fitting = [model for model in self.models() if task in (None, model.manifest.task)]
        what = f"{task.value} model" if task else "model"
        if not fitting:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"no {what} is served; start the server with --model NAME=DIR",
                reason="NO_MODEL",
            )
        if len(fitting) > 1:
            names = ", ".join(model.name for model in fitting)
            raise invalid(field, f"is empty, and there are several {what}s to choose from; name one of: {names}")
        return fitting[0]

    def _not_found(self, name: str) -> ServiceError:
        return not_found("model", name, f"served are: {', '.join(sorted(self._versions)) or 'none'}")

    def _hold(self, version: _Version) -> None:
        """Count the running task, which is the call, among those that hold a version."""
        try:
            call = asyncio.current_task()
        except RuntimeError:  # no event loop runs in this thread, so it is no call that asks
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
        """Drop what should be the last reference to a version's model, and give the system its memory back."""
        model, version.model = version.model, None
        if model is not None:
            rest = weakref.ref(model)
            del model
            if rest() is not None:
                gc.collect()  # a call that failed may have left a cycle: an exception and the frames it passed
            if (lingering := rest()) is not None:
                # Such as the last job of a worker that has had none since.
                log.debug("an old version of model %s is in use beyond its last call", lingering.name)
                weakref.finalize(lingering, self._return_late).atexit = False
                del lingering
        return_memory()
        version.gone.set_result(None)

    def _return_late(self) -> None:
        """Return the memory of a model that something held beyond its last call."""
        with suppress(RuntimeError):  # the pool is shut down: the process ends
            self._pool.submit(return_memory)


def _alike(one: Model, other: Model) -> bool:
    """Whether what one encoder gives serves both models."""
    return (one.fingerprint, one.manifest.max_tokens) == (other.fingerprint, other.manifest.max_tokens)
