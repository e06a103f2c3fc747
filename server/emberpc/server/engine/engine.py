"""The models that a server serves, with the workers that run them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from emberpc.bundle import Task
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.cache import Cache
from emberpc.server.engine.caller import Caller
from emberpc.server.engine.inference import Inferrer
from emberpc.server.engine.models.calibration import DEFAULT_BATCH_TOKENS, calibrated_batch_tokens
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.models.registry import Registry
from emberpc.server.engine.scheduler import Counts, Scheduler
from emberpc.server.memory import return_memory


class Engine:
    """The models that a server serves, and the threads that run them. `inferrer` runs texts through a model.

    Args:
        registry: the models.
        pool: thread pool that runs the tokenizer.
        workers: number of threads that run models. The express worker, which runs interactive texts while all workers
            run bulk texts, is one more.
        batch_tokens: maximum number of tokens of a micro-batch, padding included; a longer text is run alone. 0: 512.
            `calibrate` replaces this number.
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
        self._scheduler = Scheduler(workers, batch_tokens or DEFAULT_BATCH_TOKENS, max_queue_tokens, on_failure)
        self.inferrer = Inferrer(pool, self._scheduler, cache_bytes)

    def calibrate(self, record: Path, stop: Callable[[], bool] = lambda: False) -> bool:
        """Measure the best size of micro-batches on this host with the first model by name, and use it from now on.

        Blocks for about a second with a small model. If `record` holds a measurement of the last 30 days with this
        model, processor, number of cores and ONNX Runtime, the size is read from there. Without a model, or if `stop`
        ends the measurement, the size stays unchanged.

        Args:
            record: the JSON file with the last measurement. It is written after a measurement on an idle host.
            stop: returns whether to stop; called before each batch.

        Returns:
            False if the host was busy: the size is used, but should be measured again later. Otherwise True, even if
            the size stays unchanged.

        Raises:
            Exception: the tokenizer or the model failed.
        """
        models = self.models()
        found = calibrated_batch_tokens(models[0], record, stop) if models else None
        if found is None:
            return True
        self._scheduler.set_batch_tokens(found.batch_tokens)
        return_memory()  # the largest batches of the measurement took more memory than batches of the chosen size will
        return not found.busy

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
