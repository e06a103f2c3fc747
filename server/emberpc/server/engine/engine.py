"""The models that a server serves, with the workers that run them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor

from emberpc.bundle import Task
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.cache import Cache
from emberpc.server.engine.caller import Caller
from emberpc.server.engine.inference import Inferrer
from emberpc.server.engine.measuring import HostBusyError
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.models.registry import Registry
from emberpc.server.engine.scheduler import Counts, Scheduler
from emberpc.server.engine.tuning import tune
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)

#: Maximum number of tokens of a micro-batch, padding included, until the best size is known.
_DEFAULT_BATCH_TOKENS = 512


class Engine:
    """The models that a server serves, and the threads that run them. `inferrer` runs texts through a model.

    Args:
        registry: the models.
        pool: thread pool that runs the tokenizer.
        workers: number of threads that run models. The express worker, which runs interactive texts while all workers
            run bulk texts, is one more.
        batch_tokens: maximum number of tokens of a micro-batch, padding included, for models without a measured size; a
            longer text is run alone. 0: 512.
        max_queue_tokens: maximum number of tokens that may wait for a worker.
        cache_bytes: maximum number of bytes of the cache of outputs; 0: nothing is cached.
        on_failure: called on the thread of a worker, or of the express worker, that died and could not be replaced;
            see `revive`.

    Raises:
        RuntimeError: the system gives no thread for any worker. If some threads are missing, that is only logged.
    """

    def __init__(
        self,
        registry: Registry,
        pool: Executor,
        *,
        workers: int,
        batch_tokens: int,
        max_queue_tokens: int,
        cache_bytes: int = 0,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry = registry
        self._scheduler = Scheduler(workers, batch_tokens or _DEFAULT_BATCH_TOKENS, max_queue_tokens, on_failure)
        self.inferrer = Inferrer(pool, self._scheduler, cache_bytes)

    def due(self) -> list[Model]:
        """Return the models for which the settings leave engine, precision or size of micro-batches to a measurement.

        Models with a measurement of the last 30 days on this host are left out.
        """
        due = self.registry.runtimes.is_due
        return [model for model in self.models() if due(model.name, model.encoder.sha256, model.variant.engine)]

    def tune(self, model: Model, stop: Callable[[], bool] = lambda: False) -> bool:
        """Measure how a model is run fastest on this host, and store that; see `tuning.tune`.

        Blocks for some seconds with a small model. The best size of micro-batches is used from now on. Another engine
        or precision is used when the model is loaded again; see `outdated`.

        Args:
            model: the model.
            stop: returns whether to stop; called before each batch.

        Returns:
            False if the host had too little free processor time or memory, so that nothing was stored.

        Raises:
            MeasurementStoppedError: `stop` returned True.
            Exception: the tokenizer or the model failed, or the model's file changed.
        """
        try:
            choice = tune(model, self.registry.runtimes, stop)
        except HostBusyError as error:
            log.info("model %s: its engines are measured later: %s", model.name, error)
            return False
        finally:
            return_memory()  # the other engines, and the largest batches, took more memory than serving will take
        for other in self.models():
            if other.encoder.sha256 == model.encoder.sha256 and not self._is_outdated(other):
                other.encoder.batch_tokens = choice.batch_tokens
        return True

    def outdated(self) -> list[Model]:
        """Return the models for which another engine or precision was chosen since they were loaded."""
        return [model for model in self.models() if self._is_outdated(model)]

    def _is_outdated(self, model: Model) -> bool:
        plan = self.registry.runtimes.plan(model.name, model.encoder.sha256, model.variant.engine)
        return plan.runtime != model.plan.runtime

    def revive(self) -> int:
        """Start the missing workers, and the express worker if it is missing, as far as the system allows.

        After `close`, nothing is started.

        Returns:
            The number of live workers, without the express worker.
        """
        return self._scheduler.revive()

    def models(self) -> list[Model]:
        """Return the models in the order of their names."""
        return self.registry.models()

    def model(self, name: str, task: Task | None = None, field: str = "model") -> Model:
        """Return a model for the running call, as `Registry.find` does: the call holds this version until it ends.

        Args:
            name: name of the model; empty: the only served model with the task.
            task: task that the model must have; None: any task.
            field: request field that holds the name, for errors.

        Raises:
            ServiceError: NOT_FOUND if no model has that name; FAILED_PRECONDITION if the model has another task, or the
                name is empty and no model has the task; INVALID_ARGUMENT if the name is empty and several models have
                the task.
        """
        return self.registry.find(name, task, field)

    def check_space(self, caller: Caller) -> None:
        """Raise RESOURCE_EXHAUSTED, and count it, if the queue is full or too long for the deadline of a new call.

        The queue is too long if the estimated wait alone makes a new call of `caller` miss the deadline. This is not
        checked before 3 batches were measured.
        """
        self._scheduler.check_space(caller)

    @property
    def counts(self) -> Counts:
        """Return the counts of batches, texts, tokens and failures since the start; the object keeps counting."""
        return self._scheduler.counts

    @property
    def waiting_tokens(self) -> int:
        """Return the number of tokens that wait for a worker, in all lanes, without padding."""
        return self._scheduler.waiting_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one worker: the median of at most the last 9 measured batches; 2000 before any."""
        return self._scheduler.tokens_per_second

    @property
    def cache(self) -> Cache:
        """Return the cache of outputs."""
        return self.inferrer.cache

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the threads that run models, and those that load sessions with several threads.

        A batch in progress is run to its end. Calls with waiting texts, and later calls, fail with UNAVAILABLE.

        Args:
            deadline: until when to wait for the threads to end; None: without limit.

        Returns:
            Whether all these threads have ended.
        """
        deadline = deadline or Deadline()
        self._scheduler.stop()
        encoders, workers = self.registry.close(deadline), self._scheduler.close(deadline)
        return encoders and workers
