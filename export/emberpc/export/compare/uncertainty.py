"""Uncertainty of measured figures: a paired bootstrap over the test texts, and the spread over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import numpy.typing as npt

from emberpc.export.compare.outcomes import Decisions
from emberpc.export.data.examples import Targets

#: Number of samples of the bootstrap, and the minimum: a large test set gets fewer samples, to save memory.
_SAMPLES = 1000
_MIN_SAMPLES = 200
#: Number of weights of the bootstrap, samples times texts (80 MB as float32), beyond which there are fewer samples than
#: `_SAMPLES`. With `_MIN_SAMPLES` samples there may be more weights: 800 bytes for each text.
_MAX_WEIGHTS = 20_000_000
#: Quantiles of a 95 % interval.
_QUANTILES = (0.025, 0.975)

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Paired bootstrap over the test texts (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 16).

    All strategies are measured on the same texts, so each sample of texts is used for all of them. For the accuracy,
    two texts are added to the test, one that every strategy decides rightly and one that none does (Agresti and Coull,
    1998): without them, the interval of an accuracy of 1 would have no width. The interval of an F1 of 1 has none.

    Args:
        targets: the right labels of the test texts, bool (texts, labels).
    """

    def __init__(self, targets: Targets) -> None:
        count = len(targets)
        samples = max(_MIN_SAMPLES, min(_SAMPLES, _MAX_WEIGHTS // (count + 2)))
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(count + 2, np.full(count + 2, 1 / (count + 2)), size=samples)
        self._targets = targets
        self._weights = drawn[:, :count].astype(np.float32)
        self._right, self._total = drawn[:, count].astype(np.float64), float(count + 2)

    def samples(self, metric: str, decisions: Iterable[Decisions]) -> Samples:
        """Return samples of a figure, as the mean over seeds, float64 (samples,) in [0, 1].

        Args:
            metric: `accuracy`, `macro_f1` or `micro_f1`, as `evaluation.measure` defines them.
            decisions: decisions of one strategy on all test texts, for each seed.
        """
        found = [self._of_seed(metric, decided_labels(each, self._targets.shape)) for each in decisions]
        return np.asarray(np.mean(found, axis=0), dtype=np.float64)

    @cached_property
    def _weighted_targets(self) -> npt.NDArray[np.float32]:
        """The number of texts of each label in each sample, float32 (samples, labels)."""
        return np.asarray(self._weights @ self._targets.astype(np.float32), dtype=np.float32)

    def _of_seed(self, metric: str, decided: Targets) -> Samples:
        if metric == "accuracy":
            right = (decided == self._targets).all(axis=1).astype(np.float32)
            return np.asarray((self._weights @ right + self._right) / self._total, dtype=np.float64)
        both = self._weights @ (decided & self._targets).astype(np.float32)
        either = self._weights @ decided.astype(np.float32) + self._weighted_targets
        if metric == "micro_f1":
            return np.asarray(2 * both.sum(axis=1) / np.maximum(either.sum(axis=1), 1), dtype=np.float64)
        present = np.maximum((either > 0).sum(axis=1), 1)  # a label that a sample lacks has no F1 in it
        return np.asarray((2 * both / np.maximum(either, 1)).sum(axis=1) / present, dtype=np.float64)


def decided_labels(decisions: Decisions, shape: tuple[int, ...]) -> Targets:
    """Return the labels given to each text, bool of `shape`, which is (texts, labels)."""
    found = np.zeros(shape, dtype=bool)
    for row, labels in zip(decisions.rows, decisions.labels, strict=True):
        found[row, labels] = True
    return found


def spread_over_seeds(values: Iterable[Sequence[float]]) -> float:
    """Return the standard deviation of a figure over the seeds, pooled over strategies; 0 if all have one seed only.

    Args:
        values: the figure of each seed, for each strategy.
    """
    several = [np.asarray(each) for each in values if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    return float((sum(((each - each.mean()) ** 2).sum() for each in several) / freedom) ** 0.5) if freedom else 0.0


def with_seeds(samples: Samples, deviation: float, key: str) -> Samples:
    """Return samples of a mean over seeds with the spread over seeds added, in [0, 1].

    Args:
        samples: samples over test texts, float64 (samples,).
        deviation: standard deviation of the mean over seeds.
        key: what the figure belongs to; the same key always gets the same random numbers.
    """
    noise = np.random.default_rng(crc32(key.encode())).normal(0, deviation, len(samples))
    return np.clip(samples + noise, 0, 1)


def interval(value: float, samples: Samples) -> Interval:
    """Return a value with the 95 % interval of its samples; the interval contains the value."""
    low, high = np.quantile(samples, _QUANTILES)
    return Interval(value, min(float(low), value), max(float(high), value))
