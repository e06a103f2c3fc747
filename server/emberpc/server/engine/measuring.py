"""Measure the speed of encoders with micro-batches of several lengths and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, thread_time
from typing import Generic, TypeVar

import numpy as np

from emberpc.server.engine.models.agreement import MeasurementStoppedError
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.tokenizing import TokenIds

#: Lengths, in tokens, of the texts by which engines are compared, and the size of their micro-batches.
LENGTHS = (8, 32, 128, 512)
BATCH_TOKENS = 512
#: Sizes of micro-batches, in tokens, that are measured. Smaller batches do not keep the arithmetic units of a core
#: busy. Larger batches do not fit into the caches of a processor.
SIZES = (128, 256, 512, 1024)
#: Length, in tokens, of the texts by which sizes are compared.
_SIZE_LENGTH = 32
#: Share of the best throughput on one thread that suffices. The smallest size that reaches this share is chosen. During
#: a smaller batch, a new call waits less, and large calls are divided more evenly: with MiniLM in bf16, 1,024 tokens
#: were 2 % faster than 512 on one thread, and 10 % slower with four callers of 32 texts on two workers.
_NEAR = 0.95
#: Rounds in which all alternatives take turns: those that count, and the maximum.
_ROUNDS, _MAX_ROUNDS = 3, 6
#: Least CPU time of the measuring thread on an idle host, as a share of the wall time. With less, the host was busy,
#: and the round does not count.
_IDLE_SHARE = 0.9

Key = TypeVar("Key")


class HostBusyError(Exception):
    """The host has too little free processor time or memory for a measurement; the text says which."""


@dataclass(frozen=True)
class Speeds(Generic[Key]):
    """Seconds for one token, in rounds in which all alternatives take turns.

    Attributes:
        rounds: the seconds by alternative, for each round that counts.
    """

    rounds: Sequence[Mapping[Key, float]]

    def gain(self, key: Key, other: Key) -> float:
        """Return how many times as fast `key` is as `other`: the median over the rounds."""
        return median(one[other] / one[key] for one in self.rounds)

    def rate(self, key: Key) -> float:
        """Return tokens per second: the median over the rounds."""
        return median(1 / one[key] for one in self.rounds)


def compare_encoders(
    encoders: Mapping[Key, Encoder], ids: TokenIds, max_tokens: int, stop: Callable[[], bool]
) -> Speeds[Key]:
    """Measure encoders of one model with texts of several lengths, each in micro-batches of 512 tokens.

    Args:
        encoders: the encoders; each runs a batch on the calling thread.
        ids: token ids of a text, which are repeated or cut to the lengths.
        max_tokens: maximum number of tokens of a text.
        stop: returns whether to stop; called before each batch.

    Raises:
        HostBusyError: too few rounds found an idle host.
        MeasurementStoppedError: `stop` returned True.
        Exception: an encoder failed.
    """
    lengths = sorted({min(length, max_tokens) for length in LENGTHS})
    batches = [_batch(ids, length, BATCH_TOKENS) for length in lengths]
    return _rounds({key: (encoder, batches) for key, encoder in encoders.items()}, stop)


def compare_sizes(encoder: Encoder, ids: TokenIds, max_tokens: int, stop: Callable[[], bool]) -> Speeds[int]:
    """Measure sizes of micro-batches; the keys are the sizes in tokens.

    For the arguments and the errors, see `compare_encoders`.
    """
    length = min(_SIZE_LENGTH, max_tokens)
    return _rounds({size: (encoder, [_batch(ids, length, size)]) for size in SIZES}, stop)


def best_size(speeds: Speeds[int]) -> int:
    """Return the smallest size, in tokens, that has at least 95 % of the best throughput."""
    rates = {size: speeds.rate(size) for size in speeds.rounds[0]}
    return min(size for size, rate in rates.items() if rate >= _NEAR * max(rates.values()))


def _batch(ids: TokenIds, length: int, tokens: int) -> list[TokenIds]:
    return [np.resize(ids, length)] * max(1, tokens // length)


def _rounds(work: Mapping[Key, tuple[Encoder, Sequence[list[TokenIds]]]], stop: Callable[[], bool]) -> Speeds[Key]:
    """Run the batches of each alternative in turns, until enough rounds found an idle host.

    For the errors, see `compare_encoders`.
    """
    for encoder, batches in work.values():  # the first run with a shape prepares the engine for it
        for batch in batches:
            _timed(encoder, batch, stop)
    found: list[dict[Key, float]] = []
    for _ in range(_MAX_ROUNDS):
        seconds: dict[Key, float] = {}
        idle = True
        for key, (encoder, batches) in work.items():
            seconds[key] = 0.0
            for batch in batches:
                taken, share = _timed(encoder, batch, stop)
                seconds[key] += taken / sum(len(ids) for ids in batch) / len(batches)
                idle = idle and share >= _IDLE_SHARE
        if idle:
            found.append(seconds)
        if len(found) == _ROUNDS:
            return Speeds(found)
    raise HostBusyError("the host was busy")


def _timed(encoder: Encoder, batch: list[TokenIds], stop: Callable[[], bool]) -> tuple[float, float]:
    """Run a batch; return its wall seconds, and the CPU time of this thread as a share of them."""
    if stop():
        raise MeasurementStoppedError
    start, own = perf_counter(), thread_time()
    encoder.run(batch)
    taken = perf_counter() - start
    return taken, (thread_time() - own) / taken
