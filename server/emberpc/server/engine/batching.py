"""Choose the waiting texts of the next micro-batch.

A CPU is fastest with small batches of texts of similar length. Padding is wasted work, and a batch of more than some
hundred tokens does not fit into the processor's cache. So the texts that wait for a model are sorted by length. A
micro-batch is a run of neighbours in that order whose padded size stays within the budget.

A micro-batch is built around one text, the anchor. Callers take turns to give the anchor. The calls of one caller are
run in the order of their arrival: if they took turns too, all of them would end late under load. Bulk work waits in its
own lane, and so does each call that is so large that others would wait for it. A batch holds texts of one lane only:
otherwise a short call would take as long as the bulk texts in its batch.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import NamedTuple, Protocol

from emberpc.server.engine.caller import Caller, Lane
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenIds

#: A call of more micro-batches than this goes into the bulk lane, whatever priority its caller asked for.
_LARGE = 2

#: Fixed cost of a batch, in tokens. Measured with MiniLM on one core: batches of 128, 256 and 512 tokens took 16.4,
#: 30.7 and 59 ms, which is 0.11 ms for each token and 2.3 ms for each batch.
_BATCH_COST = 20

_numbers = count()


class BatchRunner(Protocol):
    """Runs a batch; an `Encoder`."""

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run the token ids of some texts on at most `threads` threads; return float32, shape (texts, width)."""
        ...


@dataclass(frozen=True)
class JobResult:
    """Outputs and times of a finished job.

    Attributes:
        rows: the output for each text, float32 (width,).
        queue_seconds: wall time from the submission to the start of the first batch.
        infer_seconds: wall time from the start of the first batch to the end of the last one.
    """

    rows: list[Output]
    queue_seconds: float
    infer_seconds: float


@dataclass(eq=False)
class Job:
    """The texts of one call that run through one model.

    Attributes:
        runner: runs the batches.
        texts: token ids of each text.
        caller: who sent the call, its lane and its deadline.
        future: set on the caller's event loop when the job ends.
        over: whether the job ended: its result was sent, or its caller left.
        tokens: number of tokens of all texts.
        rows: the output of each text so far.
        remaining: number of texts without an output.
        submitted: when the job was submitted, as `perf_counter` gives it.
        started: when its first batch started; 0 before that.
    """

    runner: BatchRunner
    texts: Sequence[TokenIds]
    caller: Caller
    future: asyncio.Future[JobResult]
    over: bool = False
    tokens: int = field(init=False)
    rows: list[Output | None] = field(init=False)
    remaining: int = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    started: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = sum(len(ids) for ids in self.texts)
        self.rows = [None] * len(self.texts)
        self.remaining = len(self.texts)

    @property
    def tokens_left(self) -> int:
        """Estimated number of tokens that are still to be run."""
        return self.tokens * self.remaining // len(self.texts)


class Item(NamedTuple):
    """One text of a job. Items are sorted by length, then by arrival; `number` is unique."""

    length: int
    number: int
    job: Job
    row: int


class Queue:
    """The texts that wait in one lane. Not thread-safe: the scheduler holds its lock around every call."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._pools: dict[BatchRunner, list[Item]] = {}
        #: Callers, in the order of their turns.
        self._turns: deque[str] = deque()
        #: Waiting texts of each caller, call by call. Texts in `_taken` are skipped.
        self._texts: dict[str, deque[Iterator[Item]]] = {}
        #: Number of waiting tokens of each caller.
        self._tokens: Counter[str] = Counter()
        self._taken: set[int] = set()
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._pools)

    def add(self, job: Job) -> None:
        """Add the texts of a job."""
        items = [Item(len(ids), next(_numbers), job, row) for row, ids in enumerate(job.texts)]
        pool = self._pools.setdefault(job.runner, [])
        if len(items) == 1:
            insort(pool, items[0])
        else:
            pool.extend(items)
            pool.sort()
        name = job.caller.name
        if name not in self._texts:
            self._texts[name] = deque()
            self._turns.append(name)
        self._texts[name].append(iter(items))
        self._tokens[name] += job.tokens
        self.tokens += job.tokens

    def ahead(self, name: str, tokens: int) -> int:
        """Return how many waiting tokens are run before a new call ends, without the tokens of that call.

        Between two turns of this caller, each other caller has one turn. The result is at most all waiting tokens.

        Args:
            name: the caller of the new call.
            tokens: number of tokens of the new call.
        """
        callers = len(self._tokens) + (name not in self._tokens)
        return min(self.tokens, self._tokens.get(name, 0) * callers + tokens * (callers - 1))

    def take(self) -> list[Item]:
        """Remove and return the next micro-batch.

        The batch has at least one text. All its texts are for one model, and its padded size is within the budget.
        """
        anchor = self._next_anchor()
        pool = self._pools[anchor.job.runner]
        low, high = self._window(pool, bisect_left(pool, anchor))
        batch = pool[low:high]
        del pool[low:high]
        if not pool:
            del self._pools[anchor.job.runner]
        # The anchor's call has an iterator over its texts that has passed the anchor already. The iterators of the
        # other calls have not passed their texts of this batch yet, so these are noted, to be skipped later.
        self._taken.update(item.number for item in batch if item is not anchor)
        for item in batch:
            self._count_out(item)
        if not self._pools:
            self._forget()
        return batch

    def discard(self, job: Job) -> None:
        """Remove the waiting texts of a job."""
        pool = self._pools.get(job.runner, [])
        gone = [item for item in pool if item.job is job]
        if not gone:
            return
        pool[:] = [item for item in pool if item.job is not job]
        if not pool:
            del self._pools[job.runner]
        self._taken.update(item.number for item in gone)  # the iterator of their call still has to skip them
        for item in gone:
            self._count_out(item)
        if not self._pools:
            self._forget()

    def _count_out(self, item: Item) -> None:
        name = item.job.caller.name
        self.tokens -= item.length
        self._tokens[name] -= item.length
        if not self._tokens[name]:
            del self._tokens[name]

    def drain(self) -> set[Job]:
        """Remove everything; return the jobs that waited."""
        jobs = {item.job for pool in self._pools.values() for item in pool}
        self._pools.clear()
        self._forget()
        self.tokens = 0
        return jobs

    def _forget(self) -> None:
        """Remove the turns of callers: nothing waits."""
        self._turns.clear()
        self._texts.clear()
        self._taken.clear()
        self._tokens.clear()

    def _next_anchor(self) -> Item:
        """Return the first waiting text of the caller whose turn it is; move that caller to the end of the turns."""
        while True:
            name = self._turns.popleft()
            calls = self._texts[name]
            while calls:
                for item in calls[0]:
                    if item.number in self._taken:
                        self._taken.remove(item.number)
                        continue
                    self._turns.append(name)
                    return item
                calls.popleft()
            del self._texts[name]

    def _window(self, pool: list[Item], anchor: int) -> tuple[int, int]:
        """Return the bounds of the best run of neighbours around an anchor, within the budget.

        The run grows by one text, on the better side, as long as that raises the share of the batch's time that is
        spent on tokens and not on padding or the fixed cost.

        Args:
            pool: waiting texts of one model, sorted by length.
            anchor: place of the anchor in `pool`.

        Returns:
            First place of the run, and the place after its last.
        """
        low, high, longest = anchor, anchor + 1, pool[anchor].length
        tokens, best = longest, _worth(longest, longest)
        while True:
            rows = high - low + 1
            shorter = longer = 0.0
            if low and longest * rows <= self.batch_tokens:
                shorter = _worth(tokens + pool[low - 1].length, longest * rows)
            if high < len(pool) and (length := pool[high].length) * rows <= self.batch_tokens:
                longer = _worth(tokens + length, length * rows)
            if max(shorter, longer) <= best:
                return low, high
            if longer > shorter:
                best, longest = longer, pool[high].length
                tokens, high = tokens + longest, high + 1
            else:
                best, low = shorter, low - 1
                tokens += pool[low].length


def _worth(tokens: int, padded: int) -> float:
    """Return the share of a batch's time that is spent on its tokens.

    Args:
        tokens: number of tokens of the batch.
        padded: number of tokens with padding.
    """
    return tokens / (padded + _BATCH_COST)


class Backlog:
    """The waiting texts of all lanes. Not thread-safe.

    Args:
        batch_tokens: most tokens of a micro-batch, padding included; a longer text is run alone.
        bulk_seconds: longest time between two turns of the bulk lane, however much interactive work waits.
    """

    def __init__(self, batch_tokens: int, bulk_seconds: float) -> None:
        self._batch_tokens = batch_tokens
        self._bulk_seconds = bulk_seconds
        self._queues = {lane: Queue(batch_tokens) for lane in Lane}
        #: When the bulk lane last had a turn, or bulk work began to wait.
        self._bulk_turn = 0.0

    def __bool__(self) -> bool:
        return any(self._queues.values())

    @property
    def tokens(self) -> int:
        """Number of waiting tokens."""
        return sum(queue.tokens for queue in self._queues.values())

    def waits(self, lane: Lane) -> bool:
        """Return whether anything waits in a lane."""
        return bool(self._queues[lane])

    def set_batch_tokens(self, tokens: int) -> None:
        """Set the most tokens of the micro-batches that follow."""
        self._batch_tokens = tokens
        for queue in self._queues.values():
            queue.batch_tokens = tokens

    def lane(self, tokens: int, caller: Caller) -> Lane:
        """Return the lane of a call with `tokens` tokens."""
        return Lane.BULK if tokens > _LARGE * self._batch_tokens else caller.lane

    def ahead(self, tokens: int, caller: Caller) -> int:
        """Return how many waiting tokens are run before a new call of `tokens` tokens ends, without its own."""
        own = self.lane(tokens, caller)
        precedence = sum(queue.tokens for lane, queue in self._queues.items() if lane < own)
        return precedence + self._queues[own].ahead(caller.name, tokens)

    def add(self, job: Job) -> None:
        """Add the texts of a job."""
        lane = self.lane(job.tokens, job.caller)
        if lane is Lane.BULK and not self._queues[lane]:
            self._bulk_turn = perf_counter()
        self._queues[lane].add(job)

    def next_lane(self) -> Lane:
        """Return the lane whose turn it is. At least one text must wait."""
        if not self._queues[Lane.BULK]:
            return Lane.INTERACTIVE
        if not self._queues[Lane.INTERACTIVE] or perf_counter() - self._bulk_turn > self._bulk_seconds:
            return Lane.BULK
        return Lane.INTERACTIVE

    def take(self, lane: Lane) -> list[Item]:
        """Remove and return a micro-batch of a lane in which at least one text waits."""
        if lane is Lane.BULK:
            self._bulk_turn = perf_counter()
        return self._queues[lane].take()

    def discard(self, job: Job) -> None:
        """Remove the waiting texts of a job."""
        self._queues[self.lane(job.tokens, job.caller)].discard(job)

    def drain(self) -> set[Job]:
        """Remove everything; return the jobs that waited."""
        return {job for queue in self._queues.values() for job in queue.drain()}
