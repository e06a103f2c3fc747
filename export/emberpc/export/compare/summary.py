"""Summarize a comparison: means over seeds, significance of differences, and the strategy to recommend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from emberpc.export.classify.strategies import EXPORTABLE, STRATEGIES
from emberpc.export.compare.comparison_run import ComparisonResult
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Outcome, budget_name
from emberpc.export.compare.planner import Skipped
from emberpc.export.compare.serving_cost import ServingCost

#: A difference of accuracies counts as significant if it is greater than this many standard errors (about 95 %
#: confidence).
_SIGNIFICANT_ERRORS = 2.0
#: Training times that differ by less than this many CPU-seconds are reported as about the same.
_NEGLIGIBLE_SECONDS = 1.0


@dataclass(frozen=True)
class Way:
    """A strategy on a base encoder, both by name."""

    base: str
    strategy: str

    @property
    def tunes(self) -> bool:
        """Whether the strategy trains the encoder's weights."""
        return STRATEGIES[self.strategy].tunes


@dataclass(frozen=True)
class Point:
    """A strategy on a base at one budget, with its figures as means over the seeds, by name, in `means`."""

    way: Way
    budget: int
    #: Number of training texts, as the rounded mean over the seeds.
    texts: int
    seeds: int
    means: dict[str, float]
    #: Half the width of the 95 % confidence interval of the accuracy over the seeds; None for a single seed.
    band: float | None
    #: Whether a test text got exactly the right labels, bool (seeds, test texts).
    right: npt.NDArray[np.bool_]
    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of the test texts whose labels are exactly right, in [0, 1]."""
        return self.means["accuracy"]

    @property
    def name(self) -> str:
        """Name of the strategy for a sentence, such as `linear on frozen vectors`."""
        if self.way.strategy == "zero-shot":
            return "zero-shot (label names alone)"
        return self.way.strategy if self.way.tunes else f"{self.way.strategy} on frozen vectors"


class Summary:
    """Means, winners and crossover of a comparison's outcomes.

    Args:
        result: the result of the comparison.
        worth: accuracy that a more expensive strategy must gain to be recommended, as a share in [0, 1].
    """

    def __init__(self, result: ComparisonResult, worth: float = 0.005) -> None:
        self.result = result
        self.worth = worth
        self._texts = {NO_TEXTS: 0.0, **result.per_label}

    @cached_property
    def points(self) -> list[Point]:
        """All points, ordered by the base's name, by strategy as listed in `STRATEGIES`, and by budget."""
        groups: dict[tuple[Way, int], list[Outcome]] = {}
        for outcome in self.result.outcomes:
            way = Way(outcome.cell.base, outcome.cell.strategy)
            groups.setdefault((way, outcome.cell.budget), []).append(outcome)
        order = list(STRATEGIES)
        found = [self._point(way, budget, outcomes) for (way, budget), outcomes in groups.items()]
        return sorted(found, key=lambda p: (p.way.base, order.index(p.way.strategy), self.per_label(p.budget)))

    def per_label(self, budget: int) -> float:
        """Return the mean number of training texts of a label at a budget."""
        return self._texts[budget]

    @cached_property
    def largest(self) -> int:
        """The budget with the most texts of a label on average, among all budgets at which a strategy was measured.

        It may be the constant `ALL`, or `NO_TEXTS` if only zero-shot was measured.
        """
        return max((point.budget for point in self.points), key=self.per_label)

    def at(self, budget: int) -> list[Point]:
        """Return the points at a budget; a strategy that learns from no texts is included at every budget."""
        return [point for point in self.points if point.budget in (budget, NO_TEXTS)]

    def curve(self, way: Way) -> list[Point]:
        """Return the points of one strategy on one base, in the order of their budgets."""
        return [point for point in self.points if point.way == way]

    @cached_property
    def ways(self) -> list[Way]:
        """The pairs of base and strategy that were measured."""
        return list(dict.fromkeys(point.way for point in self.points))

    @cached_property
    def best(self) -> Point:
        """The most accurate point at the largest budget."""
        return max(self.at(self.largest), key=lambda point: point.accuracy)

    @cached_property
    def winner(self) -> Point:
        """The recommended point at the largest budget, among the strategies that can be exported, if there are any.

        Candidates are compared from the cheapest training to the most expensive. A candidate replaces the current
        choice if it is more accurate by at least `worth`, and by more than 2 standard errors of the difference.
        """
        candidates = [point for point in self.at(self.largest) if point.way.strategy in EXPORTABLE]
        ranked = sorted(candidates or self.at(self.largest), key=lambda point: point.means["cpu_seconds"])
        taken = ranked[0]
        for point in ranked[1:]:
            gain = point.accuracy - taken.accuracy
            if gain >= self.worth and gain > _SIGNIFICANT_ERRORS * standard_error(point, taken):
                taken = point
        return taken

    @cached_property
    def frozen(self) -> Point | None:
        """The most accurate point at the largest budget of the strategies that do not train the encoder, or None."""
        return self._best(self.largest, lambda way: not way.tunes)

    @cached_property
    def tuned(self) -> Point | None:
        """The most accurate point at the largest budget of the strategies that train the encoder, or None."""
        return self._best(self.largest, lambda way: way.tunes)

    @cached_property
    def crossover(self) -> int | None:
        """The least budget from which on fine-tuning is significantly more accurate than frozen vectors.

        The best strategies of both kinds are compared at each budget that has both. None if fine-tuning is not ahead at
        the largest of these budgets.
        """
        found = None
        for budget in sorted({point.budget for point in self.points} - {NO_TEXTS}, key=self.per_label, reverse=True):
            tuned = self._best(budget, lambda way: way.tunes)
            frozen = self._best(budget, lambda way: not way.tunes)
            if tuned is None or frozen is None:
                continue
            if tuned.accuracy - frozen.accuracy <= _SIGNIFICANT_ERRORS * standard_error(tuned, frozen):
                break
            found = budget
        return found

    def serving(self, way: Way) -> ServingCost | None:
        """Return the serving cost of a strategy on a base, or None if it was not measured."""
        return next((c for c in self.result.serving if (c.base, c.strategy) == (way.base, way.strategy)), None)

    def where(self, budget: int) -> str:
        """Return a budget as a phrase: `at 8 of each label`, `with all 599 texts` or `without any text`."""
        if budget == ALL:
            return f"with all {len(self.result.train.texts):,} texts"
        return "without any text" if budget == NO_TEXTS else f"at {budget} of each label"

    def _best(self, budget: int, suits: Callable[[Way], bool]) -> Point | None:
        return max((p for p in self.at(budget) if suits(p.way)), key=lambda p: p.accuracy, default=None)

    def _point(self, way: Way, budget: int, outcomes: Sequence[Outcome]) -> Point:
        names = sorted(set.intersection(*(set(outcome.figures) for outcome in outcomes)))
        means = {name: float(np.mean([outcome.figures[name] for outcome in outcomes])) for name in names}
        accuracies = np.array([outcome.figures["accuracy"] for outcome in outcomes])
        targets = [np.flatnonzero(row).tolist() for row in self.result.test.targets]
        right = np.array([[a == b for a, b in zip(o.test.labels, targets, strict=True)] for o in outcomes])
        texts = round(float(np.mean([outcome.texts for outcome in outcomes])))
        return Point(way, budget, texts, len(outcomes), means, confidence_band(accuracies), right, tuple(outcomes))


def confidence_band(values: npt.NDArray[np.float64]) -> float | None:
    """Return half the width of the 95 % confidence interval of the mean of `values`, by Student's t.

    None is returned for a single value.
    """
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def standard_error(a: Point, b: Point) -> float:
    """Return the standard error of the difference of the accuracies of two points, as a share in [0, 1].

    Its square is the sum of two variances: that over the test texts, paired text by text, and that over the seeds.
    """
    difference = a.right.mean(axis=0) - b.right.mean(axis=0)
    of_texts = difference.var() / max(1, len(difference))
    of_seeds = sum(point.right.mean(axis=1).var(ddof=1) / point.seeds for point in (a, b) if point.seeds > 1)
    return float((of_texts + of_seeds) ** 0.5)


def recommendation(summary: Summary) -> str:
    """Return one sentence that names the recommended strategy, its accuracy, and gain and training time of another.

    The other strategy is the best one of the other kind, with or without training of the encoder, at the same budget;
    if there is none of that kind, it is the best of all others. With a single strategy, the sentence names no other.
    """
    winner, frozen, tuned = summary.winner, summary.frozen, summary.tuned
    where = summary.where(winner.budget if winner.budget == NO_TEXTS else summary.largest)
    base = f" ({winner.way.base})" if len(summary.result.sources) > 1 else ""
    taken = f"Take {winner.name}{base}: {winner.accuracy:.3f} {where}"
    others = [p for p in summary.at(summary.largest) if p is not winner]
    other = (frozen if winner.way.tunes else tuned) or max(others, key=lambda p: p.accuracy, default=None)
    return f"{taken}; {_versus(winner, other)}." if other else f"{taken}."


def _versus(winner: Point, other: Point) -> str:
    """Return a clause on the accuracy that `other` gains or loses against `winner`, and on its training time."""
    gain = 100 * (other.accuracy - winner.accuracy)
    significant = abs(gain) > 100 * _SIGNIFICANT_ERRORS * standard_error(winner, other)
    ratio = max(other.means["cpu_seconds"], 1e-3) / max(winner.means["cpu_seconds"], 1e-3)
    seconds = f"{_seconds(other.means['cpu_seconds'])} against {_seconds(winner.means['cpu_seconds'])}"
    price = f"for {_times(ratio)} the training time ({seconds} of CPU)"
    if abs(other.means["cpu_seconds"] - winner.means["cpu_seconds"]) < _NEGLIGIBLE_SECONDS:
        price = f"at about the same training time ({seconds} of CPU)"
    noise = "" if significant else ", which may be chance,"
    if gain > 0:
        return f"{other.name} adds {gain:.1f} points{noise} {price}"
    return f"{other.name} loses {-gain:.1f} points{noise} {price}"


def crossover(summary: Summary) -> str:
    """Return a sentence that names the budget from which on fine-tuning is significantly ahead of frozen vectors.

    The sentence says so if fine-tuning is ahead at no budget, or if the two were not both measured.
    """
    budgets = sorted({p.budget for p in summary.points if p.way.tunes}, key=summary.per_label)
    if not budgets:
        return "No fine-tuning was measured."
    if summary.tuned is None or summary.frozen is None:
        return "Fine-tuning and frozen vectors were not both measured at the largest budget."
    # The sentence says that the test texts chose both strategies: the best of several strategies is partly the luckiest
    # one, and the kind with more strategies profits more from this.
    sentence = (
        "The best fine-tuning was significantly ahead of the best strategy on frozen vectors, "
        "both chosen by the test texts, {}"
    )
    if summary.crossover is None:
        return sentence.format(f"at no budget up to {budget_name(budgets[-1])}.")
    if summary.crossover == budgets[0]:
        return sentence.format(f"at every budget from {budget_name(budgets[0])} on.")
    return sentence.format(f"from {budget_name(summary.crossover)} on; below that, frozen vectors are as good.")


def caveats(summary: Summary) -> list[str]:
    """Return warnings about the figures, one sentence each.

    The warnings are about test texts that are training texts, strategies fitted with one seed only, and strategies that
    had too few texts for a calibration. The list is empty if there is nothing to warn of.
    """
    training_texts = set(summary.result.train.texts)
    shared = [text for text in summary.result.test.texts if text in training_texts]
    once = [point for point in summary.points if point.seeds == 1 and point.budget != NO_TEXTS]
    raw = [point for point in summary.points if point.means.get("held_out_texts") == 0]
    found = []
    if shared:
        found.append(
            f"{len(shared)} test texts are training texts, too, for example “{shared[0]:.60}”: "
            "the accuracy is too high by up to their share."
        )
    if once:
        found.append(
            "Fitted with one seed only, so the standard error leaves out the random choice of training texts: "
            f"{_listed(once, summary)}."
        )
    if raw:
        found.append(
            "Too few texts to hold some out, so no temperature was fitted and the probabilities are not "
            f"calibrated: {_listed(raw, summary)}."
        )
    return found


def _listed(points: Sequence[Point], summary: Summary) -> str:
    """Return the budgets of points as text, grouped by strategy and base."""
    budgets: dict[Way, list[str]] = {}
    for point in points:
        budgets.setdefault(point.way, []).append(budget_name(point.budget))
    several = len(summary.result.sources) > 1
    return "; ".join(
        f"{way.strategy}{f' ({way.base})' if several else ''} at {', '.join(names)}" for way, names in budgets.items()
    )


def skipped_lines(summary: Summary) -> list[str]:
    """Return one line for each strategy, base and budget with skipped cells: how many seeds, and why the first."""
    groups: dict[tuple[Way, int], list[Skipped]] = {}
    for skipped in summary.result.skipped:
        cell = skipped.cell
        groups.setdefault((Way(cell.base, cell.strategy), cell.budget), []).append(skipped)
    several = len(summary.result.sources) > 1
    return [
        f"{way.strategy}{f' ({way.base})' if several else ''}, {budget_name(budget)}, "
        f"{len(group)} seed{'s' if len(group) > 1 else ''}: {group[0].reason}"
        for (way, budget), group in sorted(
            groups.items(), key=lambda item: (item[0][0].strategy, summary.per_label(item[0][1]))
        )
    ]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 10 else f"{ratio:,.0f}×"
