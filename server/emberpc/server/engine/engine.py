"""The models that are served, and the way of texts through one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np

from emberpc.bundle import Task
from emberpc.server.engine.calls import Caller
from emberpc.server.engine.model import Model
from emberpc.server.engine.registry import Registry
from emberpc.server.engine.scheduler import Scheduler
from emberpc.server.engine.session import Output
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import FieldPath

Result = TypeVar("Result")


@dataclass(frozen=True)
class Inference:
    """What a model gave for some texts.

    `output` is float32 (texts, width); `tokens[i]` and `truncated[i]` tell of
    text i; the seconds are wall time.
    """

    output: Output
    tokens: list[int]
    truncated: list[bool]
    tokenize_seconds: float
    queue_seconds: float
    infer_seconds: float


class Engine:
    """Serves models.

    Args:
        pool: where tokenising runs.
        workers: threads that run models.
        batch_tokens: most tokens of a micro-batch, padding included.
        max_queue_tokens: most tokens that may wait.
        on_failure: called, on some thread, when no worker is left.
    """

    def __init__(
        self,
        pool: Executor,
        *,
        workers: int,
        batch_tokens: int,
        max_queue_tokens: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self.registry = Registry(pool)
        self._scheduler = Scheduler(workers, batch_tokens, max_queue_tokens, on_failure)

    def load(self, name: str, folder: Path, variant: str = "", options: Mapping[str, str] | None = None) -> Model:
        """Load a bundle and serve it under a name, instead of one that has the name already. Takes seconds.

        Args:
            name: the name.
            folder: the bundle.
            variant: which of its ONNX files; empty: the first.
            options: what is stated of a model that emberpc did not export.

        Raises:
            ModelLoadError: it cannot be served.
        """
        model = Model.load(name, folder, variant, options)
        self.registry.put(model)
        return model

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
        start = perf_counter()
        tokenized = await self._in_pool(lambda: model.tokenizer.tokenize(texts, prompt, truncation, path))
        tokenize_seconds = perf_counter() - start
        result = await self._scheduler.run(model, [text.ids for text in tokenized], caller)
        return Inference(
            output=np.stack(result.rows),
            tokens=[len(text.ids) for text in tokenized],
            truncated=[text.truncated for text in tokenized],
            tokenize_seconds=tokenize_seconds,
            queue_seconds=result.queue_seconds,
            infer_seconds=result.infer_seconds,
        )

    async def count_tokens(self, model: Model, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the tokens of each text with its prompt, before any truncation."""
        return await self._in_pool(lambda: model.tokenizer.count(texts, prompt))

    def close(self) -> None:
        """Stop the workers; what waits fails with UNAVAILABLE."""
        self.registry.close()
        self._scheduler.close()

    async def _in_pool(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
