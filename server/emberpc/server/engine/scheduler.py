"""Run micro-batches on a fixed number of threads. The texts wait in a queue with a limit of tokens."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from time import perf_counter

import numpy as np

from emberpc.server.deadlines import Deadline
from emberpc.server.engine.batching import Backlog, BatchRunner, Item, Submission, SubmissionResult
from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.priority import lower_priority
from emberpc.server.engine.rates import Rates
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.submission_results import fail, failure, result_of, send
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

#: Minimum number of tokens of a batch whose rate is measured, as a share of the token budget of a micro-batch. The
#: rates of smaller batches say nothing about the throughput of a full queue.
_MIN_MEASURED_SHARE = 0.25
#: Seconds without a turn after which bulk work has the next turn, so interactive load slows it down but never stops it.
_BULK_SECONDS = 0.25
#: A call is refused if its estimated time, times this factor, exceeds the time left: the work of a late call is wasted.
_MARGIN = 1.25
_LATE = (
    "the rest of the call cannot be done before its deadline; give it a longer timeout, send fewer texts, or try again "
    "later"
)
_ANYBODY = Caller()


@dataclass
class Counts:
    """Counts since the scheduler started: batches, texts and tokens that were run successfully, refusals, failures."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    #: Padding tokens, which are not counted in `tokens`.
    padding: int = 0
    #: Refusals of calls that did not wait yet, since too many tokens waited or the deadline was too soon.
    refused: int = 0
    #: Calls that failed while some of their texts waited, since their deadline could not be met any more.
    expired: int = 0
    failed_batches: int = 0
    lost_workers: int = 0


class Scheduler:
    """Runs submissions on a fixed number of threads, the workers.

    One more thread, the express worker, runs interactive texts while all workers run bulk texts. A short call then
    shares a core for some milliseconds and does not wait for the end of a bulk batch, which takes some 100 ms. If a
    text is alone in the queue and no batch runs, the run of that text may use as many threads as there are workers.

    Args:
        workers: number of workers; each runs one micro-batch at a time. RuntimeError if none can start.
        batch_tokens: maximum number of tokens of a micro-batch, padding included; a longer text is run alone.
        max_queue_tokens: maximum number of tokens that may wait.
        on_failure: called on the thread of a worker that died and could not be replaced. `revive` can be called later.
    """

    def __init__(
        self, workers: int, batch_tokens: int, max_queue_tokens: int, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.counts = Counts()
        self._backlog = Backlog(batch_tokens, _BULK_SECONDS)
        self._batch_tokens = batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._work_waits = threading.Condition(self._lock)
        self._express_waits = threading.Condition(self._lock)
        self._closing = False
        self._rates = Rates()
        self._alive = 0
        self._busy = 0
        self._at_bulk = 0
        self._workers = workers
        self._threads: dict[str, threading.Thread] = {}
        #: Submissions whose callers wait.
        self._live: set[Submission] = set()
        if not self.revive():
            raise RuntimeError("the system gives no thread for a worker")

    async def run(self, runner: BatchRunner, texts: Sequence[TokenIds], caller: Caller = _ANYBODY) -> SubmissionResult:
        """Run the texts of one call; return their outputs. If the task is cancelled, texts that still wait are dropped.

        Args:
            runner: runs the batches.
            texts: token ids of each text, at least one text.
            caller: who sent the call, its lane and its deadline; a large call runs in the bulk lane, see `lane`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the queue has no space or the deadline is too soon, INVALID_ARGUMENT if
                the call has more tokens than may wait, DEADLINE_EXCEEDED if the call waited too long to meet its
                deadline, INTERNAL if the model or a worker failed, UNAVAILABLE if stopping or without workers.
        """
        submission = Submission(runner, texts, caller, asyncio.get_running_loop().create_future())
        self._submit(submission)
        try:
            return await submission.future
        finally:
            self._end(submission)

    def check_space(self, caller: Caller) -> None:
        """Raise RESOURCE_EXHAUSTED, and count it, if the queue is full or too long for the deadline of a new call.

        The deadline is not checked before 3 batches were measured.
        """
        with self._lock:
            if self._backlog.tokens >= self._max_queue_tokens:
                raise self._full(0)
            self._check_time(0, caller)

    def revive(self) -> int:
        """Start the missing threads, as far as the system allows; return the number of live workers (not express)."""
        with self._lock:
            for name in (*(f"worker-{i}" for i in range(self._workers)), "express"):
                if name not in self._threads and not self._closing:
                    try:
                        self._start(name)
                    except RuntimeError:
                        log.exception("no thread could be started for %s", name)
            return self._alive

    def lane(self, tokens: int, caller: Caller) -> Lane:
        """Return the lane of a call: BULK if it has more tokens than two full micro-batches, else the caller's lane."""
        return self._backlog.lane(tokens, caller)

    @property
    def waiting_tokens(self) -> int:
        """Number of tokens that wait for a worker, in all lanes."""
        return self._backlog.tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one worker: median of the last measured batches, at most 9; 2000 before the first."""
        return self._rates.usual

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop each thread after its current batch, and wait for all. New and waiting calls fail with UNAVAILABLE.

        Args:
            deadline: until when to wait; None: without limit.

        Returns:
            Whether all threads have ended.
        """
        threads, deadline = self.stop(), deadline or Deadline()
        return all(deadline.join(thread) for thread in threads)

    def stop(self) -> list[threading.Thread]:
        """Make each thread end after its current batch; return all threads. New and waiting calls get UNAVAILABLE."""
        with self._lock:
            self._closing = True
            waiting = self._backlog.drain()
            self._work_waits.notify_all()
            self._express_waits.notify_all()
            threads = list(self._threads.values())
        fail(waiting, ServiceError(Code.UNAVAILABLE, "the server is stopping; try again", reason="STOPPING"))
        return threads

    def _submit(self, submission: Submission) -> None:
        if (tokens := submission.tokens) > self._max_queue_tokens:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                f"the call has {tokens} tokens, at most {self._max_queue_tokens} can wait at a time; split it",
                reason="CALL_TOO_LARGE",
            )
        with self._lock:
            if self._closing or not self._alive:
                raise ServiceError(Code.UNAVAILABLE, "the server runs no models now; try again", reason="NO_WORKERS")
            if self._backlog.tokens + tokens > self._max_queue_tokens:
                raise self._full(tokens)
            self._check_time(tokens, submission.caller)
            self._live.add(submission)
            self._backlog.add(submission)
            self._work_waits.notify(len(submission.texts))
            if self._is_for_express():
                self._express_waits.notify()

    def _end(self, submission: Submission) -> None:
        """Mark a submission as over. If its caller left or it failed, remove its waiting texts from the queue."""
        submission.over = True
        with self._lock:
            self._live.discard(submission)
            if submission.remaining:
                self._backlog.discard(submission)

    def _check_time(self, tokens: int, caller: Caller) -> None:
        """Raise RESOURCE_EXHAUSTED, and count it, if a call of `tokens` tokens is estimated to miss its deadline.

        Not checked before 3 batches were measured. Needs the lock.
        """
        if caller.deadline == inf or not self._rates.measured:
            return
        wait = self._seconds(self._backlog.ahead(tokens, caller))
        # Estimated time of the waiting texts that run before this call, of its own tokens and, if there are such texts,
        # of a full batch on one worker: a batch in progress takes no longer than that, unless it is one longer text.
        needed = wait + self._seconds(tokens) + (self._batch_tokens / self._rates.usual if wait else 0.0)
        left = caller.deadline - perf_counter()
        if _MARGIN * needed > left:
            self.counts.refused += 1
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"the call needs about {_MARGIN * needed:.1f} s ({wait:.1f} s of them for calls before it), and its "
                f"deadline is in {max(0.0, left):.1f} s; give it a longer timeout, send fewer texts, or try again "
                "later",
                reason="DEADLINE_TOO_SOON",
                retry_after=wait or None,  # if nothing waits, a retry would be too late as well
            )

    def _full(self, tokens: int) -> ServiceError:
        self.counts.refused += 1
        waiting = self._backlog.tokens
        return ServiceError(
            Code.RESOURCE_EXHAUSTED,
            f"{waiting} tokens wait already, with this call's {tokens or 'own'} it would be more than "
            f"{self._max_queue_tokens}; try again later",
            reason="QUEUE_FULL",
            retry_after=self._seconds(waiting),
        )

    def _seconds(self, tokens: int) -> float:
        """Return the estimated seconds that all live workers together need for `tokens` tokens, at the usual rate."""
        return tokens / (self._rates.usual * max(1, self._alive))

    def _min_seconds(self, submission: Submission) -> float:
        """Estimate the minimum seconds of a submission with all live workers, at the best rate; 0 before 3 batches."""
        return submission.tokens_left / (self._rates.best * max(1, self._alive))

    def _is_for_express(self) -> bool:
        """Return whether interactive texts wait while all live workers run bulk batches; False if none is alive."""
        return self._at_bulk >= self._alive > 0 and self._backlog.waits(Lane.INTERACTIVE)

    def _start(self, name: str) -> None:
        """Start the thread `express` or `worker-N`; RuntimeError if the system gives no thread. Needs the lock.

        `express` is not counted as alive, since it runs no bulk work.
        """
        express = name == "express"
        thread = threading.Thread(target=self._work, args=(name, express), name=name, daemon=True)
        thread.start()
        self._threads[name] = thread
        self._alive += not express

    def _work(self, name: str, express: bool) -> None:
        try:
            lower_priority()
            while self._work_once(express):
                pass
        finally:
            self._leave(name)

    def _work_once(self, express: bool) -> bool:
        """Wait for a batch and run it; return False when the server is stopping.

        This function exists so that its local variables, and so the batch, are freed before the next wait.
        """
        batch = self._express_batch() if express else self._next_batch()
        if batch:
            self._run_batch(batch)
        return bool(batch)

    def _next_batch(self) -> list[Item]:
        """Wait for a micro-batch and return it; empty when the server is stopping."""
        with self._lock:
            while True:
                self._work_waits.wait_for(lambda: self._backlog or self._closing)
                if self._closing:
                    return []
                if wanted := self._take(self._backlog.next_lane()):
                    return wanted

    def _express_batch(self) -> list[Item]:
        """Wait until `_is_for_express`; return a batch of interactive texts, empty when the server is stopping."""
        with self._lock:
            while True:
                self._express_waits.wait_for(lambda: self._closing or self._is_for_express())
                if self._closing:
                    return []
                if wanted := self._take(Lane.INTERACTIVE):
                    return wanted

    def _take(self, lane: Lane) -> list[Item]:
        """Take a batch from a lane with waiting texts; return its texts, without those of calls that ended or are late.

        The late calls, which can no longer meet their deadline, fail with DEADLINE_EXCEEDED. The result may be empty.
        If the queue fails, all calls fail with INTERNAL, and the error is raised. Needs the lock.
        """
        now = perf_counter()
        try:
            batch = self._backlog.take(lane)
        except BaseException:
            # The queue is inconsistent: which texts were removed is unknown. So all calls fail, since none may hang.
            self._backlog.drain()
            fail(self._live, failure())
            raise
        late = {
            item.submission
            for item in batch
            if not item.submission.over and item.submission.caller.deadline < now + self._min_seconds(item.submission)
        }
        self.counts.expired += len(late)
        fail(late, ServiceError(Code.DEADLINE_EXCEEDED, _LATE))
        return [item for item in batch if not item.submission.over]

    def _run_batch(self, batch: list[Item]) -> None:
        bulk = batch[0].submission.lane is Lane.BULK
        with self._lock:
            self._busy += 1
            self._at_bulk += bulk
            if bulk:
                self._express_waits.notify()
            alone = self._busy == 1 and not self._backlog and len(batch) == 1
        try:
            self._run_and_finish(batch, self._workers if alone else 1)
        except BaseException:  # the worker ends, but no caller may hang
            fail({item.submission for item in batch}, failure())
            raise
        finally:
            with self._lock:
                self._busy -= 1
                self._at_bulk -= bulk

    def _run_and_finish(self, batch: list[Item], threads: int = 1) -> None:
        """Run a batch. If the model fails, run each call's part alone: only calls whose own texts fail get INTERNAL."""
        start = perf_counter()
        try:
            output = batch[0].submission.runner.run([item.submission.texts[item.row] for item in batch], threads)
        except Exception:
            log.exception("a micro-batch of %d texts failed", len(batch))
            self.counts.failed_batches += 1
        else:
            self._finish(batch, output, start, perf_counter(), threads)
            return
        by_call = sorted(batch, key=lambda item: id(item.submission))
        calls = [list(own) for _, own in groupby(by_call, key=lambda item: id(item.submission))]
        if len(calls) == 1:
            fail([batch[0].submission], failure())
            return
        for own in calls:
            self._run_and_finish(own)

    def _finish(self, batch: list[Item], output: Output, start: float, end: float, threads: int) -> None:
        """Store and count the output of a batch, run from `start` to `end` (`perf_counter`); send complete results."""
        tokens = sum(item.length for item in batch)
        runner = batch[0].submission.runner
        full = runner.batch_tokens or self._batch_tokens
        finished = []
        # The rows are copied, since a view would keep the output of the whole batch in memory.
        rows = [np.array(row) for row in output]
        with self._lock:
            # The measured rate is that of one thread, so runs on several threads do not count.
            if threads == 1 and tokens >= full * _MIN_MEASURED_SHARE:
                self._rates.add(tokens / (end - start))
            self.counts.batches += 1
            self.counts.texts += len(batch)
            self.counts.tokens += tokens
            self.counts.padding += runner.padded(max(item.length for item in batch)) * len(batch) - tokens
            for item, row in zip(batch, rows, strict=True):
                submission = item.submission
                submission.started = min(submission.started or start, start)  # an earlier batch may end later
                submission.rows[item.row] = row
                submission.remaining -= 1
                if not submission.remaining:
                    finished.append(submission)
        send([(submission, result_of(submission, end)) for submission in finished])

    def _leave(self, name: str) -> None:
        """Remove a thread that ends. Unless the server is stopping, the thread died: start another one in its place.

        If that fails, call `on_failure`, and, if no worker is left, fail the waiting calls with UNAVAILABLE.
        """
        with self._lock:
            self._alive -= name != "express"
            del self._threads[name]
            if self._closing:
                return
            self.counts.lost_workers += 1
            if self._is_for_express():
                self._express_waits.notify()
            try:
                self._start(name)
            except RuntimeError:
                log.exception("no thread could be started to replace %s", name)
            else:
                log.error("%s died and was replaced", name)
                return
            waiting = set() if self._alive else self._backlog.drain()
        fail(waiting, ServiceError(Code.UNAVAILABLE, "the server runs no models now; try again", reason="NO_WORKERS"))
        self._on_failure()
