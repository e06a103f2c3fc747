"""Recommend a strategy: the cheapest one whose estimated accuracy is close to the best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf

from emberpc.export.compare.estimates import Estimate
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Way, budget_name
from emberpc.export.compare.planner import Skipped
from emberpc.export.compare.summary import Point, Summary, difference

#: Costs by which strategies can be compared: CPU-seconds of the training, or milliseconds to classify a text beside its
#: vector.
COSTS = ("training", "serving")
#: Costs that differ by less than this factor, or by less than `_SMALL_COSTS`, are about the same: the more accurate
#: strategy is taken.
_SIMILAR_COST = 2.0
#: Difference of costs, by `COSTS`, that is small in any case: CPU-seconds, and milliseconds.
_SMALL_COSTS = {"training": 5.0, "serving": 0.5}
#: A difference of accuracies that may be chance decides all the same, unless the better strategy costs this many times
#: as much as the other, and more by `_GREAT_COSTS`.
_GREAT_FACTOR = 10.0
#: A difference of fewer percentage points is not shown as one: it would be rounded to 0.0.
_EQUAL_POINTS = 0.05
#: With fewer test texts, one text changes an accuracy by more than a percentage point, the default tolerance.
_FEW_TEST_TEXTS = 100
_GREAT_COSTS = {"training": 600.0, "serving": 100.0}


@dataclass(frozen=True)
class CandidateStrategy:
    """A strategy that can be recommended, with its estimate at the largest budget.

    `point` is its point at the largest budget at which it was measured. `cpu_seconds` and `milliseconds` are the cost
    of the training with the largest budget and of classifying a text whose vector is computed anyway; `milliseconds` is
    None where it was not measured.
    """

    way: Way
    estimate: Estimate
    point: Point
    cpu_seconds: float
    milliseconds: float | None

    def cost(self, kind: str) -> float:
        """Return the cost of a kind of `COSTS`."""
        if kind == "training":
            return self.cpu_seconds
        if self.milliseconds is None:  # a tuned encoder runs for each text; a head on the vector costs almost nothing
            return inf if self.way.tunes else 0.0
        return self.milliseconds


@dataclass(frozen=True)
class Unknown:
    """A strategy that may be better than the recommended one and was not measured with the largest budget.

    `seconds` is an estimate of the minimum time limit, in seconds, with which another run measures it there; 0 if the
    run was not to measure it there, or if it failed. `estimate` is None if nothing was measured that allows one.
    """

    way: Way
    estimate: Estimate | None
    seconds: float


class Recommendation:
    """The strategy to take, and what is not known about it.

    Args:
        summary: the comparison.
        tolerance: how much worse than the best estimate, in [0, 1], a cheaper strategy may be.
        cost: kind of cost of `COSTS`.
    """

    def __init__(self, summary: Summary, tolerance: float = 0.01, cost: str = "training") -> None:
        self.summary = summary
        self.tolerance = tolerance
        self.cost = cost

    @cached_property
    def candidates(self) -> list[CandidateStrategy]:
        """The strategies that can be exported, or else all that can be served; the best estimate first."""
        ways = [way for way in self.summary.ways if way.served]
        ways = [way for way in ways if way.exportable] or ways or self.summary.ways
        found = [candidate for way in ways if (candidate := self._candidate(way)) is not None]
        return sorted(found, key=lambda candidate: -candidate.estimate.value)

    def _candidate(self, way: Way) -> CandidateStrategy | None:
        estimate, point = self.summary.estimate(way), self.summary.last(way)
        if estimate is None or point is None:
            return None
        growth = self.summary.growth(point, self.summary.largest)
        serving = self.summary.serving(way)
        milliseconds = serving.milliseconds_beside if serving else None
        return CandidateStrategy(way, estimate, point, point.means["cpu_seconds"] * growth, milliseconds)

    @cached_property
    def taken(self) -> CandidateStrategy:
        """The recommended candidate.

        Candidates count as equal to the best if their estimate is within the tolerance, or if the difference may be
        chance and the best costs much more. Of these, the cheapest is taken, or a more accurate one of similar cost.
        """
        best = self.candidates[0]
        equal = [candidate for candidate in self.candidates if self._equal(candidate, best)]
        cheapest = min(candidate.cost(self.cost) for candidate in equal)
        maximum = max(_SIMILAR_COST * cheapest, cheapest + _SMALL_COSTS[self.cost])
        return next(candidate for candidate in equal if candidate.cost(self.cost) <= maximum)

    def _equal(self, candidate: CandidateStrategy, best: CandidateStrategy) -> bool:
        if best.estimate.value - candidate.estimate.value <= self.tolerance:
            return True
        if not (best.estimate.measured and candidate.estimate.measured):
            return False
        costs = best.cost(self.cost), candidate.cost(self.cost)
        much = costs[0] >= _GREAT_FACTOR * costs[1] and costs[0] - costs[1] >= _GREAT_COSTS[self.cost]
        return much and difference(best.point, candidate.point).low <= 0

    @cached_property
    def unknown(self) -> list[Unknown]:
        """The strategies that may be better than the recommended one by more than the tolerance, but are not measured.

        The list includes the recommended strategy if its own figure is an estimate. The most promising comes first.
        """
        seconds = self.summary.result.seconds_to_know
        found = []
        for way in {*seconds, *(candidate.way for candidate in self.candidates)}:
            estimate = self.summary.estimate(way)
            if not way.exportable or (estimate is not None and estimate.measured):
                continue
            possible = estimate is None or estimate.high > self.taken.estimate.value + self.tolerance
            if possible or way == self.taken.way:
                found.append(Unknown(way, estimate, seconds.get(way, 0.0)))
        return sorted(found, key=lambda each: (-(each.estimate.value if each.estimate else 0.0), each.way))

    @cached_property
    def fewer(self) -> Point | None:
        """The point with the fewest texts that is as good as the recommended strategy at the largest budget, or None.

        It is measured, can be exported, and is worse by at most the tolerance; None if only the largest budget is.
        """
        taken = self.taken
        points = [
            point
            for point in self.summary.points
            if point.way.exportable
            and not point.quick
            and point.budget != NO_TEXTS
            and self.summary.per_label(point.budget) < self.summary.per_label(taken.point.budget)
            and point.score.value >= taken.estimate.value - self.tolerance
        ]
        return min(points, key=lambda point: (self.summary.per_label(point.budget), -point.score.value), default=None)


def recommendation(found: Recommendation) -> list[str]:
    """Return the recommendation as sentences: what is not known, the strategy to take, its rivals, and fewer texts."""
    sentences = [_unknown(each, found) for each in found.unknown]
    sentences.append(_take(found))
    if found.taken.estimate.low <= found.summary.majority:
        sentences.append(
            f"This may be no better than the most frequent label for every text ({found.summary.majority:.3f})."
        )
    if (rival := _rival(found)) is not None:
        sentences.append(_versus(rival, found))
    if not found.taken.way.tunes and found.summary.serving(found.taken.way) is not None:
        sentences.append(
            f"If the same encoder embeds the texts anyway, {found.taken.way.strategy} costs almost nothing to serve."
        )
    if (fewer := found.fewer) is not None:
        sentences.append(
            f"Fewer texts do as well: {found.summary.name(fewer.way)} reaches {_score(fewer, found)} "
            f"({fewer.score.low:.3f} to {fewer.score.high:.3f}) {found.summary.where(fewer.budget)} "
            f"({fewer.texts:,} texts in all)."
        )
    return sentences


def _take(found: Recommendation) -> str:
    summary, taken = found.summary, found.taken
    where = summary.where(NO_TEXTS if taken.point.budget == NO_TEXTS else summary.largest)
    value = _range(taken.estimate)
    if not taken.way.served:
        return (
            f"No strategy that can be served was measured. The baseline {summary.name(taken.way)} reaches "
            f"{_metric(found)} {value} {where}."
        )
    kind = "" if taken.estimate.measured else "an estimated "
    return f"Take {summary.name(taken.way)}: {kind}{_metric(found)} {value} {where}."


def _unknown(each: Unknown, found: Recommendation) -> str:
    """Return the sentence about a strategy that was not measured with the largest budget."""
    summary, name = found.summary, found.summary.name(each.way)
    where = summary.where(summary.largest)
    largest = "all" if summary.largest == ALL else summary.largest
    to_know = f"To know, run this again with --strategy {each.way.strategy} --budget {largest}."
    if any(skipped.cell.way == each.way and not skipped.for_time for skipped in summary.result.skipped):
        to_know = "It failed; the report has the reason."
    if each.seconds:
        to_know = f"To know, run this again with a time limit of {_duration(each.seconds)} or more."
    point = summary.last(each.way)
    if point is None or each.estimate is None:
        return f"It is not known how good {name} is: it was not measured. {to_know}"
    rival, lead = summary.best(point.budget, tunes=not each.way.tunes), ""
    if rival is not None and point.budget != summary.largest:
        gap = 100 * (point.score.value - rival.score.value)
        other = summary.name(rival.way, quick=rival.quick)
        lead = f", where it {'leads' if gap >= 0 else 'is behind'} {other} by {abs(gap):.1f} points"
    return (
        f"How good {name} is {where} is not known: it is estimated at {_range(each.estimate)}, from "
        f"{point.score.value:.3f} {summary.where(point.budget)}{' by a quick training' * point.quick}{lead}. "
        f"{to_know}"
    )


def _rival(found: Recommendation) -> CandidateStrategy | None:
    """Return the candidate with the best estimate beside the recommended one; None if there is no other.

    If there are candidates of the other kind, with or without training of the encoder, it is the best of these.
    """
    others = [candidate for candidate in found.candidates if candidate is not found.taken]
    of_other_kind = [candidate for candidate in others if candidate.way.tunes != found.taken.way.tunes]
    return next(iter(of_other_kind or others), None)


def _versus(rival: CandidateStrategy, found: Recommendation) -> str:
    """Return a sentence on the accuracy that a rival gains or loses, and on its training time."""
    taken = found.taken
    gain = 100 * (rival.estimate.value - taken.estimate.value)
    measured = rival.estimate.measured and taken.estimate.measured
    verb = f"{'adds' if gain >= 0 else 'loses'} {abs(gain):.1f} points"
    if measured:
        between = difference(rival.point, taken.point)
        sure = f"95 % interval {100 * between.low:+.1f} to {100 * between.high:+.1f}"
        change = f"{verb} ({sure}{', so this may be chance' if between.low <= 0 <= between.high else ''})"
        same = f"({sure} points of difference)"
    else:
        change, same = f"{verb} by the estimates", "by the estimates"
    if abs(gain) < _EQUAL_POINTS:
        change = f"reaches the same {metric_name(found.summary.metric)} {same}"
    costs = f"its training takes {_seconds(rival.cpu_seconds)} against {_seconds(taken.cpu_seconds)} of CPU"
    if found.cost == "serving":
        costs = "the time of serving was measured for neither"
        if rival.milliseconds is not None or taken.milliseconds is not None:
            costs = f"beside its vector, a text takes {_milliseconds(rival)} against {_milliseconds(taken)}"
    name = _capital(found.summary.name(rival.way))
    return f"{name} {change}; {costs}."


def crossover(summary: Summary) -> str:
    """Return a sentence that names the budgets at which fine-tuning is significantly better than frozen vectors.

    The sentence says so if fine-tuning is better at no budget, or if the two were not both measured at any. It adds
    that the test texts chose both strategies: the best of several strategies is partly the luckiest one, and the kind
    with more strategies profits more from this.
    """
    if not any(point.way.tunes for point in summary.points):
        return "No fine-tuning was measured."
    if not summary.ahead:
        return "No budget was measured with both fine-tuning and frozen vectors, so they cannot be compared."
    leads = [budget for budget, ahead in summary.ahead.items() if ahead]
    compared = list(summary.ahead)
    better = "Fine-tuning was significantly better than frozen vectors"
    if leads == compared:
        found = f"{better} at every compared budget ({', '.join(map(budget_name, compared))})."
    elif not leads:
        budgets = ", ".join(map(budget_name, compared))
        found = f"Fine-tuning was not significantly better than frozen vectors at any compared budget ({budgets})."
    elif leads == compared[-len(leads) :]:
        found = (
            f"{better} from {budget_name(leads[0])} on; with fewer, it may be worse, or the difference may be chance."
        )
    else:
        found = f"{better} only at {', '.join(map(budget_name, leads))}."
    return f"{found} The test texts chose the best strategy of each kind for this."


def baselines(summary: Summary) -> str:
    """Return a sentence with the figures of the baselines: the most frequent label, TF-IDF and zero-shot."""
    parts = [f"the most frequent label {summary.majority:.3f}"]
    for strategy, name in (("tf-idf", "TF-IDF with logistic regression"), ("zero-shot", "zero-shot")):
        points = [point for way in summary.ways if way.strategy == strategy and (point := summary.last(way))]
        if points:
            parts.append(f"{name} {max(point.score.value for point in points):.3f}")
    return f"Baselines, by test {metric_name(summary.metric)}: {', '.join(parts)}."


def caveats(summary: Summary) -> list[str]:
    """Return warnings about the figures, one sentence each.

    The warnings are about few test texts, test texts that are training texts, texts with several labels, strategies
    fitted with one seed only, and strategies without held-out texts for a calibration. The list is empty if there is
    nothing to warn of.
    """
    test = summary.result.test
    training_texts = set(summary.result.train.texts)
    shared = [text for text in test.texts if text in training_texts]
    once = [point for point in summary.points if point.seeds == 1 and point.budget != NO_TEXTS]
    raw = [point for point in summary.points if point.means.get("held_out_texts") == 0]
    found = []
    if len(test.texts) < _FEW_TEST_TEXTS:
        found.append(
            f"There are {len(test.texts)} test texts only: one of them changes an accuracy by "
            f"{100 / len(test.texts):.1f} points, so most differences may be chance."
        )
    if shared:
        count = "1 test text is a training text" if len(shared) == 1 else f"{len(shared)} test texts are training texts"
        found.append(
            f"{count}, too, for example “{shared[0]:.60}”: the accuracy is too high by up to this share of the texts."
        )
    if test.multi_label:
        found.append("A text counts for the accuracy only if it is given exactly its labels.")
    if once:
        found.append(
            "Fitted with one seed only, so the spread over the random choice of training texts is that of other "
            f"strategies, if any: {_listed(once, summary)}."
        )
    if raw:
        found.append(
            "No text was held out, so no temperature was fitted and the probabilities are not "
            f"calibrated: {_listed(raw, summary)}."
        )
    return found


def _listed(points: list[Point], summary: Summary) -> str:
    """Return the budgets of points as text, grouped by strategy and base."""
    budgets: dict[Way, list[int]] = {}
    for point in points:
        budgets.setdefault(point.way, []).append(point.budget)
    ways: dict[str, list[str]] = {}
    for way, given in budgets.items():
        ways.setdefault(_budgets(given), []).append(summary.title(way))
    return "; ".join(f"{', '.join(names)} {where}" for where, names in ways.items())


def _budgets(budgets: list[int]) -> str:
    """Return budgets as text, such as `at 1, 4 a label and all texts`."""
    numbers = [str(budget) for budget in budgets if budget not in (ALL, NO_TEXTS)]
    others = [budget_name(budget) for budget in budgets if budget in (ALL, NO_TEXTS)]
    return f"at {' and '.join([*([', '.join(numbers) + ' a label'] if numbers else []), *others])}"


def skipped_lines(summary: Summary) -> list[str]:
    """Return one line for each strategy, base and budget with skipped cells: how many seeds, and why the first."""
    groups: dict[tuple[Way, int], list[Skipped]] = {}
    for skipped in summary.result.skipped:
        groups.setdefault((skipped.cell.way, skipped.cell.budget), []).append(skipped)
    return [
        f"{summary.title(way)}, {budget_name(budget)}, "
        f"{len(group)} seed{'s' if len(group) > 1 else ''}: {group[0].reason}"
        for (way, budget), group in sorted(
            groups.items(), key=lambda item: (item[0][0].strategy, summary.per_label(item[0][1]))
        )
    ]


def metric_name(metric: str) -> str:
    """Return the name of a figure in words: `accuracy`, `macro F1` or `micro F1`."""
    return metric.replace("_f1", " F1")


def _metric(found: Recommendation) -> str:
    return f"test {metric_name(found.summary.metric)}"


def _range(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _score(point: Point, found: Recommendation) -> str:
    return f"{_metric(found)} {point.score.value:.3f}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _milliseconds(candidate: CandidateStrategy) -> str:
    return "a time that was not measured" if candidate.milliseconds is None else f"{candidate.milliseconds:.1f} ms"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def _duration(seconds: float) -> str:
    return f"{ceil(seconds)} s" if seconds < 90 else f"{ceil(seconds / 60)} min"
