"""Estimate accuracies of strategies at budgets at which they were not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, log, log2, sqrt

import numpy as np

from emberpc.export.compare.outcomes import NO_TEXTS, Outcome, Way

#: Number of standard deviations on both sides of an estimate that make its 95 % interval.
_INTERVAL = 1.96
#: Change of the log-odds of an error for twice the texts, if no other strategy shows it.
_SLOPE = -0.15
#: Standard deviation of that change between strategies on the same data; this and the next constants are estimates from
#: a few data sets.
_SLOPE_DEVIATION = 0.08
#: Mean change of the log-odds of an error from the quick to the full profile, and its standard deviation.
_FULL_GAIN, _FULL_DEVIATION = -0.11, 0.12
#: Standard deviation of the log-odds of errors between strategies that train the same encoder with the same texts.
_KIN_DEVIATION = 0.2
#: Minimum distance of a figure from 0 and 1: the log-odds of 0 do not exist.
_MARGIN = 1e-3


@dataclass(frozen=True)
class Estimate:
    """Expected value of a figure in [0, 1], with the 95 % interval from `low` to `high`.

    `measured` says whether the strategy was measured with its full profile at the budget. Otherwise the value is
    extrapolated, from the quick profile or from a smaller budget.
    """

    value: float
    low: float
    high: float
    measured: bool


@dataclass(frozen=True)
class MeasuredFigure:
    """Mean of a figure in [0, 1] over the seeds of a strategy, and the standard error of the mean."""

    value: float
    error: float


#: Way, budget, and whether the profile is the quick one.
Place = tuple[Way, int, bool]


def measured_figures(outcomes: Iterable[Outcome], metric: str) -> dict[Place, MeasuredFigure]:
    """Return the mean of a figure over the seeds, by way, budget and profile.

    The standard error is the binomial one of the number of test texts. A variance below 0.0001 counts as 0.0001.

    Args:
        outcomes: outcomes of cells.
        metric: name of the figure, such as `accuracy`.
    """
    found: dict[Place, list[float]] = {}
    tested = 1
    for outcome in outcomes:
        cell = outcome.cell
        tested = max(tested, len(outcome.test.labels))
        found.setdefault((cell.way, cell.budget, cell.quick), []).append(outcome.figures[metric])
    means = {place: float(np.mean(values)) for place, values in found.items()}
    return {place: MeasuredFigure(mean, sqrt(max(mean * (1 - mean), 1e-4) / tested)) for place, mean in means.items()}


class Estimates:
    """Estimates of a figure for every strategy at every budget, from what was measured.

    The log-odds of an error, log(error / (1 - error)), are taken as linear in the logarithm of the number of texts.
    For a small error, this is the power law of learning curves (Hestness et al., "Deep Learning Scaling is Predictable,
    Empirically", 2017). For an accuracy near 0, where a power law would promise large gains, gains stay small.

    Args:
        figures: what was measured, from `measured_figures`.
        per_label: mean number of texts of a label, by budget.
    """

    def __init__(self, figures: Mapping[Place, MeasuredFigure], per_label: Mapping[int, float]) -> None:
        self._figures = figures
        self._per_label = per_label

    def at(self, way: Way, budget: int) -> Estimate | None:
        """Return the estimate for the full profile of a strategy at a budget.

        Args:
            way: the strategy on its base.
            budget: a budget with texts.

        Returns:
            The measured value; else an extrapolation from the quick profile at this budget; else one from the largest
            smaller budget, by the slope of the strategy's own learning curve and of those of other strategies. For a
            strategy that trains the encoder, the last is combined with those of other such strategies that were
            measured with more texts. None if the strategy was not measured at this budget or below.
        """
        if (found := self._figures.get((way, NO_TEXTS, False))) is not None:
            return _estimate(*_log_odds(found), measured=True)
        anchor = self._anchor(way, budget)
        if anchor is None:
            return None
        at, quick = anchor
        level, variance = self._extrapolated(way, anchor, budget)
        reached = self._per_label[at] == self._per_label[budget]
        if way.tunes and not reached:
            level, variance = self._drawn_to_kin(level, variance, way, at, budget)
        return _estimate(level, sqrt(variance), measured=reached and not quick)

    def _anchor(self, way: Way, budget: int) -> tuple[int, bool] | None:
        """Return the largest budget, up to `budget`, at which a strategy was measured, and whether only quickly."""
        anchors = [
            (self._per_label[at], not quick, at == budget, at)
            for known, at, quick in self._figures
            if known == way and self._per_label[at] <= self._per_label[budget]
        ]
        if not anchors:
            return None
        _, full, _, at = max(anchors)
        return at, not full

    def _extrapolated(self, way: Way, anchor: tuple[int, bool], budget: int) -> tuple[float, float]:
        """Return the log-odds of a strategy's errors at a budget by its own measurement, and their variance."""
        at, quick = anchor
        level, error = _log_odds(self._figures[way, at, quick])
        variance = error**2
        if quick:
            level, variance = level + _FULL_GAIN, variance + _FULL_DEVIATION**2
        doublings = log2(self._per_label[budget] / self._per_label[at])
        slope, deviation = self._slope(way, at, budget)
        return level + slope * doublings, variance + (deviation * doublings) ** 2

    def _drawn_to_kin(self, level: float, variance: float, way: Way, start: int, budget: int) -> tuple[float, float]:
        """Combine an extrapolation with those of other strategies that train the same encoder.

        With the same texts, such strategies differ little, and an extrapolation over several doublings is uncertain.
        So those count that were measured with more texts than the strategy itself, which was at the budget `start`.
        """
        kin = [
            self._extrapolated(other, anchor, budget)
            for other in {known for known, _, _ in self._figures}
            if other != way and other.tunes and other.base == way.base
            if (anchor := self._anchor(other, budget)) is not None
            and self._per_label[anchor[0]] > self._per_label[start]
        ]
        if not kin:
            return level, variance
        mean = float(np.mean([one for one, _ in kin]))
        spread = _KIN_DEVIATION**2 + float(np.mean([one for _, one in kin]))
        weight = spread / (spread + variance)
        return weight * level + (1 - weight) * mean, weight * variance

    def _slope(self, way: Way, start: int, end: int) -> tuple[float, float]:
        """Return the change of the log-odds of a strategy's errors for twice the texts, and its standard deviation.

        The change is that of other strategies between the budgets `start` and `end`, combined with that of the
        strategy itself below `start`, weighted by their variances.
        """
        if self._per_label[start] == self._per_label[end]:
            return 0.0, 0.0
        others = [
            self._change(known, start, end, quick=False)
            for known, at, quick in self._figures
            if not quick and at == end and known != way and (known, start, False) in self._figures
        ]
        mean, variance = float(np.mean([change for change, _ in others])) if others else _SLOPE, _SLOPE_DEVIATION**2
        smaller = [
            (self._per_label[at], at, quick)
            for known, at, quick in self._figures
            if known == way and self._per_label[at] < self._per_label[start] and (known, start, quick) in self._figures
        ]
        if smaller:
            _, at, quick = max(smaller)
            own, error = self._change(way, at, start, quick=quick)
            own_variance = error**2 + _SLOPE_DEVIATION**2  # the slope of a curve changes along the curve
            mean = (mean / variance + own / own_variance) / (1 / variance + 1 / own_variance)
            variance = 1 / (1 / variance + 1 / own_variance)
        return min(mean, 0.0), sqrt(variance)

    def _change(self, way: Way, start: int, end: int, *, quick: bool) -> tuple[float, float]:
        """Return the change of the log-odds of an error for twice the texts, and its standard error."""
        doublings = log2(self._per_label[end] / self._per_label[start])
        first, first_error = _log_odds(self._figures[way, start, quick])
        last, last_error = _log_odds(self._figures[way, end, quick])
        return (last - first) / doublings, sqrt(first_error**2 + last_error**2) / doublings


def _log_odds(found: MeasuredFigure) -> tuple[float, float]:
    """Return the log-odds of an error, and their standard error."""
    value = min(max(found.value, _MARGIN), 1 - _MARGIN)
    return log((1 - value) / value), found.error / (value * (1 - value))


def _estimate(level: float, deviation: float, *, measured: bool) -> Estimate:
    """Return the estimate for log-odds of an error with a normal distribution."""

    def figure(log_odds: float) -> float:
        return 1 / (1 + exp(log_odds))

    spread = _INTERVAL * deviation
    return Estimate(figure(level), figure(level + spread), figure(level - spread), measured)
