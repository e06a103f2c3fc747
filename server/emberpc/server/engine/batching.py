"""Which waiting texts go into the next micro-batch.

A CPU is fastest with small batches of like length: padding is work thrown
away, and a batch of more than some hundred tokens leaves the cache. So the
texts that wait for a model are kept in order of length, and a micro-batch is a
run of neighbours in that order whose padded size stays within the budget.

It is built around one text, the anchor. Anchors are taken from the callers in
turn, and of a caller's calls in their order: in turns all of them would end
late under load, in order those that were taken end in time. Bulk work waits in
a lane of its own, and so does any call so large that others would wait for it;
batches of one lane hold no text of the other, or a short call would last as
long as the bulk that fills up its batch.
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

from emberpc.server.engine.calls import Caller, Lane
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import TokenIds

#: A call of more than so many micro-batches goes with the bulk work, whatever its caller says of it.
_LARGE = 2

#: What a batch costs beside its tokens, in tokens. Measured with MiniLM on one core: 16.4, 30.7 and 59 ms for 128, 256
#: and 512 tokens are 0.11 ms for each token and 2.3 ms for the batch.
_BATCH_COST = 20

_numbers = count()


class Runner(Protocol):
    """What runs a batch: an `Encoder`."""

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run token ids of some texts on so many threads at most; float32, shape (texts, width)."""
        ...


@dataclass(frozen=True)
class JobResult:
    """What a job gave.

    `rows[i]` is the output for text i, float32 (width,). The seconds are wall
    time: from submission to the first batch's start, and from there to the
    last batch's end.
    """

    rows: list[Output]
    queue_seconds: float
    infer_seconds: float


@dataclass(eq=False)
class Job:
    """One call's texts on their way through one model.

    `future` belongs to the caller's event loop. `over`: nobody waits for the
    outcome any more, since it is told or its caller left.
    """

    runner: Runner
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
        """About how many tokens are still to be run."""
        return self.tokens * self.remaining // len(self.texts)


class Item(NamedTuple):
    """One text of a job; ordered by length, then by arrival: no two have the same number."""

    length: int
    number: int
    job: Job
    row: int


class Queue:
    """All that waits in one lane. Not thread-safe: the scheduler holds its lock around every call."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._pools: dict[Runner, list[Item]] = {}
        #: The callers in turn.
        self._turns: deque[str] = deque()
        #: Each caller's waiting texts, call by call; those already taken are skipped.
        self._texts: dict[str, deque[Iterator[Item]]] = {}
        #: Tokens of each caller that wait.
        self._tokens: Counter[str] = Counter()
        self._taken: set[int] = set()
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._pools)

    def add(self, job: Job) -> None:
        """Take in a job's texts."""
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
        """Return how many tokens would be run before a new call of a caller, of so many tokens, is done.

        Its own are not counted. Other callers have a turn for each of this one's, and no more than all that waits.
        """
        callers = len(self._tokens) + (name not in self._tokens)
        return min(self.tokens, self._tokens.get(name, 0) * callers + tokens * (callers - 1))

    def take(self) -> list[Item]:
        """Take the next micro-batch: texts of one model, at most the budget when padded, at least one text."""
        anchor = self._next_anchor()
        pool = self._pools[anchor.job.runner]
        low, high = self._window(pool, bisect_left(pool, anchor))
        batch = pool[low:high]
        del pool[low:high]
        if not pool:
            del self._pools[anchor.job.runner]
        # The anchor's call is past it already; the others are still to be met in their calls' turns.
        self._taken.update(item.number for item in batch if item is not anchor)
        for item in batch:
            self._count_out(item)
        if not self._pools:
            self._forget()
        return batch

    def discard(self, job: Job) -> None:
        """Take out what waits of a job that nobody wants any more."""
        pool = self._pools.get(job.runner, [])
        gone = [item for item in pool if item.job is job]
        if not gone:
            return
        pool[:] = [item for item in pool if item.job is not job]
        if not pool:
            del self._pools[job.runner]
        self._taken.update(item.number for item in gone)  # they are still to be met in their call's turn
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
        """Take out everything; return the jobs that waited."""
        jobs = {item.job for pool in self._pools.values() for item in pool}
        self._pools.clear()
        self._forget()
        self.tokens = 0
        return jobs

    def _forget(self) -> None:
        """Forget the turns of those who have nothing waiting any more."""
        self._turns.clear()
        self._texts.clear()
        self._taken.clear()
        self._tokens.clear()

    def _next_anchor(self) -> Item:
        """Return the first waiting text of the caller whose turn it is, who goes to the end of the line."""
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
        """Return the run of neighbours around an anchor that does most for its time, within the budget.

        It grows, to the better side, as long as that raises the share of the
        time that goes into tokens and not into padding or the batch itself.
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
    """Return the share of a batch's time that goes into its tokens."""
    return tokens / (padded + _BATCH_COST)


class Backlog:
    """All that waits, in its lanes. Not thread-safe.

    Args:
        batch_tokens: most tokens of a micro-batch, padding included; a longer text goes alone.
        bulk_seconds: the bulk lane has a turn at least so often, however much interactive work there is.
    """

    def __init__(self, batch_tokens: int, bulk_seconds: float) -> None:
        self._batch_tokens = batch_tokens
        self._bulk_seconds = bulk_seconds
        self._queues = {lane: Queue(batch_tokens) for lane in Lane}
        #: When bulk work last had a turn, or began to wait.
        self._bulk_turn = 0.0

    def __bool__(self) -> bool:
        return any(self._queues.values())

    @property
    def tokens(self) -> int:
        """How many tokens wait."""
        return sum(queue.tokens for queue in self._queues.values())

    def waits(self, lane: Lane) -> bool:
        """Return whether anything waits in a lane."""
        return bool(self._queues[lane])

    def set_batch_tokens(self, tokens: int) -> None:
        """Make the micro-batches from now on of another size."""
        self._batch_tokens = tokens
        for queue in self._queues.values():
            queue.batch_tokens = tokens

    def lane(self, tokens: int, caller: Caller) -> Lane:
        """Return the lane that a call of so many tokens belongs in."""
        return Lane.BULK if tokens > _LARGE * self._batch_tokens else caller.lane

    def ahead(self, tokens: int, caller: Caller) -> int:
        """Return how many tokens are run before a new call of so many is done, its own not counted."""
        own = self.lane(tokens, caller)
        precedence = sum(queue.tokens for lane, queue in self._queues.items() if lane < own)
        return precedence + self._queues[own].ahead(caller.name, tokens)

    def add(self, job: Job) -> None:
        """Take in a job's texts."""
        lane = self.lane(job.tokens, job.caller)
        if lane is Lane.BULK and not self._queues[lane]:
            self._bulk_turn = perf_counter()
        self._queues[lane].add(job)

    def next_lane(self) -> Lane:
        """Return the lane whose turn it is; something must wait."""
        if not self._queues[Lane.BULK]:
            return Lane.INTERACTIVE
        if not self._queues[Lane.INTERACTIVE] or perf_counter() - self._bulk_turn > self._bulk_seconds:
            return Lane.BULK
        return Lane.INTERACTIVE

    def take(self, lane: Lane) -> list[Item]:
        """Take a micro-batch from a lane in which something waits."""
        if lane is Lane.BULK:
            self._bulk_turn = perf_counter()
        return self._queues[lane].take()

    def discard(self, job: Job) -> None:
        """Take out what waits of a job that nobody wants any more."""
        self._queues[self.lane(job.tokens, job.caller)].discard(job)

    def drain(self) -> set[Job]:
        """Take out everything; return the jobs that waited."""
        return {job for queue in self._queues.values() for job in queue.drain()}
