"""The models that are served, and the way of texts through one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from emberpc.bundle import Task
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.cache import Cache
from emberpc.server.engine.calls import Caller
from emberpc.server.engine.inference import Inference, Inferrer
from emberpc.server.engine.models.calibration import DEFAULT_BATCH_TOKENS, calibrated_batch_tokens
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.models.registry import Registry
from emberpc.server.engine.scheduler import Counts, Scheduler
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import FieldPath
from emberpc.server.memory import return_memory


class Engine:
    """Serves models.

    Args:
        registry: the models that it serves.
        pool: where tokenising runs.
        workers: threads that run models.
        batch_tokens: most tokens of a micro-batch, padding included; 0: 512, until `calibrate` found a better size.
        max_queue_tokens: most tokens that may wait.
        cache_bytes: most bytes of outcomes to keep for those who ask again; 0: none.
        on_failure: called, on some thread, when a worker died and none could take its place; see `revive`.
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
        self._inferrer = Inferrer(pool, self._scheduler, cache_bytes)

    def calibrate(self, record: Path, stop: Callable[[], bool] = lambda: False) -> bool:
        """Measure which size of micro-batches is best on this host, and use it from now on. Takes a second.

        Args:
            record: a JSON file that keeps what was measured.
            stop: whether to give up; asked between batches.

        Returns:
            False if the host was busy, so that it should be measured again later.
        """
        models = self.models()
        found = calibrated_batch_tokens(models[0], record, stop) if models else None
        if found is None:
            return True
        self._scheduler.set_batch_tokens(found.batch_tokens)
        return_memory()  # the largest batches tried took more than those that were chosen will
        return not found.busy

    def revive(self) -> int:
        """Start the workers that are missing, as far as the system gives any; return how many live."""
        return self._scheduler.revive()

    def models(self) -> list[Model]:
        """Return the models by name."""
        return self.registry.models()

    def model(self, name: str, task: Task | None = None, field: str = "model") -> Model:
        """Return a model for a call, which holds this version of it until its asyncio task is done.

        The arguments and errors are those of `Registry.find`.
        """
        return self.registry.find(name, task, field)

    async def infer(
        self,
        model: Model,
        texts: Sequence[str],
        prompt: str,
        truncation: Truncation,
        path: FieldPath,
        caller: Caller,
    ) -> Inference:
        """Run texts through a model.

        Args:
            model: the model.
            texts: at least one text, none empty.
            prompt: what goes before each text.
            truncation: what to do with over-long ones.
            path: what the request calls text i, for errors.
            caller: who asks, and how urgently.

        Raises:
            ServiceError: as `TextTokenizer.tokenize` and `Scheduler.run` say.
        """
        return await self._inferrer.infer(model, texts, prompt, truncation, path, caller)

    def check_room(self, caller: Caller) -> None:
        """See whether a call could be taken now.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if not.
        """
        self._scheduler.check_room(caller)

    async def count_tokens(self, model: Model, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the tokens of each text with its prompt, before any truncation."""
        return await self._inferrer.count_tokens(model, texts, prompt)

    @property
    def counts(self) -> Counts:
        """What the workers have done so far."""
        return self._scheduler.counts

    @property
    def waiting_tokens(self) -> int:
        """How many tokens wait for a worker."""
        return self._scheduler.waiting_tokens

    @property
    def tokens_per_second(self) -> float:
        """What one worker does, as lately measured."""
        return self._scheduler.tokens_per_second

    @property
    def cache(self) -> Cache:
        """The outcomes kept."""
        return self._inferrer.cache

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop the workers and all other threads that run models; what waits fails with UNAVAILABLE.

        Args:
            deadline: until when to wait for the threads; None: without limit.

        Returns:
            Whether none of them runs any more.
        """
        deadline = deadline or Deadline()
        self._scheduler.stop()
        encoders, workers = self.registry.close(deadline), self._scheduler.close(deadline)
        return encoders and workers
