"""Choose the cell of a comparison to fit next, and report the cells that the time limit leaves no time for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy as np

from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.compare.outcomes import ALL, Cell, Outcome

#: A cell is started only if the time left is at least this multiple of its estimate: estimates can be this far off.
_SAFETY = 1.25
#: Estimate for a strategy that trains the encoder and has not been measured: training on a text takes this multiple of
#: the time of embedding the text. The factor is high on purpose, so that the first cell of a strategy is a small one.
_UNMEASURED_FACTOR = 40.0
#: Least estimate of a cell, in wall seconds. With few texts a fit takes a time that hardly depends on their number.
_LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Skipped:
    """A cell that was not fitted, and the reason."""

    cell: Cell
    reason: str
    #: Whether the cell can be fitted with more time.
    for_time: bool = False


class Planner:
    """Orders the cells of a comparison: cheap cells first, and last those whose strategy can hardly win any more.

    Args:
        texts: number of texts that each cell learns from.
        per_label: mean number of texts of a label, by budget.
        seconds_per_text: seconds that embedding one text takes, by base; the first estimates use it.
        once: returns the extra seconds that a cell takes for work that several cells share and that is not done yet,
            such as measuring the serving cost.
    """

    def __init__(
        self,
        texts: Mapping[Cell, int],
        per_label: Mapping[int, float],
        seconds_per_text: Mapping[str, float],
        once: Callable[[Cell], float] = lambda _cell: 0.0,
    ) -> None:
        self._texts = texts
        self._per_label = per_label
        self._seconds_per_text = seconds_per_text
        self._once = once

    def estimate(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        """Estimate the wall seconds that a cell will take, shared work that is not done yet included.

        The estimate scales the time of the measured cell of the same base and strategy whose number of texts is
        nearest. It assumes that time is proportional to the number of texts. Training makes fewer passes over more
        texts, so an estimate from a smaller budget is too long rather than too short. Without a measured
        cell, the estimate is 40 times the time of embedding the texts, or 0.05 s if the encoder is not trained.

        Args:
            cell: the cell.
            done: outcomes so far, by cell.
        """
        return self._own_seconds(cell, done) + self._once(cell)

    def _own_seconds(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        similar = [known for known in done if (known.strategy, known.base) == (cell.strategy, cell.base)]
        if similar:
            nearest = min(similar, key=lambda known: (abs(log2(self._texts[known] / self._texts[cell])), known.seed))
            ratio = self._texts[cell] / self._texts[nearest]
            return max(_LEAST_SECONDS, done[nearest].figures["wall_seconds"] * ratio)
        if not STRATEGIES[cell.strategy].tunes:
            return _LEAST_SECONDS
        return _UNMEASURED_FACTOR * self._seconds_per_text[cell.base] * self._texts[cell]

    def hopeless(self, done: Mapping[Cell, Outcome]) -> set[tuple[str, str]]:
        """Return the (base, strategy) pairs that train the encoder and are not expected to become the best.

        For each pair, the gap is its accuracy minus the best accuracy of all other pairs, at each of the pair's two
        largest measured budgets. The line through these two gaps, over the logarithm of the texts of a label, gives the
        gap at the largest budget of the comparison; if the gap widens, the later of the two is used instead. The pair
        is hopeless if the gap there is below 0 by more than two standard errors of an accuracy. A pair that was
        measured at fewer than two budgets is never hopeless.

        Args:
            done: outcomes so far, by cell.
        """
        means = mean_accuracies(done.values())
        errors = {known.budget: _standard_error(outcome) for known, outcome in done.items()}
        largest = max(self._per_label, key=lambda budget: self._per_label[budget])
        found = set()
        for base, strategy in {(cell.base, cell.strategy) for cell in done if STRATEGIES[cell.strategy].tunes}:
            budgets = sorted(
                {budget for b, s, budget in means if (b, s) == (base, strategy)}, key=lambda n: self._per_label[n]
            )[-2:]
            if len(budgets) < 2:
                continue
            gaps = []
            for budget in budgets:
                others = [mean for (b, s, n), mean in means.items() if n == budget and (b, s) != (base, strategy)]
                gaps.append(means[base, strategy, budget] - max(others, default=-np.inf))
            first, last, end = (log2(self._per_label[budget]) for budget in (*budgets, largest))
            slope = (gaps[1] - gaps[0]) / (last - first)
            # Only a gap that closes is extended to the largest budget, in favour of the pair.
            if gaps[1] + max(slope, 0) * (end - last) < -2 * errors[budgets[1]]:
                found.add((base, strategy))
        return found

    def choose(self, cells: Sequence[Cell], done: Mapping[Cell, Outcome], seconds_left: float | None) -> Cell | None:
        """Return the cell to fit next, or None if the time left, less a reserve of a fifth, suffices for none of them.

        Cells of hopeless strategies come last, and strategies that train the encoder come after the others. Within
        these groups, the cell with the least product of its estimate and (seed + 1) comes first: a second seed of a
        cheap strategy is fitted before the first seed of a strategy that takes more than twice as long.

        Args:
            cells: cells that are not fitted yet.
            done: outcomes so far, by cell.
            seconds_left: wall seconds until the time limit; None: no limit.
        """
        hopeless = self.hopeless(done)

        def rank(cell: Cell) -> tuple[bool, bool, float, Cell]:
            given_up = (cell.base, cell.strategy) in hopeless
            return (given_up, STRATEGIES[cell.strategy].tunes, self.estimate(cell, done) * (cell.seed + 1), cell)

        in_time = [
            cell for cell in cells if seconds_left is None or self.estimate(cell, done) * _SAFETY <= seconds_left
        ]
        return min(in_time, key=rank, default=None)

    def least_seconds(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome]) -> float:
        """Return how many wall seconds must be left so that `choose` returns one of the cells and not None.

        Args:
            cells: cells that are not fitted yet; at least one.
            done: outcomes so far, by cell.
        """
        return _SAFETY * min(self.estimate(cell, done) for cell in cells)

    def skipped(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome], seconds_left: float) -> list[Skipped]:
        """Return cells as skipped for lack of time, each with its estimate and the time left as the reason.

        Args:
            cells: the cells that were not fitted.
            done: outcomes so far, by cell.
            seconds_left: wall seconds until the time limit when the comparison stopped.
        """
        hopeless = self.hopeless(done)

        def reason(cell: Cell) -> str:
            seconds = self.estimate(cell, done)
            needed = f"it would take about {seconds:.0f} s ({_SAFETY * seconds:.0f} s with a reserve)"
            left = f"and {max(0.0, seconds_left):.0f} s were left"
            loses = "; by its smaller budgets it would not win" if (cell.base, cell.strategy) in hopeless else ""
            return f"{needed}, {left}{loses}"

        return [Skipped(cell, reason(cell), for_time=True) for cell in cells]


def mean_accuracies(outcomes: Iterable[Outcome]) -> dict[tuple[str, str, int], float]:
    """Return the mean accuracy over the seeds, in [0, 1], by (base, strategy, budget)."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        found.setdefault((cell.base, cell.strategy, cell.budget), []).append(outcome.figures["accuracy"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _standard_error(outcome: Outcome) -> float:
    """Return the standard error of the accuracy of one outcome: that of a binomial with its number of test texts.

    The variance of the decision on one text counts as at least 0.0001.
    """
    accuracy = outcome.figures["accuracy"]
    return float((max(accuracy * (1 - accuracy), 1e-4) / max(1, len(outcome.test.labels))) ** 0.5)


def budgets_of(wanted: Sequence[int], largest_label: int) -> list[int]:
    """Return the distinct budgets in ascending order, with `ALL` last.

    Args:
        wanted: the budgets that the user gave: numbers of texts of each label, or `ALL`.
        largest_label: number of texts of the most frequent label. A budget of at least this many becomes `ALL`.
    """
    found = sorted({ALL if budget >= largest_label else budget for budget in wanted})
    return [*(budget for budget in found if budget != ALL), *([ALL] if ALL in found else [])]
