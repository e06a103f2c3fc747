"""Which cell to fit next, and which there is no time for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy as np

from emberpc.export.comparing.cells import ALL, Cell, Outcome
from emberpc.export.strategies import STRATEGIES

#: A cell is begun if this many times its estimate is left: estimates are off by as much.
_SAFETY = 1.25
#: Until a strategy has been measured, a text is taken to cost so many times what embedding it does, for each layer
#: that might be tuned; dear, so that a first cell is a small one.
_FIRST_GUESS = 40.0
#: Fits are the same but for the number of texts; below this they hardly get cheaper (seconds).
_LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class Skipped:
    """A cell that was not fitted, and why."""

    cell: Cell
    reason: str
    #: Whether more time is all that it needs.
    for_time: bool = False


class Planner:
    """Orders cells so that the cheap come first, and the dear where they can still win.

    Args:
        texts: how many texts each cell learns from.
        per_label: texts of a label with each budget, the mean.
        seconds_per_text: what embedding a text takes, by base: the first guess.
        once: the seconds that a cell takes beside its own for what is done once for all like it and is not done yet,
            such as measuring what serving costs.
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
        """Return the seconds that a cell will take, by what was measured of its strategy with the most like budget.

        That is with what is done once. Time grows with the number of texts. Passes over them get fewer with
        more texts, so from a smaller budget this errs on the long side.
        """
        return self._own(cell, done) + self._once(cell)

    def _own(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        like = [known for known in done if (known.strategy, known.base) == (cell.strategy, cell.base)]
        if like:
            nearest = min(like, key=lambda known: (abs(log2(self._texts[known] / self._texts[cell])), known.seed))
            ratio = self._texts[cell] / self._texts[nearest]
            return max(_LEAST_SECONDS, done[nearest].figures["wall_seconds"] * ratio)
        if not STRATEGIES[cell.strategy].tunes:
            return _LEAST_SECONDS
        return _FIRST_GUESS * self._seconds_per_text[cell.base] * self._texts[cell]

    def hopeless(self, done: Mapping[Cell, Outcome]) -> set[tuple[str, str]]:
        """Return the (base, strategy) pairs that tune, and cannot become the best by what is known.

        Of such a pair, the accuracy at its two largest budgets with another
        strategy's, the best there, makes a line over the logarithm of the
        texts. If that line is behind at the largest budget by more than twice
        the standard error of an accuracy, the pair is hopeless.
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
            # A gap that widens tells enough; one that closes is followed to the end.
            if gaps[1] + max(slope, 0) * (end - last) < -2 * errors[budgets[1]]:
                found.add((base, strategy))
        return found

    def choose(self, cells: Sequence[Cell], done: Mapping[Cell, Outcome], seconds_left: float | None) -> Cell | None:
        """Return the cell to fit next; None if there is time for none of them.

        Those of hopeless strategies come last. Else a cell's rank is its
        estimate times the number of its seed, from 1: a second seed of a cheap
        strategy goes before a first one of a strategy twice as dear.
        """
        hopeless = self.hopeless(done)

        def rank(cell: Cell) -> tuple[bool, bool, float, Cell]:
            given_up = (cell.base, cell.strategy) in hopeless
            return (given_up, STRATEGIES[cell.strategy].tunes, self.estimate(cell, done) * (cell.seed + 1), cell)

        in_time = [
            cell for cell in cells if seconds_left is None or self.estimate(cell, done) * _SAFETY <= seconds_left
        ]
        return min(in_time, key=rank, default=None)

    def skipped(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome], seconds_left: float) -> list[Skipped]:
        """Say why each of the cells that are left was not fitted."""
        hopeless = self.hopeless(done)
        return [
            Skipped(
                cell,
                f"it would take about {self.estimate(cell, done):.0f} s, and {max(0.0, seconds_left):.0f} s were left"
                + ("; by its smaller budgets it would not win" if (cell.base, cell.strategy) in hopeless else ""),
                for_time=True,
            )
            for cell in cells
        ]


def mean_accuracies(outcomes: Iterable[Outcome]) -> dict[tuple[str, str, int], float]:
    """Return the mean accuracy over the seeds, by base, strategy and budget."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        found.setdefault((cell.base, cell.strategy, cell.budget), []).append(outcome.figures["accuracy"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _standard_error(outcome: Outcome) -> float:
    """Return that of an accuracy on so many test texts."""
    accuracy = outcome.figures["accuracy"]
    return float((max(accuracy * (1 - accuracy), 1e-4) / max(1, len(outcome.test.labels))) ** 0.5)


def budgets_of(wanted: Sequence[int], largest_label: int) -> list[int]:
    """Return budgets in order, each once, without those that are all texts anyway.

    Args:
        wanted: texts of each label, or `ALL`.
        largest_label: texts of the most frequent label.
    """
    found = sorted({ALL if budget >= largest_label else budget for budget in wanted})
    return [*(budget for budget in found if budget != ALL), *([ALL] if ALL in found else [])]
