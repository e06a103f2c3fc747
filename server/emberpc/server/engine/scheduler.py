"""The workers: threads that run micro-batches, and the bounded backlog before them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from time import perf_counter

from emberpc.server.engine.batching import Backlog, Item, Job, JobResult, Runner
from emberpc.server.engine.calls import Caller
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: Weight of the newest batch in the running mean of tokens per second.
_RATE_WEIGHT = 0.05
#: Tokens per second assumed of one worker until one is measured.
_FIRST_RATE = 2000.0
_ANYBODY = Caller()


class Scheduler:
    """Runs jobs on a fixed number of threads.

    Args:
        workers: number of threads; each runs one micro-batch at a time on one core.
        batch_tokens: most tokens of a micro-batch, padding included; a longer text goes alone.
        max_queue_tokens: most tokens that may wait.
        on_failure: called, on a worker's thread, when the last worker died.
    """

    def __init__(
        self, workers: int, batch_tokens: int, max_queue_tokens: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self._backlog = Backlog(batch_tokens)
        self._max_queue_tokens = max_queue_tokens
        self._on_failure = on_failure
        self._condition = threading.Condition()
        self._closing = False
        self._rate = _FIRST_RATE
        self._alive = workers
        self._threads = [threading.Thread(target=self._work, name=f"worker-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    async def run(self, runner: Runner, texts: Sequence[TokenIds], caller: Caller = _ANYBODY) -> JobResult:
        """Run the texts of one call. If the caller goes away, what still waits is dropped.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too much waits already, INVALID_ARGUMENT if the call alone is too
                large ever to be taken, INTERNAL if the model failed, UNAVAILABLE if the server is stopping.
        """
        job = Job(runner, texts, caller)
        self._submit(job)
        return await asyncio.wrap_future(job.future)

    def close(self) -> None:
        """Stop the workers after the batches they are at; what waits fails with UNAVAILABLE."""
        with self._condition:
            self._closing = True
            waiting = self._backlog.drain()
            self._condition.notify_all()
        _fail(waiting, ServiceError(Code.UNAVAILABLE, "the server is stopping; try again", reason="STOPPING"))
        for thread in self._threads:
            thread.join()

    def _submit(self, job: Job) -> None:
        tokens = job.tokens
        if tokens > self._max_queue_tokens:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                f"the call has {tokens} tokens, at most {self._max_queue_tokens} can wait at a time; split it",
                reason="CALL_TOO_LARGE",
            )
        with self._condition:
            if self._closing or not self._alive:
                raise ServiceError(Code.UNAVAILABLE, "the server runs no models now; try again", reason="NO_WORKERS")
            if self._backlog.tokens + tokens > self._max_queue_tokens:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    f"{self._backlog.tokens} tokens wait already, with this call's {tokens} it would be more than "
                    f"{self._max_queue_tokens}; try again later",
                    reason="QUEUE_FULL",
                    retry_after=self._backlog.tokens / (self._rate * self._alive),
                )
            self._backlog.add(job)
            self._condition.notify(min(len(job.texts), len(self._threads)))

    def _work(self) -> None:
        try:
            while batch := self._next_batch():
                self._run_batch(batch)
        finally:
            self._leave()

    def _next_batch(self) -> list[Item]:
        """Wait for a micro-batch; empty when the server is stopping."""
        with self._condition:
            while True:
                self._condition.wait_for(lambda: self._backlog or self._closing)
                if self._closing:
                    return []
                # Callers who left, or whose call failed in an earlier batch, want nothing more.
                wanted = [item for item in self._backlog.take() if not item.job.future.done()]
                if wanted:
                    return wanted

    def _run_batch(self, batch: list[Item]) -> None:
        start = perf_counter()
        try:
            output = batch[0].job.runner.run([item.job.texts[item.row] for item in batch])
        except BaseException as error:  # whatever a model does, no caller may hang
            log.exception("a micro-batch of %d texts failed", len(batch))
            _fail({item.job for item in batch}, ServiceError(Code.INTERNAL, "the model failed on this call"))
            if isinstance(error, Exception):
                return
            raise
        end = perf_counter()
        finished = []
        with self._condition:
            rate = sum(item.length for item in batch) / (end - start)
            self._rate += _RATE_WEIGHT * (rate - self._rate)
            for item, row in zip(batch, output, strict=True):
                job = item.job
                job.started = job.started or start
                job.rows[item.row] = row
                job.remaining -= 1
                if not job.remaining:
                    finished.append(job)
        for job in finished:
            _finish(job, end)

    def _leave(self) -> None:
        """Account for a worker that ends; if it was the last and not told to, nobody may wait for it."""
        with self._condition:
            self._alive -= 1
            if self._closing or self._alive:
                return
            waiting = self._backlog.drain()
        _fail(waiting, ServiceError(Code.UNAVAILABLE, "the server runs no models now; try again", reason="NO_WORKERS"))
        self._on_failure()


def _finish(job: Job, end: float) -> None:
    rows = [row for row in job.rows if row is not None]
    result = JobResult(rows, job.started - job.submitted, end - job.started)
    try:
        job.future.set_result(result)
    except InvalidStateError:
        log.debug("a caller left before its result was there")


def _fail(jobs: set[Job], error: ServiceError) -> None:
    for job in jobs:
        try:
            job.future.set_exception(error)
        except InvalidStateError:
            log.debug("a call had ended before it failed")
