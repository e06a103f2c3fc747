"""Parts of a comparison that decide which measurements are made: samples, stored outcomes, estimates, plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison_helpers import examples, outcome
from emberpc.export.compare.estimates import Estimates, MeasuredFigure
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Cell, Outcome, OutcomeStore, Way, take_budget
from emberpc.export.compare.planner import Planner, Work, budgets_of
from emberpc.export.errors import ExportError

PER_LABEL = {1: 1.0, 4: 4.0, 16: 16.0, ALL: 256.0}
LINEAR, TOP, FULL = (Way("base", strategy) for strategy in ("linear", "top-layers", "full"))


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


def test_samples_include_texts_with_several_labels_or_none() -> None:
    data = replace(examples([50, 50], multi_label=True))
    data.targets[:10] = True
    data.targets[90:] = False
    sample = take_budget(data, 4, 0)
    assert (sample.targets.sum(axis=0) >= 4).all()
    assert (~sample.targets.any(axis=1)).sum() == 4


def test_budgets_of_all_texts_are_merged() -> None:
    assert budgets_of([8, 1, 16, 32, ALL, 8], lambda budget: budget == ALL or budget >= 16) == [1, 8, ALL]
    assert budgets_of([8, 1], lambda budget: budget >= 16) == [1, 8]


def test_all_stored_outcomes_are_read_and_damaged_ones_are_ignored(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path, "key")
    kept, quick = outcome("linear", 4, 0.9), outcome("full", 4, 0.8, quick=True)
    damaged, moved, foreign = outcome("full", 4, 0.9), outcome("full", 8, 0.9), outcome("linear", 16, 0.9)
    for each in (kept, quick, damaged, moved, replace(foreign, cell=replace(foreign.cell, strategy="magic"))):
        store.write(each)
    (tmp_path / "cells" / damaged.cell.file_name).write_text('{"cell": {"base": 1}}')
    (tmp_path / "cells" / moved.cell.file_name).rename(tmp_path / "cells" / "copy.json")
    assert OutcomeStore(tmp_path, "key").read() == {kept.cell: kept, quick.cell: quick}


def test_outcomes_of_bases_with_similar_names_are_stored_separately(tmp_path: Path) -> None:
    store = OutcomeStore(tmp_path, "key")
    plain = outcome("linear", 4, 0.9)
    each = [replace(plain, cell=replace(plain.cell, base=base)) for base in ("a/b", "a-b", "a b", "-a-b", "äöü", "üöä")]
    for found in each:
        store.write(found)
    assert store.read() == {found.cell: found for found in each}


def test_a_folder_of_other_data_is_refused(tmp_path: Path) -> None:
    OutcomeStore(tmp_path, "key")
    with pytest.raises(ExportError, match="another comparison|other data"):
        OutcomeStore(tmp_path, "other")


def test_an_estimate_follows_the_curve_of_other_strategies() -> None:
    # From 16 to 256 texts of each label, the odds of an error by linear fall to 3/8, so that those by top-layers are
    # expected to fall to 3/8, too: from 1/9 to 1/24.
    figures = {
        (LINEAR, 16, False): MeasuredFigure(0.6, 0.01),
        (LINEAR, ALL, False): MeasuredFigure(0.8, 0.01),
        (TOP, 16, False): MeasuredFigure(0.9, 0.01),
    }
    found = Estimates(figures, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert not found.measured
    assert found.value == pytest.approx(0.96)
    assert 0.9 < found.low < 0.96 < found.high < 1
    assert Estimates(figures, PER_LABEL).at(FULL, ALL) is None
    assert Estimates(figures, PER_LABEL).at(TOP, 4) is None


def test_an_estimate_never_falls_with_more_texts_and_stays_a_share() -> None:
    figures = {
        (LINEAR, 16, False): MeasuredFigure(0.99, 0.001),
        (LINEAR, ALL, False): MeasuredFigure(0.9, 0.001),
        (TOP, 1, False): MeasuredFigure(1.0, 0.001),
        (TOP, 16, False): MeasuredFigure(0.2, 0.05),
    }
    found = Estimates(figures, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_an_estimate_supports_budgets_with_equal_numbers_of_texts() -> None:
    figures = {
        (LINEAR, 16, False): MeasuredFigure(0.8, 0.01),
        (LINEAR, ALL, False): MeasuredFigure(0.8, 0.01),
        (TOP, 16, False): MeasuredFigure(0.9, 0.01),
    }
    estimates = Estimates(figures, {1: 1.0, 16: 9.5, ALL: 9.5})
    found, known = estimates.at(TOP, ALL), estimates.at(LINEAR, ALL)
    assert found is not None
    assert known is not None
    assert found.value == pytest.approx(0.9)
    assert known.measured


def test_a_quick_profile_gives_an_estimate_of_the_full_one() -> None:
    found = Estimates({(TOP, ALL, True): MeasuredFigure(0.87, 0.01)}, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert not found.measured
    assert 0.87 < found.value < 0.89


def test_a_quick_profile_with_a_low_figure_promises_no_large_gain() -> None:
    found = Estimates({(TOP, ALL, True): MeasuredFigure(0.24, 0.01)}, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert 0.24 < found.value < 0.27
    assert 0.15 < found.low < found.high < 0.35


def test_an_extrapolation_is_drawn_to_what_other_tuned_strategies_reach() -> None:
    """With 4 texts of each label, the slope is a guess over six doublings."""
    few = {
        (LINEAR, 4, False): MeasuredFigure(0.6, 0.01),
        (LINEAR, ALL, False): MeasuredFigure(0.85, 0.01),
        (FULL, 4, True): MeasuredFigure(0.75, 0.01),
    }
    alone = Estimates(few, PER_LABEL).at(FULL, ALL)
    beside = Estimates({**few, (TOP, ALL, True): MeasuredFigure(0.86, 0.01)}, PER_LABEL).at(FULL, ALL)
    assert alone is not None
    assert beside is not None
    assert alone.value > 0.9
    assert 0.86 < beside.value < 0.9
    assert beside.high - beside.low < 0.8 * (alone.high - alone.low)
    # So is one to the extrapolation of a strategy that was measured with more texts, but not the other way round.
    nearer = {**few, (TOP, 16, True): MeasuredFigure(0.75, 0.01)}
    found, other = Estimates(nearer, PER_LABEL).at(FULL, ALL), Estimates(nearer, PER_LABEL).at(TOP, ALL)
    top = Estimates({key: value for key, value in nearer.items() if key[0] != FULL}, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert other is not None
    assert other == top
    assert other.value < found.value < alone.value


def test_a_full_profile_takes_the_place_of_its_estimate() -> None:
    found = Estimates({(TOP, ALL, True): MeasuredFigure(0.87, 0.01)}, PER_LABEL).at(TOP, ALL)
    assert found is not None
    assert found.low < 0.86
    exact = Estimates(
        {(TOP, ALL, True): MeasuredFigure(0.87, 0.01), (TOP, ALL, False): MeasuredFigure(0.86, 0.01)}, PER_LABEL
    )
    found = exact.at(TOP, ALL)
    assert found is not None
    assert found.measured
    assert found.value == pytest.approx(0.86)


Figures = Callable[[Cell], tuple[float, float]]


class Host:
    """A host on which cells have known accuracies and wall seconds, and on which a planner is run.

    `figures` returns the accuracy of a cell and the seconds of one pass of a text, or of the cell if it is not tuned.
    """

    #: Passes of a text, as a multiple of its number of texts, of the full profile.
    PASSES: ClassVar = {"top-layers": 10.0, "contrastive": 15.0, "full": 30.0, "linear": 0.0, "centroids": 0.0}

    def __init__(self, strategies: Iterable[str], figures: Figures, seeds: int = 1) -> None:
        self.cells = [
            Cell("base", strategy, budget, seed, quick)
            for strategy in strategies
            for budget in PER_LABEL
            for seed in range(seeds)
            for quick in ((False, True) if self.PASSES[strategy] and not seed else (False,))
        ]
        self.figures = figures
        self.planner = Planner({cell: self.work(cell) for cell in self.cells}, PER_LABEL, {"base": 0.01})
        self.done: dict[Cell, Outcome] = {}

    def work(self, cell: Cell) -> Work:
        texts = round(2 * PER_LABEL[cell.budget])
        return Work(texts, self.PASSES[cell.strategy] * texts * (0.2 if cell.quick else 1.0))

    def run(self, limit: float | None) -> list[Cell]:
        """Return the cells in the order in which they are fitted within a limit of seconds."""
        todo, order, left = list(self.cells), list[Cell](), limit
        while (cell := self.planner.choose(todo, self.done, left)) is not None:
            todo.remove(cell)
            order.append(cell)
            accuracy, each = self.figures(cell)
            seconds = each * max(1.0, self.work(cell).passes)
            found = outcome(cell.strategy, cell.budget, accuracy, quick=cell.quick, wall_seconds=seconds)
            self.done[cell] = replace(found, cell=cell)
            left = None if left is None else left - seconds
            assert left is None or left >= 0
        return order


def growing(cell: Cell) -> float:
    """Return an accuracy that grows with the texts."""
    return 0.6 + 0.03 * {1: 1, 4: 3, 16: 5, ALL: 8}[cell.budget]


def test_frozen_strategies_are_measured_before_a_trial_of_each_tuned_one() -> None:
    host = Host(("full", "top-layers", "linear"), lambda cell: (growing(cell), 0.01))
    order = host.run(400)
    assert {cell.strategy for cell in order[:4]} == {"linear"}
    assert order[4:6] == [Cell("base", "top-layers", ALL, 0, quick=True), Cell("base", "full", ALL, 0, quick=True)]
    # Then the full profiles at the largest budget, as both may be the best.
    assert {*order[6:8]} == {Cell("base", "top-layers", ALL, 0), Cell("base", "full", ALL, 0)}


def test_a_trial_that_exceeds_the_time_limit_uses_fewer_texts() -> None:
    host = Host(("full", "linear"), lambda cell: (growing(cell), 0.01))
    order = host.run(20)
    tuned = [cell for cell in order if cell.strategy == "full"]
    assert tuned[0] == Cell("base", "full", 16, 0, quick=True)
    assert Cell("base", "full", ALL, 0) not in order


def test_the_first_trial_may_take_two_thirds_of_the_time() -> None:
    host = Host(("full", "top-layers", "contrastive", "linear"), lambda cell: (growing(cell), 0.01))
    whole = Cell("base", "top-layers", ALL, 0, quick=True)
    order = host.run(2.1 * 0.01 * host.work(whole).passes)
    assert next(cell for cell in order if cell.way.tunes) == whole


def test_the_best_strategy_of_the_trials_is_fully_measured_before_others() -> None:
    def figures(cell: Cell) -> tuple[float, float]:
        return {"full": 0.9, "top-layers": 0.88, "contrastive": 0.7, "linear": 0.8}[cell.strategy], 0.01

    order = Host(("full", "top-layers", "contrastive", "linear"), figures).run(2000)
    full = [cell for cell in order if cell.budget == ALL and not cell.quick and cell.strategy != "linear"]
    assert [cell.strategy for cell in full] == ["full", "top-layers", "contrastive"]
    # The trial of contrastive was poor, so smaller budgets of the others are measured before it.
    assert order.index(full[2]) > order.index(Cell("base", "top-layers", 4, 0))


def test_a_decisive_measurement_that_fits_is_made_with_any_time_limit() -> None:
    for limit in range(5, 1200, 30):
        host = Host(("top-layers", "linear"), lambda cell: (growing(cell) + 0.1 * (cell.strategy != "linear"), 0.01))
        order, spent = host.run(limit), 0.0
        for cell in order:
            spent += 0.01 * max(1.0, host.work(cell).passes)
        assert spent <= limit
        # The remaining time is not sufficient for the decisive full profile and the reserve.
        decides = Cell("base", "top-layers", ALL, 0)
        assert decides in order or (limit - spent) < 1.25 * 0.01 * host.work(decides).passes


def test_quick_trainings_leave_time_for_the_only_full_training() -> None:
    for ratio in (1.05, 1.3, 1.6, 2.0):
        host = Host(("top-layers", "linear"), lambda cell: (growing(cell), 0.01))
        decides = Cell("base", "top-layers", ALL, 0)
        assert decides in host.run(1.25 * ratio * 0.01 * host.work(decides).passes + 1)


def test_without_a_time_limit_all_full_profiles_and_no_quick_ones_are_fitted() -> None:
    host = Host(("full", "linear"), lambda cell: (growing(cell), 0.01), seeds=2)
    order = host.run(None)
    assert {*order} == {cell for cell in host.cells if not cell.quick}
    assert order.index(Cell("base", "full", ALL, 0)) < order.index(Cell("base", "full", ALL, 1))


def test_estimates_of_time_are_corrected_by_measured_times() -> None:
    host = Host(("top-layers", "full", "linear"), lambda cell: (0.9, 0.05))
    quick, whole = Cell("base", "top-layers", 16, 0, quick=True), Cell("base", "top-layers", ALL, 0)
    before = host.planner.estimate(whole, {})
    seconds = 0.05 * host.work(quick).passes
    done = {quick: replace(outcome("top-layers", 16, 0.9, quick=True, wall_seconds=seconds), cell=quick)}
    assert before == pytest.approx(0.01 * host.work(whole).passes)
    assert host.planner.estimate(whole, done) == pytest.approx(0.05 * host.work(whole).passes)
    # A strategy that was not measured is expected to be as fast, pass for pass.
    other = Cell("base", "full", ALL, 0)
    assert host.planner.estimate(other, done) == pytest.approx(0.05 * host.work(other).passes)


def test_a_cell_that_exceeds_the_time_limit_is_skipped_with_its_estimate() -> None:
    host = Host(("top-layers",), lambda cell: (0.9, 0.01))
    whole, quick = Cell("base", "top-layers", ALL, 0), Cell("base", "top-layers", ALL, 0, quick=True)
    seconds = 0.01 * host.work(whole).passes
    assert host.planner.choose([whole], {}, 1.2 * seconds) is None
    assert host.planner.choose([whole], {}, 1.3 * seconds) == whole
    (skipped,) = host.planner.skipped([whole, quick], {}, 9)
    assert skipped.cell == whole
    assert f"about {seconds:.0f} s" in skipped.reason
    assert "9.0 s were left" in skipped.reason
