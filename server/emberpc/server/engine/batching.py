"""Choose the waiting texts of the next micro-batch.

A CPU is fastest with small batches of texts of similar length. Padding is wasted work, and a batch of more than some
hundred tokens does not fit into the processor's cache. So the waiting texts of each lane and model are sorted by
length. A micro-batch is a run of neighbours in that order. Its padded size, which is the number of texts times the
length to which they are padded, stays within a limit. A text that alone exceeds the limit is run alone.

A micro-batch is built around one text, the anchor. Callers take turns to give the anchor. The anchors of one caller
come from its oldest waiting call: if its calls took turns too, all of them would end late under load. Bulk calls wait
in a lane of their own. A large call waits there too, whatever lane its caller chose, so that it does not hold up short
calls. A batch holds texts of one lane only: otherwise a short call would take as long as the bulk texts in its batch.
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
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds

#: Number of micro-batches. A call with more tokens than this number of full micro-batches waits in the bulk lane,
#: whatever lane its caller chose, so that short calls do not wait for its end.
_LARGE = 2

#: Fixed cost of a batch, in tokens. Measured with MiniLM on one core: batches of 128, 256 and 512 tokens took 16.4,
#: 30.7 and 59 ms, which is 0.11 ms for each token and 2.3 ms for each batch.
_BATCH_COST = 20

_numbers = count()


class BatchRunner(Protocol):
    """Protocol of an object that runs batches, such as an `Encoder`. A batch holds texts of one runner only."""

    @property
    def batch_tokens(self) -> int:
        """Maximum number of tokens of a micro-batch, padding included; 0: the default of the backlog."""
        ...

    def padded(self, tokens: int) -> int:
        """Return the length to which a batch is padded, if its longest text has that many tokens."""
        ...

    def rows(self, texts: int) -> int:
        """Return the number of texts to run as one batch, at least 1, if `texts` texts fit into a micro-batch."""
        ...

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run at least one text, given by its token ids, as one batch; return float32, shape (texts, width).

        The width is the number of values that the model gives for a text. The run may use `threads` threads. Any
        exception means that the model failed on the batch.
        """
        ...


@dataclass(frozen=True)
class SubmissionResult:
    """Outputs and times of a finished submission.

    Attributes:
        rows: the output for each text, in the order of the submission's texts; each is float32 (width,).
        queue_seconds: wall time from the submission until `Submission.started`.
        infer_seconds: wall time from `Submission.started` to the end of the submission's last batch.
    """

    rows: list[Output]
    queue_seconds: float
    infer_seconds: float


@dataclass(eq=False)
class Submission:
    """The texts of one call that run through one model.

    Attributes:
        runner: runs the batches.
        texts: token ids of each text.
        caller: who sent the call, its lane and its deadline.
        future: receives the result or the error, on the event loop of the caller.
        over: whether the submission ended: its result or error was sent, or its caller left.
        tokens: number of tokens of all texts.
        rows: the output of each text, float32 (width,); None as long as the text was not run.
        remaining: number of texts without an output.
        submitted: when the texts were submitted, in seconds of `time.perf_counter`.
        started: earliest start of the batches that succeeded, in the same seconds; 0 until one has ended.
        lane: the lane in which the texts wait or waited; `Backlog.add` sets it.
    """

    runner: BatchRunner
    texts: Sequence[TokenIds]
    caller: Caller
    future: asyncio.Future[SubmissionResult]
    over: bool = False
    tokens: int = field(init=False)
    rows: list[Output | None] = field(init=False)
    remaining: int = field(init=False)
    submitted: float = field(default_factory=perf_counter)
    started: float = 0.0
    lane: Lane = Lane.INTERACTIVE

    def __post_init__(self) -> None:
        self.tokens = sum(len(ids) for ids in self.texts)
        self.rows = [None] * len(self.texts)
        self.remaining = len(self.texts)

    @property
    def tokens_left(self) -> int:
        """Estimated number of tokens of the texts without an output: their share of the texts times all tokens."""
        return self.tokens * self.remaining // len(self.texts)


class Item(NamedTuple):
    """One waiting text of a submission. Items are sorted by `length`, then by `number`.

    Attributes:
        length: number of tokens of the text.
        number: unique number, which grows in the order of arrival.
        submission: the submission.
        row: index of the text in the submission.
    """

    length: int
    number: int
    submission: Submission
    row: int


class Queue:
    """The texts that wait in one lane, for any model. Not thread-safe: the scheduler holds a lock for each change.

    Args:
        batch_tokens: maximum number of tokens of a micro-batch, padding included, for runners that state none; a longer
            text is run alone.
    """

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._pools: dict[BatchRunner, list[Item]] = {}
        #: Names of callers, in the order of their turns to give the anchor.
        self._turns: deque[str] = deque()
        #: By the name of a caller: an iterator over the texts of each of its calls, in the order of arrival. Texts with
        #: a number in `_taken` are not waiting any more; they are skipped.
        self._texts: dict[str, deque[Iterator[Item]]] = {}
        #: Number of waiting tokens, by the name of the caller.
        self._tokens: Counter[str] = Counter()
        self._taken: set[int] = set()
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._pools)

    def add(self, submission: Submission) -> None:
        """Add the texts of a submission to the queue; a caller whose name is not in the turns gets the last turn."""
        items = [Item(len(ids), next(_numbers), submission, row) for row, ids in enumerate(submission.texts)]
        pool = self._pools.setdefault(submission.runner, [])
        if len(items) == 1:
            insort(pool, items[0])
        else:
            pool.extend(items)
            pool.sort()
        name = submission.caller.name
        if name not in self._texts:
            self._texts[name] = deque()
            self._turns.append(name)
        self._texts[name].append(iter(items))
        self._tokens[name] += submission.tokens
        self.tokens += submission.tokens

    def ahead(self, name: str, tokens: int) -> int:
        """Return an estimate of the number of this lane's waiting tokens that are run before a new call ends.

        The tokens of the new call itself are not counted. Callers take turns. So each other caller with waiting texts
        is assumed to run as many tokens as this caller, whose waiting and new tokens all run until then. The result is
        at most the number of all waiting tokens of the lane.

        Args:
            name: name of the caller of the new call.
            tokens: number of tokens of the new call.
        """
        callers = len(self._tokens) + (name not in self._tokens)
        return min(self.tokens, self._tokens.get(name, 0) * callers + tokens * (callers - 1))

    def take(self) -> list[Item]:
        """Remove and return the next micro-batch. At least one text must wait.

        All texts of the batch are for one model. The batch stays within the limit of tokens, padding included, unless
        it is a single text that alone exceeds the limit.
        """
        anchor = self._next_anchor()
        pool = self._pools[anchor.submission.runner]
        low, high = self._window(pool, bisect_left(pool, anchor))
        batch = pool[low:high]
        del pool[low:high]
        if not pool:
            del self._pools[anchor.submission.runner]
        # The iterator over the texts of the anchor's call has passed the anchor. No iterator has passed the other texts
        # of this batch yet, so their numbers are noted: the iterators must skip them later.
        self._taken.update(item.number for item in batch if item is not anchor)
        for item in batch:
            self._count_out(item)
        if not self._pools:
            self._forget()
        return batch

    def discard(self, submission: Submission) -> None:
        """Remove the waiting texts of a submission from the queue; do nothing if none waits."""
        pool = self._pools.get(submission.runner, [])
        gone = [item for item in pool if item.submission is submission]
        if not gone:
            return
        pool[:] = [item for item in pool if item.submission is not submission]
        if not pool:
            del self._pools[submission.runner]
        self._taken.update(item.number for item in gone)  # the iterator of their call still has to skip them
        for item in gone:
            self._count_out(item)
        if not self._pools:
            self._forget()

    def _count_out(self, item: Item) -> None:
        name = item.submission.caller.name
        self.tokens -= item.length
        self._tokens[name] -= item.length
        if not self._tokens[name]:
            del self._tokens[name]

    def drain(self) -> set[Submission]:
        """Remove all waiting texts of this lane; return their submissions."""
        submissions = {item.submission for pool in self._pools.values() for item in pool}
        self._pools.clear()
        self._forget()
        self.tokens = 0
        return submissions

    def _forget(self) -> None:
        """Clear the turns, the iterators, `_taken` and the token counts by caller. To be called when no text waits."""
        self._turns.clear()
        self._texts.clear()
        self._taken.clear()
        self._tokens.clear()

    def _next_anchor(self) -> Item:
        """Return the oldest waiting text of the caller whose turn it is; move that caller to the end of the turns.

        The iterator of the text's call moves past the text, but the text stays among the waiting texts of its model
        (`_pools`): `take` removes it there. A caller without waiting texts is removed from the turns. At least one text
        must wait.
        """
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
        """Choose a run of neighbours around an anchor, and return its bounds.

        The run begins with the anchor alone. It grows by one text, on the side where `_worth` becomes higher, as long
        as that raises `_worth` and the batch stays within the limit of tokens. Then it shrinks to the
        number of texts that `BatchRunner.rows` returns: texts below the anchor are left out first, then the longest.

        Args:
            pool: waiting texts of one model, sorted by length.
            anchor: index of the anchor in `pool`.

        Returns:
            Index of the first text of the run, and the index after that of its last text.
        """
        runner = pool[anchor].submission.runner
        limit, padded = runner.batch_tokens or self._batch_tokens, runner.padded
        low, high, tokens = anchor, anchor + 1, pool[anchor].length
        longest = padded(tokens)
        best = _worth(tokens, longest)
        while True:
            rows = high - low + 1
            shorter = longer = 0.0
            if low and longest * rows <= limit:
                shorter = _worth(tokens + pool[low - 1].length, longest * rows)
            if high < len(pool) and (length := padded(pool[high].length)) * rows <= limit:
                longer = _worth(tokens + pool[high].length, length * rows)
            if max(shorter, longer) <= best:
                break
            if longer > shorter:
                best, longest = longer, length
                tokens, high = tokens + pool[high].length, high + 1
            else:
                best, low = shorter, low - 1
                tokens += pool[low].length
        excess = high - low - runner.rows(high - low)
        from_below = min(excess, anchor - low)
        return low + from_below, high - (excess - from_below)


def _worth(tokens: int, padded: int) -> float:
    """Return the share (0 to 1) of a batch's time that is spent on its tokens, not on padding or the fixed cost.

    Args:
        tokens: number of tokens of the batch, without padding.
        padded: number of tokens of the batch, padding included.
    """
    return tokens / (padded + _BATCH_COST)


class Backlog:
    """The waiting texts of all lanes. Not thread-safe.

    Args:
        batch_tokens: maximum number of tokens of a micro-batch, padding included, for runners that state none; a longer
            text is run alone.
        bulk_seconds: seconds that bulk texts wait without a turn; after that, they have the next turn, however much
            interactive work waits.
    """

    def __init__(self, batch_tokens: int, bulk_seconds: float) -> None:
        self._batch_tokens = batch_tokens
        self._bulk_seconds = bulk_seconds
        self._queues = {lane: Queue(batch_tokens) for lane in Lane}
        #: The later of two times, in seconds of `perf_counter`: when the bulk lane last had a turn, and when a call
        #: last came into the empty bulk lane; 0 before both.
        self._bulk_turn = 0.0

    def __bool__(self) -> bool:
        return any(self._queues.values())

    @property
    def tokens(self) -> int:
        """Number of waiting tokens of all lanes, without padding."""
        return sum(queue.tokens for queue in self._queues.values())

    def waits(self, lane: Lane) -> bool:
        """Return whether a text waits in a lane."""
        return bool(self._queues[lane])

    def lane(self, tokens: int, caller: Caller) -> Lane:
        """Return the lane of a call with `tokens` tokens: BULK for a large call, else the lane of its caller.

        A call is large if it has more tokens than two full micro-batches.
        """
        return Lane.BULK if tokens > _LARGE * self._batch_tokens else caller.lane

    def ahead(self, tokens: int, caller: Caller) -> int:
        """Return an estimate of the number of waiting tokens of all lanes that are run before a new call ends.

        `Queue.ahead` estimates the tokens of the call's own lane. For a call in the bulk lane, all interactive tokens
        count too. For an interactive call, no bulk tokens count. The tokens of the new call itself do not count.

        Args:
            tokens: number of tokens of the new call.
            caller: the caller of the new call.
        """
        own = self.lane(tokens, caller)
        precedence = sum(queue.tokens for lane, queue in self._queues.items() if lane < own)
        return precedence + self._queues[own].ahead(caller.name, tokens)

    def add(self, submission: Submission) -> None:
        """Add the texts of a submission to the lane that `lane` returns for it."""
        submission.lane = self.lane(submission.tokens, submission.caller)
        if submission.lane is Lane.BULK and not self._queues[submission.lane]:
            self._bulk_turn = perf_counter()
        self._queues[submission.lane].add(submission)

    def next_lane(self) -> Lane:
        """Return the lane of the next micro-batch. At least one text must wait.

        This is the interactive lane, unless no text waits there, or bulk texts had no turn for `bulk_seconds`.
        """
        if not self._queues[Lane.BULK]:
            return Lane.INTERACTIVE
        if not self._queues[Lane.INTERACTIVE] or perf_counter() - self._bulk_turn > self._bulk_seconds:
            return Lane.BULK
        return Lane.INTERACTIVE

    def take(self, lane: Lane) -> list[Item]:
        """Remove and return the next micro-batch of a lane, in which at least one text must wait.

        For the bulk lane, this is a turn: `bulk_seconds` start again.
        """
        if lane is Lane.BULK:
            self._bulk_turn = perf_counter()
        return self._queues[lane].take()

    def discard(self, submission: Submission) -> None:
        """Remove the waiting texts of a submission from the lane that it waits in; do nothing if none waits."""
        self._queues[submission.lane].discard(submission)

    def drain(self) -> set[Submission]:
        """Remove all waiting texts of all lanes; return their submissions."""
        return {submission for queue in self._queues.values() for submission in queue.drain()}
