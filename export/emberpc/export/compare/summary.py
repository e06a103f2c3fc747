"""Summarize a comparison: means over seeds with their uncertainty, estimates for the largest budget, baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from emberpc.bundle.evaluation import decision_figures
from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.classify.strategies.base import TYPICAL_LAYERS
from emberpc.export.compare.comparison_settings import ComparisonResult
from emberpc.export.compare.estimates import Estimate, Estimates, measured_figures
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Outcome, Way, take_budget
from emberpc.export.compare.serving_cost import ServingCost
from emberpc.export.compare.uncertainty import Bootstrap, Interval, Samples, interval, spread_over_seeds, with_seeds


@dataclass(frozen=True)
class Point:
    """A strategy on a base at one budget, with its figures as means over the seeds, by name, in `means`."""

    way: Way
    budget: int
    #: Whether the profile is the quick one.
    quick: bool
    #: Number of training texts, as the rounded mean over the seeds.
    texts: int
    seeds: int
    means: dict[str, float]
    #: The figure by which strategies are compared, with its 95 % interval.
    score: Interval
    #: Samples of that figure, float64 (samples,); those of all points belong together.
    samples: Samples
    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of the test texts whose labels are exactly right, in [0, 1]."""
        return self.means["accuracy"]


class Summary:
    """Means, estimates and baselines of a comparison's outcomes.

    Args:
        result: the result of the comparison.
        metric: name of the figure by which strategies are compared, such as `accuracy`.
    """

    def __init__(self, result: ComparisonResult, metric: str = "accuracy") -> None:
        self.result = result
        self.metric = metric
        self._texts = {NO_TEXTS: 0.0, **result.per_label}

    @cached_property
    def points(self) -> list[Point]:
        """All points, ordered by the base's name, by strategy as listed in `STRATEGIES`, and by budget.

        A point of the quick profile is left out where the full profile was measured.
        """
        groups: dict[tuple[Way, int, bool], list[Outcome]] = {}
        for outcome in self.result.outcomes:
            cell = outcome.cell
            groups.setdefault((cell.way, cell.budget, cell.quick), []).append(outcome)
        kept = {key: group for key, group in groups.items() if not key[2] or (*key[:2], False) not in groups}
        bootstrap = Bootstrap(self.result.test.targets)
        order = list(STRATEGIES)
        found = [
            self._point(key, outcomes, bootstrap, self._deviation(key[0], key[1], kept.values()))
            for key, outcomes in kept.items()
        ]
        return sorted(found, key=lambda p: (p.way.base, order.index(p.way.strategy), self.per_label(p.budget)))

    def per_label(self, budget: int) -> float:
        """Return the mean number of training texts of a label at a budget."""
        return self._texts[budget]

    @cached_property
    def largest(self) -> int:
        """The budget of the comparison with the most texts of a label on average.

        It may be the constant `ALL`, or `NO_TEXTS` if only zero-shot was measured.
        """
        return max(self._texts, key=self.per_label)

    def at(self, budget: int) -> list[Point]:
        """Return the points at a budget; a strategy that learns from no texts is included at every budget."""
        return [point for point in self.points if point.budget in (budget, NO_TEXTS)]

    def curve(self, way: Way) -> list[Point]:
        """Return the points of one strategy on one base, in the order of their budgets."""
        return [point for point in self.points if point.way == way]

    def last(self, way: Way) -> Point | None:
        """Return the point of a strategy on one base at the largest budget measured there; None if there is none."""
        return max(self.curve(way), key=lambda point: self.per_label(point.budget), default=None)

    @cached_property
    def ways(self) -> list[Way]:
        """The pairs of base and strategy that were measured."""
        return list(dict.fromkeys(point.way for point in self.points))

    @cached_property
    def estimates(self) -> Estimates:
        """Estimates of the figure by which strategies are compared."""
        return Estimates(measured_figures(self.result.outcomes, self.metric), self._texts)

    def estimate(self, way: Way) -> Estimate | None:
        """Return the estimate of a strategy at the largest budget; None if nothing was measured that allows one.

        Where the strategy was measured, the interval is that of the bootstrap.
        """
        found = self.estimates.at(way, self.largest)
        point = self.last(way)
        if found is None or not found.measured or point is None:
            return found
        return Estimate(point.score.value, point.score.low, point.score.high, True)

    @cached_property
    def majority(self) -> float:
        """The figure of the comparison if each test text gets the most frequent training label (or set of labels)."""
        (commonest, _), *_ = Counter(map(bytes, self.result.train.targets)).most_common(1)
        targets = self.result.test.targets
        decided = np.broadcast_to(np.frombuffer(commonest, dtype=bool), targets.shape)
        return decision_figures(decided, targets)[self.metric]

    @cached_property
    def frozen(self) -> Point | None:
        """The best point at the largest budget of the strategies that do not train the encoder, or None."""
        return self.best(self.largest, tunes=False)

    @cached_property
    def tuned(self) -> Point | None:
        """The best point at the largest budget of the strategies that train the encoder, or None."""
        return self.best(self.largest, tunes=True)

    def growth(self, point: Point, budget: int) -> float:
        """Return the estimated cost of the full profile of a strategy at a budget, as a multiple of a point's cost.

        Args:
            point: a point of the strategy.
            budget: the budget.
        """
        if point.budget == NO_TEXTS or (point.budget == budget and not point.quick):
            return 1.0
        more, own = (take_budget(self.result.train, each, 0) for each in (budget, point.budget))
        if not point.way.tunes:
            return len(more.texts) / max(1, len(own.texts))
        passes = STRATEGIES[point.way.strategy].passes
        # The ratio of two works hardly depends on the number of layers.
        return passes(more, TYPICAL_LAYERS) / max(1.0, passes(own, TYPICAL_LAYERS, quick=point.quick))

    @cached_property
    def ahead(self) -> dict[int, bool]:
        """Whether fine-tuning is significantly better than frozen vectors, by budget, in ascending order.

        The best strategies of both kinds are compared at each budget at which both were measured, fine-tuning with the
        full profile.
        """
        found = {}
        for budget in sorted({point.budget for point in self.points} - {NO_TEXTS}, key=self.per_label):
            tuned, frozen = self.best(budget, tunes=True), self.best(budget, tunes=False)
            if tuned is not None and frozen is not None and not tuned.quick:
                found[budget] = difference(tuned, frozen).low > 0
        return found

    def serving(self, way: Way) -> ServingCost | None:
        """Return the serving cost of a strategy on a base, or None if it was not measured."""
        return next((c for c in self.result.serving if (c.base, c.strategy) == way), None)

    def where(self, budget: int) -> str:
        """Return a budget as a phrase, such as `with up to 8 texts of each label` or `without labelled texts`."""
        if budget == ALL:
            return f"with all {len(self.result.train.texts):,} texts"
        if budget == NO_TEXTS:
            return "without labelled texts"
        return f"with up to {budget} text{'s' * (budget > 1)} of each label"

    def best(self, budget: int, *, tunes: bool) -> Point | None:
        """Return the best point at a budget of the strategies that can be served and train the encoder, or do not."""
        suitable = [point for point in self.at(budget) if point.way.served and point.way.tunes == tunes]
        return max(suitable, key=lambda point: point.score.value, default=None)

    def name(self, way: Way, *, quick: bool = False) -> str:
        """Return the name of a strategy for a sentence, such as `linear on frozen vectors`.

        If there are several bases, the name includes the base, unless the strategy uses none.

        Args:
            way: the strategy on its base.
            quick: whether its profile is the quick one.
        """
        if way.strategy == "tf-idf":
            return "TF-IDF with logistic regression"
        name = way.strategy if way.tunes else f"{way.strategy} on frozen vectors"
        name = "zero-shot (names or descriptions of the labels alone)" if way.strategy == "zero-shot" else name
        base = f" of {way.base}" if len(self.result.sources) > 1 else ""
        return f"{name}{' (quick)' * quick}{base}"

    def title(self, way: Way) -> str:
        """Return the name of a strategy for a table or list, with its base if there are several bases."""
        several = len(self.result.sources) > 1 and STRATEGIES[way.strategy].uses_encoder
        return f"{way.strategy} ({way.base})" if several else way.strategy

    def _deviation(self, way: Way, budget: int, groups: Iterable[Sequence[Outcome]]) -> float:
        """Return the standard deviation over seeds of the strategies of the same kind as `way` at a budget.

        If each of them has one seed only, it is that of all strategies at the budget; 0 if these have one seed only.
        """
        beside = [group for group in groups if group[0].cell.budget == budget]
        same_kind = [group for group in beside if group[0].cell.way.tunes == way.tunes]
        several = [group for group in same_kind if len(group) > 1] or beside
        return spread_over_seeds([outcome.figures[self.metric] for outcome in group] for group in several)

    def _point(
        self, key: tuple[Way, int, bool], outcomes: Sequence[Outcome], bootstrap: Bootstrap, deviation: float
    ) -> Point:
        way, budget, quick = key
        names = sorted(set.intersection(*(set(outcome.figures) for outcome in outcomes)))
        means = {name: float(np.mean([outcome.figures[name] for outcome in outcomes])) for name in names}
        texts = round(float(np.mean([outcome.texts for outcome in outcomes])))
        samples = bootstrap.samples(self.metric, (outcome.test for outcome in outcomes))
        of_seeds = 0.0 if budget == NO_TEXTS else deviation / len(outcomes) ** 0.5
        samples = with_seeds(samples, of_seeds, f"{way.base} {way.strategy} {budget}")
        score = interval(means[self.metric], samples)
        return Point(way, budget, quick, texts, len(outcomes), means, score, samples, tuple(outcomes))


def difference(a: Point, b: Point) -> Interval:
    """Return by how much `a` is better than `b` in the figure of the comparison, with the 95 % interval."""
    return interval(a.score.value - b.score.value, a.samples - b.samples)
