"""The parts of a comparison: samples, what is fitted next, what the figures say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.export.compare.comparison_run import ComparisonResult
from emberpc.export.compare.data_problems import confusions, suspects
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Cell, Decisions, Outcome, Store, take_budget
from emberpc.export.compare.planner import Planner, budgets_of
from emberpc.export.compare.serving_cost import ServingCost
from emberpc.export.compare.summary import Summary, caveats, crossover, recommendation, skipped_lines
from emberpc.export.data.examples import Examples
from emberpc.export.errors import ExportError

TEXTS = 400


def examples(counts: Iterable[int], multi_label: bool = False) -> Examples:
    """Return texts of which each has one label, so many of each."""
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
    cpu_seconds: float = 1.0,
    wall_seconds: float = 1.0,
    wrong_as: int = 1,
) -> Outcome:
    """Return an outcome on `TEXTS` test texts of two labels, the first ones of which are wrong."""
    wrong = round(TEXTS * (1 - accuracy))
    truth = [row % 2 for row in range(TEXTS)]
    given_labels = [[1 - truth[row]] if row < wrong else [truth[row]] for row in range(TEXTS)]
    figures = {
        "accuracy": 1 - wrong / TEXTS,
        "macro_f1": accuracy,
        "ece": 0.01,
        "ece_uncalibrated": 0.02,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
    }
    test = Decisions(list(range(TEXTS)), given_labels, [0.9] * TEXTS)
    return Outcome(
        Cell("base", strategy, budget, seed), budget * 2, figures, test, Decisions([], [], []), [(0.9, 0.9, 9)]
    )


def summary(outcomes: Iterable[Outcome], worth: float = 0.005) -> Summary:
    data = examples([TEXTS // 2, TEXTS // 2])
    alternating = replace(data, targets=np.eye(2, dtype=bool)[[row % 2 for row in range(TEXTS)]])
    found = tuple(outcomes)
    budgets = {o.cell.budget: float(o.cell.budget) for o in found if o.cell.budget > 0}
    serving = (ServingCost("base", "linear", 10, 1.0, 3.0, 90_000_000, 1.0),)
    return Summary(ComparisonResult("data", data, alternating, found, serving, (), budgets, {"base": "source"}), worth)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(0, 5))
def test_a_larger_budget_includes_the_texts_of_smaller_budgets(counts: list[int], seed: int) -> None:
    everything = examples(counts)
    before: set[str] = set()
    for budget in (1, 2, 5, 9):
        sample = take_budget(everything, budget, seed)
        assert sample.targets.sum(axis=0).tolist() == [min(budget, count) for count in counts]
        assert before <= set(sample.texts)
        before = set(sample.texts)
    assert take_budget(everything, ALL, seed) is everything
    assert not take_budget(everything, NO_TEXTS, seed).texts


def test_texts_with_several_labels_or_none_are_drawn_too() -> None:
    data = replace(examples([50, 50], multi_label=True))
    data.targets[:10] = True
    data.targets[90:] = False
    sample = take_budget(data, 4, 0)
    assert (sample.targets.sum(axis=0) >= 4).all()
    assert (~sample.targets.any(axis=1)).sum() == 4


def test_budgets_of_all_texts_are_merged() -> None:
    assert budgets_of([8, 1, 16, 32, ALL, 8], 16) == [1, 8, ALL]
    assert budgets_of([8, 1], 16) == [1, 8]


def test_outcomes_are_stored_and_damaged_ones_are_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path, "key")
    kept, damaged = outcome("linear", 4, 0.9), outcome("full", 4, 0.9)
    store.write(kept)
    store.write(damaged)
    (tmp_path / "cells" / damaged.cell.file_name).write_text('{"cell": {"base": 1}}')
    assert Store(tmp_path, "key").read([kept.cell, damaged.cell]) == {kept.cell: kept}


def test_a_folder_of_other_data_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, "key")
    with pytest.raises(ExportError, match="another comparison|other data"):
        Store(tmp_path, "other")


def planner(cells: Iterable[Cell]) -> Planner:
    budgets = {1: 1.0, 4: 4.0, 16: 16.0, ALL: 100.0}
    return Planner({cell: round(2 * budgets[cell.budget]) for cell in cells}, budgets, {"base": 0.01})


def test_cheap_cells_come_first_and_second_seeds_later() -> None:
    cells = [
        Cell("base", strategy, budget, seed)
        for strategy in ("full", "top-layers", "linear")
        for budget in (ALL, 4)
        for seed in (0, 1)
    ]
    plan, order = planner(cells), list[Cell]()
    done: dict[Cell, Outcome] = {}
    todo = list(cells)
    while todo:
        cell = plan.choose(todo, done, None)
        assert cell is not None
        order.append(cell)
        todo.remove(cell)
        seconds = {"linear": 0.1, "top-layers": 1.0, "full": 5.0}[cell.strategy] * (1 if cell.budget == 4 else 25)
        done[cell] = replace(outcome(cell.strategy, cell.budget, 0.9, wall_seconds=seconds), cell=cell)
    assert {cell.strategy for cell in order[:4]} == {"linear"}
    assert order.index(Cell("base", "top-layers", ALL, 0)) < order.index(Cell("base", "full", ALL, 0))
    assert order[-1] == Cell("base", "full", ALL, 1)


def test_a_cell_without_time_is_skipped_with_its_estimate() -> None:
    small, large = Cell("base", "top-layers", 4, 0), Cell("base", "top-layers", ALL, 0)
    plan = planner([small, large])
    done = {small: outcome("top-layers", 4, 0.9, wall_seconds=4.0)}
    assert plan.estimate(large, done) == pytest.approx(100)
    assert plan.choose([large], done, 99) is None
    assert plan.choose([large], done, 130) == large
    (skipped,) = plan.skipped([large], done, 99)
    assert "100 s" in skipped.reason
    assert "99 s were left" in skipped.reason


def test_a_strategy_with_a_growing_gap_comes_last() -> None:
    full = [Cell("base", "full", budget, 0) for budget in (1, 4, 16)]
    top = Cell("base", "top-layers", ALL, 0)
    plan = planner([*full, top, Cell("base", "linear", 16, 0)])
    done = {
        **{cell: outcome("full", cell.budget, a) for cell, a in zip(full[:2], (0.8, 0.7), strict=True)},
        **{o.cell: o for o in (outcome("linear", 1, 0.82), outcome("linear", 4, 0.88))},
    }
    assert plan.hopeless(done) == {("base", "full")}
    assert plan.choose([full[2], top], done, None) == top
    # One that catches up as texts get more is not given up.
    catching_up = {**done, full[1]: outcome("full", 4, 0.87), full[0]: outcome("full", 1, 0.6)}
    assert plan.hopeless(catching_up) == set()


def test_a_gain_that_may_be_chance_or_is_too_small_is_not_recommended() -> None:
    linear, tuned = outcome("linear", 16, 0.90, cpu_seconds=5), outcome("top-layers", 16, 0.93, cpu_seconds=120)
    found = summary([linear, tuned])
    assert found.winner.way.strategy == "top-layers"
    assert recommendation(found) == (
        "Take top-layers: 0.930 at 16 of each label; linear on frozen vectors loses 3.0 points "
        "for 0.042× the training time (5.0 s against 120 s of CPU)."
    )
    assert summary([linear, tuned], worth=0.05).winner.way.strategy == "linear"
    close = outcome("top-layers", 16, 0.9025, cpu_seconds=120)
    found = summary([linear, close], worth=0)
    assert found.winner.way.strategy == "linear"
    assert recommendation(found) == (
        "Take linear on frozen vectors: 0.900 at 16 of each label; top-layers adds 0.2 points, which may be chance, "
        "for 24× the training time (120 s against 5.0 s of CPU)."
    )


def test_a_negligible_difference_of_training_times_is_not_reported() -> None:
    named = outcome("zero-shot", NO_TEXTS, 0.89, cpu_seconds=0.01)
    found = summary([named, outcome("linear", 16, 0.895, cpu_seconds=0.1)])
    assert recommendation(found) == (
        "Take zero-shot (label names alone): 0.890 without any text; linear on frozen vectors adds 0.5 points, which "
        "may be chance, at about the same training time (0.1 s against 0.0 s of CPU)."
    )


def test_nearest_examples_win_only_where_nothing_else_can_be_exported() -> None:
    nearest = outcome("nearest", 16, 0.95)
    assert summary([nearest, outcome("linear", 16, 0.90)]).winner.way.strategy == "linear"
    assert summary([nearest]).winner.way.strategy == "nearest"


def test_the_crossover_is_the_budget_from_which_fine_tuning_stays_ahead() -> None:
    linear = [outcome("linear", budget, 0.8) for budget in (1, 4, 16)]
    tuned = [outcome("full", budget, a) for budget, a in ((1, 0.7), (4, 0.9), (16, 0.95))]
    found = summary([*linear, *tuned])
    assert found.crossover == 4
    assert "from 4 a label on" in crossover(found)
    assert summary([*linear, outcome("full", 4, 0.9), outcome("full", 16, 0.8)]).crossover is None
    assert crossover(summary(linear)) == "No fine-tuning was measured."


def test_warnings_about_the_figures_are_returned() -> None:
    found = summary([outcome("linear", 4, 0.9, seed=seed) for seed in range(2)])
    (shared,) = caveats(found)  # the texts of `summary` are the same for training and test
    assert shared == (
        f"{TEXTS} test texts are training texts, too, for example “text 0”: "
        "the accuracy is too high by up to their share."
    )
    apart = replace(found.result, train=replace(found.result.train, texts=()))
    assert caveats(Summary(apart)) == []
    bare = outcome("full", 1, 0.8)
    bare.figures["held_out_texts"] = 0.0
    once, raw = caveats(Summary(replace(apart, outcomes=(*apart.outcomes, bare, outcome("full", 4, 0.9)),
        per_label={1: 1.0, 4: 4.0})))  # fmt: skip
    assert once.endswith("the random choice of training texts: full at 1 a label, 4 a label.")
    assert raw.endswith("probabilities are not calibrated: full at 1 a label.")


def test_confidence_bands_are_over_seeds() -> None:
    outcomes = [outcome("linear", 4, a, seed=seed) for seed, a in enumerate((0.80, 0.82, 0.84))]
    (point,) = summary(outcomes).points
    assert point.accuracy == pytest.approx(0.82)
    assert point.band == pytest.approx(4.303 * 0.02 / 3**0.5, rel=1e-3)  # Student's t of 2 degrees of freedom
    assert summary(outcomes[:1]).points[0].band is None


def test_confusions_name_the_texts_that_cause_them() -> None:
    found = summary([outcome("linear", 4, 0.99)])
    first, second = confusions(found, found.winner)
    assert {(first.label, first.given), (second.label, second.given)} == {
        ("label 0", "label 1"),
        ("label 1", "label 0"),
    }
    assert first.count == 2
    assert first.share == pytest.approx(2 / (TEXTS / 2))
    assert set(first.texts) | set(second.texts) == {f"text {row}" for row in range(4)}


def test_a_label_is_suspect_if_strategies_agree_on_another() -> None:
    three = [outcome(strategy, 4, a) for strategy, a in (("linear", 0.99), ("centroids", 0.99), ("full", 1.0))]
    found = suspects(summary(three))
    assert [suspect.row for suspect in found] == [0, 1, 2, 3]
    assert (found[0].label, found[0].suggested, found[0].votes, found[0].voters) == ("label 0", "label 1", 2, 3)
    assert suspects(summary(three[:1])) == []  # one alone proves nothing


def test_skipped_cells_give_a_line_for_each_strategy_and_budget() -> None:
    done = summary([outcome("linear", 4, 0.9)])
    cells = [Cell("base", "full", 4, seed) for seed in range(3)]
    plan = planner([*cells, Cell("base", "linear", 4, 0)])
    skipped = tuple(plan.skipped(cells, {}, 1.0))
    (line,) = skipped_lines(Summary(replace(done.result, skipped=skipped)))
    assert line.startswith("full, 4 a label, 3 seeds: it would take about")
