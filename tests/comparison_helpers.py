"""Outcomes of a comparison with chosen figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from emberpc.export.compare.comparison_settings import ComparisonResult
from emberpc.export.compare.outcomes import Cell, Decisions, Outcome, Way
from emberpc.export.compare.serving_cost import ServingCost
from emberpc.export.compare.summary import Summary
from emberpc.export.data.examples import Examples

TEXTS = 400


def examples(counts: Iterable[int], multi_label: bool = False) -> Examples:
    """Return texts that have one label each; `counts` are the numbers of texts of the labels."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    names = tuple(f"label {i}" for i in range(max(labels) + 1))
    targets = np.eye(len(names), dtype=bool)[labels]
    return Examples(tuple(f"text {i}" for i in range(len(labels))), targets, names, multi_label)


def outcome(
    strategy: str,
    budget: int,
    accuracy: float,
    *,
    seed: int = 0,
    quick: bool = False,
    first_wrong: int = 0,
    cpu_seconds: float = 1.0,
    wall_seconds: float = 1.0,
) -> Outcome:
    """Return an outcome on `TEXTS` test texts of two labels; texts from `first_wrong` on are decided wrongly."""
    wrong = range(first_wrong, first_wrong + round(TEXTS * (1 - accuracy)))
    truth = [row % 2 for row in range(TEXTS)]
    given_labels = [[1 - truth[row]] if row in wrong else [truth[row]] for row in range(TEXTS)]
    figures = {
        "accuracy": 1 - len(wrong) / TEXTS,
        "macro_f1": 1 - len(wrong) / TEXTS,
        "ece": 0.01,
        "ece_uncalibrated": 0.02,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
    }
    test = Decisions(list(range(TEXTS)), given_labels, [0.9] * TEXTS)
    return Outcome(
        Cell("base", strategy, budget, seed, quick),
        budget * 2,
        figures,
        test,
        Decisions([], [], []),
        [(0.9, 0.9, 9)],
    )


def summary(outcomes: Iterable[Outcome], seconds_to_know: dict[str, float] | None = None) -> Summary:
    """Return the summary of outcomes on texts of two labels that alternate."""
    data = examples([TEXTS // 2, TEXTS // 2])
    alternating = replace(data, targets=np.eye(2, dtype=bool)[[row % 2 for row in range(TEXTS)]])
    found = tuple(outcomes)
    budgets = {o.cell.budget: float(o.cell.budget) if o.cell.budget > 0 else 100.0 for o in found if o.cell.budget}
    serving = tuple(
        ServingCost("base", strategy, 10, 1.0, 3.0, 90_000_000, None) for strategy in ("linear", "top-layers")
    )
    unknown = {Way("base", strategy): seconds for strategy, seconds in (seconds_to_know or {}).items()}
    return Summary(
        ComparisonResult(
            "data", data, alternating, found, serving, (), budgets, {"base": "source"}, seconds_to_know=unknown
        )
    )
