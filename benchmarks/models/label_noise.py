"""Put wrong labels into data sets, and measure how many of the labels that `emberpc compare` lists as wrong are wrong.

A share of the labels of the training and test texts is replaced by other labels at random. The list comes from
`emberpc.export.compare.data_problems`, with the strategies tf-idf and linear and, with `--tuned`, the quick training of
top-layers. Labels that were wrong before count as right, so the precision is rather too low, most of all for a share
of 0.

    python -m benchmarks.models.label_noise FOLDER... --base all-MiniLM-L6-v2 --tuned

FOLDER has `train.csv` and `test.csv` with the columns text and label.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from emberpc.export.classifier import ClassifierData, read_data
from emberpc.export.classify.strategies import STRATEGIES, Options
from emberpc.export.compare.base_encoders import Base, open_base
from emberpc.export.compare.comparison_settings import ComparisonResult
from emberpc.export.compare.data_problems import suspects
from emberpc.export.compare.measured_outcome import outcome_of
from emberpc.export.compare.outcomes import ALL, Cell
from emberpc.export.compare.summary import Summary
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.examples import Examples, held_out_examples
from emberpc.export.progress import no_progress

#: Shares of labels that are replaced.
SHARES = (0.0, 0.02, 0.05, 0.1)


def main() -> None:
    """Print a row for each data set and share: labels replaced, listed and right to be listed, and the stated mean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--base", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument(
        "--texts", type=int, default=2500, help="maximum number of training texts; the test gets at most 1,000"
    )
    parser.add_argument("--tuned", action="store_true", help="also train the upper layers quickly")
    options = parser.parse_args()
    print("| data | share of wrong labels | replaced | listed | of these replaced | precision | stated |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(options.base, Path(folder) / "base", None, no_progress)
        for data in options.folders:
            train, _, _ = read_data(ClassifierData(data / "train.csv"))
            test = held_out_examples(read_labelled(data / "test.csv"), train)
            for share in SHARES:
                row = measure(base, sampled(train, options.texts), sampled(test, 1000), share, tuned=options.tuned)
                print(f"| {data.name} | {share:.0%} | {' | '.join(row)} |", flush=True)


def measure(base: Base, train: Examples, test: Examples, share: float, *, tuned: bool) -> Sequence[str]:
    """Return the numbers of replaced, listed and rightly listed labels, the precision and the stated probability."""
    train, wrong_train = with_wrong_labels(train, share, 1)
    test, wrong_test = with_wrong_labels(test, share, 2)
    strategies = [("tf-idf", False), ("linear", False), *([("top-layers", True)] if tuned else [])]
    outcomes = []
    for strategy, quick in strategies:
        fitted = STRATEGIES[strategy].fit(train, base.cached_encoder, Options(quick=quick))
        cell = Cell("base", strategy, ALL, 0, quick)
        found = outcome_of(cell, len(train.texts), fitted, test, ())
        outcomes.append(replace(found, figures={**found.figures, "cpu_seconds": 0.0, "wall_seconds": 0.0}))
    result = ComparisonResult(
        "data", train, test, tuple(outcomes), (), (), {ALL: train.per_label}, {"base": base.encoder.name}
    )
    listed = suspects(Summary(result))
    right = sum(each.row in (wrong_test if each.part == "test" else wrong_train) for each in listed)
    stated = np.mean([each.probability for each in listed]) if listed else np.nan
    precision = right / len(listed) if listed else np.nan
    replaced = len(wrong_train) + len(wrong_test)
    return (str(replaced), str(len(listed)), str(right), f"{precision:.2f}", f"{stated:.2f}")


def sampled(examples: Examples, maximum: int) -> Examples:
    """Return at most `maximum` of the examples, drawn at random."""
    return examples.take(np.sort(np.random.default_rng(1).permutation(len(examples.texts))[:maximum]))


def with_wrong_labels(examples: Examples, share: float, seed: int) -> tuple[Examples, set[int]]:
    """Return the examples with another label for a share of the texts, and the rows of these texts."""
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(examples.texts))[: int(share * len(examples.texts))]
    targets = examples.targets.copy()
    for row in rows:
        others = np.flatnonzero(~targets[row])
        targets[row] = False
        targets[row, generator.choice(others)] = True
    return replace(examples, targets=targets), {int(row) for row in rows}


if __name__ == "__main__":
    main()
