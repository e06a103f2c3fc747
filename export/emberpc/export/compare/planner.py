"""Choose the cell of a comparison to fit next, and report the cells that the time limit leaves no time for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from statistics import median

from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.compare.estimates import Estimate, Estimates, measured_figures
from emberpc.export.compare.outcomes import ALL, Cell, Outcome, Way

#: A cell is started only if the time left is at least this multiple of its estimate: estimates can be this far off.
_SAFETY = 1.25
#: Time of a pass of a text through the encoder in PyTorch during a training, as a multiple of the time of embedding the
#: text with ONNX Runtime. It serves the first estimate only; each measured training corrects it.
_PASS_FACTOR = 1.0
#: The first trial of a strategy that trains the encoder may take the time left divided by this number.
_FIRST_TRIAL = 1.5
#: Minimum estimate of a cell, in wall seconds. With few texts a fit takes a time that hardly depends on their number.
_MIN_SECONDS = 0.05


@dataclass(frozen=True)
class Skipped:
    """A cell that was not fitted, and the reason."""

    cell: Cell
    reason: str
    #: Whether the cell can be fitted with more time.
    for_time: bool = False


@dataclass(frozen=True)
class Work:
    """Work of a cell that a first estimate of its time is made from.

    `texts` is the number of training texts. `passes` is the number of passes of a text through the encoder in PyTorch,
    for the training and for the measurement; 0 if the encoder is not trained.
    """

    texts: int
    passes: float


class Planner:
    """Orders the cells of a comparison as an expert would, and estimates their times.

    Frozen strategies come first: they take seconds. Then each strategy that trains the encoder is tried with its quick
    profile, at the largest budget that leaves time for the other strategies. Those that can be the best, by what was
    measured and by their learning curves, are measured with their full profile at the largest budget, the most
    promising first. More seeds and smaller budgets follow.

    Args:
        work: the work of each cell, also of those that are measured already.
        per_label: mean number of texts of a label, by budget.
        seconds_per_text: wall seconds that embedding one text takes, by base; the first estimates use it.
        metric: name of the figure by which strategies are compared, such as `accuracy`.
        once: returns the extra seconds that a cell takes for work that several cells share and that is not done yet,
            such as loading the encoder.
    """

    def __init__(
        self,
        work: Mapping[Cell, Work],
        per_label: Mapping[int, float],
        seconds_per_text: Mapping[str, float],
        metric: str = "accuracy",
        once: Callable[[Cell], float] = lambda _cell: 0.0,
    ) -> None:
        self._work = work
        self._per_label = per_label
        self._seconds_per_text = seconds_per_text
        self._metric = metric
        self._once = once
        #: The budget with the most texts.
        self.largest = max(per_label, key=lambda budget: per_label[budget])

    def estimate(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        """Estimate the wall seconds that a cell will take, shared work that is not done yet included.

        For a strategy that trains the encoder, the estimate is the number of passes times the seconds of a pass. The
        seconds of a pass are those of the measured cell of the same base and strategy that is nearest in profile and
        number of texts; else the median of the other trainings on the base; else a multiple of the time of embedding a
        text. For a frozen strategy, the time of the nearest measured cell is scaled by the number of texts.

        Args:
            cell: the cell.
            done: outcomes so far, by cell.
        """
        return self._own_seconds(cell, done) + self._once(cell)

    def _own_seconds(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        work = self._work[cell]

        def distance(known: Cell) -> tuple[bool, float, int]:
            texts = max(1, self._work[known].texts) / max(1, work.texts)
            return (known.quick != cell.quick, abs(log2(texts)), known.seed)

        nearest = min((known for known in done if known.way == cell.way), key=distance, default=None)
        if not cell.way.tunes:
            if nearest is None:
                return _MIN_SECONDS
            ratio = max(1, work.texts) / max(1, self._work[nearest].texts)
            return max(_MIN_SECONDS, done[nearest].figures["wall_seconds"] * ratio)
        if nearest is not None:
            return work.passes * self._pass_seconds(nearest, done)
        others = [self._pass_seconds(known, done) for known in done if known.base == cell.base and known.way.tunes]
        return work.passes * (median(others) if others else _PASS_FACTOR * self._seconds_per_text[cell.base])

    def _pass_seconds(self, cell: Cell, done: Mapping[Cell, Outcome]) -> float:
        return done[cell].figures["wall_seconds"] / max(1.0, self._work[cell].passes)

    def choose(self, cells: Sequence[Cell], done: Mapping[Cell, Outcome], seconds_left: float | None) -> Cell | None:
        """Return the cell to fit next; None if for each cell, 1.25 times its estimate is more than the time left.

        Args:
            cells: cells that are not fitted yet.
            done: outcomes so far, by cell.
            seconds_left: wall seconds until the time limit; None: no limit. Without a limit no quick profile is chosen:
                the full profile follows anyway.
        """
        if seconds_left is None:
            todo = {cell: self.estimate(cell, done) for cell in cells if not cell.quick}
        else:
            estimates = {cell: self.estimate(cell, done) for cell in self.needed(cells, done)}
            todo = {cell: seconds for cell, seconds in estimates.items() if seconds * _SAFETY <= seconds_left}
            todo = self._without_needless_trials(todo, estimates, seconds_left)
        trials = self._trials(todo, done, seconds_left)
        outlook = _Outlook(self.figure_estimates(done), {cell.way for cell in (*cells, *done)}, self.largest)
        ranks = {cell: self._rank(cell, seconds, trials, outlook) for cell, seconds in todo.items()}
        # A quick profile serves to find out which full profile to measure, and for nothing else.
        useful = [cell for cell, rank in ranks.items() if not cell.quick or rank[0] <= _TRIAL]
        return min(useful, key=lambda cell: ranks[cell], default=None)

    def _without_needless_trials(
        self, todo: Mapping[Cell, float], estimates: Mapping[Cell, float], seconds_left: float
    ) -> dict[Cell, float]:
        """Return `todo` without quick trainings that would take the time of the only full one that is open.

        If one strategy only is open at the largest budget, there is nothing that a quick training could choose.
        """
        whole = {
            cell.way: seconds
            for cell, seconds in estimates.items()
            if cell.way.tunes and cell.budget == self.largest and cell.seed == 0 and not cell.quick
        }
        if len(whole) != 1:
            return dict(todo)
        ((way, seconds),) = whole.items()
        spare = seconds_left - seconds * _SAFETY
        if spare < 0:  # the full training does not fit anyway
            return dict(todo)
        return {cell: each for cell, each in todo.items() if not (cell.quick and cell.way == way and each > spare)}

    def needed(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome]) -> list[Cell]:
        """Return the cells without those of the quick profile that a measured cell of the strategy makes superfluous.

        These are the quick cells at a budget at or below the largest one at which the strategy was measured.
        """
        largest: dict[Way, float] = {}
        for cell in done:
            largest[cell.way] = max(largest.get(cell.way, 0.0), self._per_label.get(cell.budget, 0.0))
        return [cell for cell in cells if not cell.quick or self._per_label[cell.budget] > largest.get(cell.way, 0.0)]

    def figure_estimates(self, done: Mapping[Cell, Outcome]) -> Estimates:
        """Return the estimates of the compared figure from all outcomes so far."""
        return Estimates(measured_figures(done.values(), self._metric), self._per_label)

    def _trials(
        self, todo: Mapping[Cell, float], done: Mapping[Cell, Outcome], seconds_left: float | None
    ) -> set[Cell]:
        """Return the cell with which to try each strategy that trains the encoder and was not tried.

        The cell is the one at the largest budget that fits a share of the time left. For the first strategy, this is
        two thirds of the time: a training with all texts answers more than three trainings with few texts each. For the
        others, it is an equal share: a share for each strategy that was not tried, and one more for full profiles. If
        no cell fits, it is the one that takes the least time.

        Args:
            todo: the cells that fit the time left, with their estimates in seconds.
            done: outcomes so far, by cell.
            seconds_left: wall seconds until the time limit; None: no limit.
        """
        tried = {cell.way for cell in done}
        untried = {cell.way for cell in todo if cell.way.tunes} - tried
        shares = len(untried) + 1 if any(way.tunes for way in tried) else _FIRST_TRIAL
        share = float("inf") if seconds_left is None else seconds_left / shares
        found = set()
        for way in untried:
            own = [
                cell for cell in todo if cell.way == way and cell.seed == 0 and cell.quick == (seconds_left is not None)
            ]
            fitting = [cell for cell in own if todo[cell] * _SAFETY <= share]
            if fitting:
                found.add(max(fitting, key=lambda cell: self._per_label[cell.budget]))
            elif own:
                found.add(min(own, key=lambda cell: todo[cell]))
        return found

    def _rank(
        self, cell: Cell, seconds: float, trials: Collection[Cell], outlook: _Outlook
    ) -> tuple[int, float, float, Cell]:
        """Return the rank of a cell, lowest first: its step of the plan, its order in the step, and its time."""
        cost = seconds * (cell.seed + 1)
        if not cell.way.tunes and cell.seed == 0:
            return (_FROZEN, 0.0, cost, cell)
        if cell in trials:  # in the order of `STRATEGIES`, from the cheapest training to the most expensive
            return (_TRIAL, 0.0, float(list(STRATEGIES).index(cell.strategy)), cell)
        largest, promise = cell.budget == self.largest, outlook.promise(cell.way)
        if cell.seed == 0 and promise is not None:
            if largest and not cell.quick:
                return (_DECISION, -promise, cost, cell)
            if cell.quick:  # a larger trial than the one before; the largest that fits comes first
                return (_TRIAL, 1.0 + 1.0 / self._per_label[cell.budget], cost, cell)
        if largest and promise is not None:
            return (_SEEDS, cell.seed, cost, cell)
        return (_CURVES if promise is not None or not cell.way.tunes else _HOPELESS, 0.0, cost, cell)

    def hopeless(self, done: Mapping[Cell, Outcome]) -> set[Way]:
        """Return the strategies that train the encoder and are not expected to become the best at the largest budget.

        The upper end of the interval of such a strategy's estimate is below the best estimate of all strategies.
        """
        ways = {cell.way for cell in done}
        outlook = _Outlook(self.figure_estimates(done), ways, self.largest)
        return {way for way in ways if way.tunes and outlook.promise(way) is None}

    def min_seconds(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome]) -> float:
        """Return how many wall seconds must be left so that `choose` returns one of the cells and not None.

        Args:
            cells: cells that are not fitted yet; at least one.
            done: outcomes so far, by cell.
        """
        return _SAFETY * min(self.estimate(cell, done) for cell in cells)

    def skipped(self, cells: Iterable[Cell], done: Mapping[Cell, Outcome], seconds_left: float) -> list[Skipped]:
        """Return cells as skipped for lack of time, each with its estimate and the time left as the reason.

        Args:
            cells: the cells that were not fitted; those of the quick profile are left out.
            done: outcomes so far, by cell.
            seconds_left: wall seconds until the time limit when the comparison stopped.
        """
        hopeless = self.hopeless(done)

        def reason(cell: Cell) -> str:
            seconds = self.estimate(cell, done)
            needed = f"it would take about {_rounded(seconds)} s ({_rounded(_SAFETY * seconds)} s with a reserve)"
            left = f"and {_rounded(max(0.0, seconds_left))} s were left"
            loses = "; by what was measured it would not win" if cell.way in hopeless else ""
            return f"{needed}, {left}{loses}"

        return [Skipped(cell, reason(cell), for_time=True) for cell in cells if not cell.quick]


def _rounded(seconds: float) -> str:
    """Return seconds as text, below 10 s with one decimal."""
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


#: Steps of the plan, in their order: frozen strategies; one trial of each strategy that trains the encoder; the full
#: profiles that decide; more seeds of the contenders; learning curves; strategies that can hardly win.
_FROZEN, _TRIAL, _DECISION, _SEEDS, _CURVES, _HOPELESS = range(6)


class _Outlook:
    """What each strategy promises at the largest budget."""

    def __init__(self, estimates: Estimates, ways: Collection[Way], largest: int) -> None:
        found = {way: estimates.at(way, largest) for way in ways}
        self._estimates: dict[Way, Estimate] = {way: one for way, one in found.items() if one is not None}
        exportable = [found.value for way, found in self._estimates.items() if way.exportable]
        self._best = max(exportable or [found.value for found in self._estimates.values()], default=0.0)

    def promise(self, way: Way) -> float | None:
        """Return the estimate of a strategy in [0, 1]; 0 if it was not measured; None if it can hardly be the best."""
        found = self._estimates.get(way)
        if found is None:
            return 0.0
        return found.value if found.high >= self._best else None


def budgets_of(wanted: Sequence[int], draws_all: Callable[[int], bool]) -> list[int]:
    """Return the distinct budgets in ascending order, with `ALL` last.

    Args:
        wanted: the budgets that the user gave: numbers of texts of each label, or `ALL`.
        draws_all: whether all texts are drawn at a budget, which then becomes `ALL`.
    """
    found = sorted({ALL if draws_all(budget) else budget for budget in wanted})
    return [*(budget for budget in found if budget != ALL), *([ALL] if ALL in found else [])]
