"""Results of a comparison: uncertainty, the recommendation, the crossover, and warnings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparison_helpers import TEXTS, outcome, summary
from emberpc.bundle import DecisionRule
from emberpc.export.compare.class_figures import class_figures
from emberpc.export.compare.data_problems import confusions
from emberpc.export.compare.measured_outcome import thresholds_without_labels
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Cell, Decisions, Outcome
from emberpc.export.compare.planner import Skipped
from emberpc.export.compare.recommendation import (
    Recommendation,
    baselines,
    caveats,
    crossover,
    recommendation,
    skipped_lines,
)
from emberpc.export.compare.summary import Summary, difference
from emberpc.export.compare.uncertainty import Bootstrap, spread_over_seeds
from emberpc.export.data.examples import Examples


def test_the_cheapest_strategy_within_the_tolerance_of_the_best_is_recommended() -> None:
    linear, tuned = outcome("linear", 16, 0.90, cpu_seconds=5), outcome("top-layers", 16, 0.93, cpu_seconds=120)
    found = Recommendation(summary([linear, tuned]))
    assert found.taken.way.strategy == "top-layers"
    take, versus, *_ = recommendation(found)
    assert take.startswith("Take top-layers: test accuracy 0.930 (0.9")
    assert versus.startswith("Linear on frozen vectors loses 3.0 points (95 % interval -")
    assert versus.endswith("; its training takes 5.0 s against 120 s of CPU.")
    assert Recommendation(summary([linear, tuned]), tolerance=0.05).taken.way.strategy == "linear"
    close = outcome("top-layers", 16, 0.9075, cpu_seconds=120)
    found = Recommendation(summary([linear, close]))
    assert found.taken.way.strategy == "linear"
    _, versus, beside = recommendation(found)
    assert versus.startswith("Top-layers adds 0.7 points (95 % interval +0.0 to +1.7, so this may be chance);")
    assert beside == "If the same encoder embeds the texts anyway, linear costs almost nothing to serve."


def test_strategies_of_similar_cost_are_compared_by_their_accuracy_only() -> None:
    # One CPU-second must not outweigh a gain, even one within the tolerance.
    cheap, better = outcome("centroids", 16, 0.89, cpu_seconds=0.5), outcome("linear", 16, 0.8975, cpu_seconds=1.5)
    assert Recommendation(summary([cheap, better])).taken.way.strategy == "linear"
    slow = outcome("linear", 16, 0.8975, cpu_seconds=150)
    assert Recommendation(summary([cheap, slow])).taken.way.strategy == "centroids"


def test_a_gain_that_may_be_chance_counts_unless_it_costs_much_more() -> None:
    # A gain of 2.5 points, but with errors on other texts than those of linear: this may be chance.
    linear = outcome("linear", 16, 0.80, cpu_seconds=2)
    for seconds, taken in ((300.0, "full"), (3000.0, "linear")):
        tuned = outcome("full", 16, 0.825, first_wrong=200, cpu_seconds=seconds)
        found = Recommendation(summary([linear, tuned]))
        assert difference(found.candidates[0].point, found.candidates[1].point).low < 0
        assert found.taken.way.strategy == taken
        assert "so this may be chance" in " ".join(recommendation(found))


def test_the_cost_of_serving_can_decide_the_recommendation() -> None:
    linear, tuned = outcome("linear", 16, 0.900, cpu_seconds=500), outcome("top-layers", 16, 0.905, cpu_seconds=5)
    assert Recommendation(summary([linear, tuned])).taken.way.strategy == "top-layers"
    assert Recommendation(summary([linear, tuned]), cost="serving").taken.way.strategy == "linear"


def test_a_recommendation_begins_with_unmeasured_strategies_and_the_needed_time() -> None:
    """As in the data set of question types: the tuned strategy leads with few texts and was not measured with all."""
    outcomes = [outcome("linear", 16, 0.64), outcome("linear", 512, 0.895), outcome("contrastive", 16, 0.91)]
    found = Recommendation(summary(outcomes, {"contrastive": 720.0, "full": 3000.0}))
    assert found.taken.way.strategy == "contrastive"
    assert not found.taken.estimate.measured
    first, second, take, *_, fewer = recommendation(found)
    assert first.startswith(
        "How good contrastive is with up to 512 texts of each label is not known: it is estimated at 0.9"
    )
    assert (
        "from 0.910 with up to 16 texts of each label, where it leads linear on frozen vectors by 27.0 points" in first
    )
    assert first.endswith("To know, run this again with a time limit of 12 min or more.")
    assert second == (
        "It is not known how good full is: it was not measured. "
        "To know, run this again with a time limit of 50 min or more."
    )
    assert take.startswith("Take contrastive: an estimated test accuracy 0.9")
    assert not fewer.startswith("Fewer")


def test_a_quick_training_decides_only_if_the_full_one_is_not_measured() -> None:
    outcomes = [outcome("linear", 16, 0.81), outcome("top-layers", 16, 0.87, quick=True)]
    found = Recommendation(summary(outcomes, {"top-layers": 100.0}))
    assert found.taken.way.strategy == "top-layers"
    assert "from 0.870 with up to 16 texts of each label by a quick training." in recommendation(found)[0]
    outcomes.append(outcome("top-layers", 16, 0.86))
    found = Recommendation(summary(outcomes))
    assert [point.quick for point in found.summary.points] == [False, False]
    assert found.taken.estimate.measured
    assert found.unknown == []


def test_a_strategy_that_can_hardly_win_is_not_named_as_unknown() -> None:
    outcomes = [outcome("linear", 16, 0.9), outcome("linear", 64, 0.95), outcome("full", 16, 0.6)]
    assert Recommendation(summary(outcomes, {"full": 100.0})).unknown == []


def test_a_recommendation_names_a_smaller_budget_of_equal_accuracy() -> None:
    outcomes = [outcome("linear", budget, a) for budget, a in ((4, 0.7), (16, 0.9), (64, 0.9025))]
    found = Recommendation(summary(outcomes))
    fewer = recommendation(found)[-1]
    assert fewer.startswith("Fewer texts do as well: linear on frozen vectors reaches test accuracy 0.900 (0.8")
    assert fewer.endswith(") with up to 16 texts of each label (32 texts in all).")
    assert found.fewer is not None
    assert Recommendation(summary(outcomes[:1])).fewer is None


def test_nearest_is_recommended_only_without_exportable_strategies() -> None:
    nearest, words = outcome("nearest", 16, 0.95), outcome("tf-idf", 16, 0.99)
    assert Recommendation(summary([words, nearest, outcome("linear", 16, 0.90)])).taken.way.strategy == "linear"
    assert Recommendation(summary([words, nearest])).taken.way.strategy == "nearest"
    only_words = recommendation(Recommendation(summary([words])))
    assert only_words[0].startswith("No strategy that can be served was measured. The baseline TF-IDF")
    assert not any("If the same encoder" in each for each in only_words)
    found = summary([words, nearest, outcome("zero-shot", NO_TEXTS, 0.6)])
    assert baselines(found) == (
        "Baselines, by test accuracy: the most frequent label 0.500, TF-IDF with logistic regression 0.990, "
        "zero-shot 0.600."
    )


def test_the_cost_of_a_full_training_is_estimated_from_a_quick_one() -> None:
    quick = outcome("top-layers", 16, 0.87, quick=True, cpu_seconds=35)
    found = Recommendation(summary([outcome("linear", 16, 0.85, cpu_seconds=40), quick]))
    assert found.taken.way.strategy == "top-layers"
    assert found.taken.cpu_seconds > 50


def test_a_strategy_that_failed_is_not_offered_more_time() -> None:
    found = summary([outcome("linear", 16, 0.8), outcome("full", 4, 0.9)])
    failed = (Skipped(Cell("base", "full", 16, 0), "it failed: the loss is nan"),)
    first, *_ = recommendation(Recommendation(Summary(replace(found.result, skipped=failed))))
    assert first.endswith("It failed; the report has the reason.")


def test_with_serving_as_the_cost_the_milliseconds_are_stated() -> None:
    outcomes = [outcome("linear", 16, 0.9), outcome("top-layers", 16, 0.905)]
    assert "beside its vector, a text takes 3.0 ms against 0.0 ms" in " ".join(
        recommendation(Recommendation(summary(outcomes), cost="serving"))
    )


def test_the_crossover_is_the_budget_from_which_fine_tuning_stays_ahead() -> None:
    linear = [outcome("linear", budget, 0.8) for budget in (1, 4, 16)]
    tuned = [outcome("full", budget, a) for budget, a in ((1, 0.7), (4, 0.9), (16, 0.95))]
    found = summary([*linear, *tuned])
    assert found.ahead == {1: False, 4: True, 16: True}
    assert "from 4 a label on; with fewer, it may be worse" in crossover(found)
    assert "only at 4 a label." in crossover(summary([*linear, outcome("full", 4, 0.9), outcome("full", 16, 0.8)]))
    assert "at every compared budget (4 a label, 16 a label)." in crossover(summary([*linear, *tuned[1:]]))
    assert "not significantly better than frozen vectors at any compared budget (1 a label)." in crossover(
        summary([*linear, tuned[0]])
    )
    assert crossover(found).endswith("The test texts chose the best strategy of each kind for this.")
    nothing = "No budget was measured with both fine-tuning and frozen vectors, so they cannot be compared."
    assert crossover(summary(tuned)) == nothing
    assert crossover(summary([*linear, outcome("full", 16, 0.9, quick=True)])) == nothing
    assert crossover(summary(linear)) == "No fine-tuning was measured."


def test_warnings_about_the_figures_are_returned() -> None:
    found = summary([outcome("linear", 4, 0.9, seed=seed) for seed in range(2)])
    (shared,) = caveats(found)  # the texts of `summary` are the same for training and test
    assert shared == (
        f"{TEXTS} test texts are training texts, too, for example “text 0”: "
        "the accuracy is too high by up to this share of the texts."
    )
    apart = replace(found.result, train=replace(found.result.train, texts=()))
    assert caveats(Summary(apart)) == []
    bare = outcome("full", 1, 0.8)
    bare.figures["held_out_texts"] = 0.0
    once, raw = caveats(Summary(replace(apart, outcomes=(*apart.outcomes, bare, outcome("full", 4, 0.9)),
        per_label={1: 1.0, 4: 4.0})))  # fmt: skip
    assert once.endswith("is that of other strategies, if any: full at 1, 4 a label.")
    assert raw.endswith("probabilities are not calibrated: full at 1 a label.")


def test_few_test_texts_and_several_labels_are_named_in_warnings() -> None:
    found = summary([outcome("linear", 4, 0.9, seed=seed) for seed in range(2)])
    few = replace(found.result.test.take(range(40)), multi_label=True)
    outcomes = tuple(replace(each, test=Decisions([], [], [])) for each in found.result.outcomes)
    train = replace(found.result.train, texts=few.texts[:1])
    assert caveats(Summary(replace(found.result, outcomes=outcomes, train=train, test=few))) == [
        "There are 40 test texts only: one of them changes an accuracy by 2.5 points, so most differences may be "
        "chance.",
        "1 test text is a training text, too, for example “text 0”: the accuracy is too high by up to this share of "
        "the texts.",
        "A text counts for the accuracy only if it is given exactly its labels.",
    ]


def test_a_strategy_that_is_as_good_is_not_said_to_add_nothing() -> None:
    found = Recommendation(summary([outcome("linear", 16, 0.9), outcome("top-layers", 16, 0.9, cpu_seconds=120)]))
    _, versus, *_ = recommendation(found)
    assert versus.startswith("Top-layers reaches the same accuracy (95 % interval +0.0 to +0.0 points of difference);")


def test_a_strategy_that_may_be_no_better_than_the_most_frequent_label_is_named_as_this() -> None:
    found = Recommendation(summary([outcome("linear", 16, 0.52)]))
    assert "This may be no better than the most frequent label for every text (0.500)." in recommendation(found)
    assert not any(
        "no better" in each for each in recommendation(Recommendation(summary([outcome("linear", 16, 0.6)])))
    )
    for metric, value in (("macro_f1", "0.333"), ("micro_f1", "0.500")):
        one = Summary(replace(found.summary.result, outcomes=(with_micro(outcome("linear", 16, 0.6)),)), metric)
        assert f"by test {metric.replace('_f1', ' F1')}: the most frequent label {value}" in baselines(one)


def test_an_unknown_serving_cost_is_not_the_lowest() -> None:
    known = summary([outcome("linear", 16, 0.9), outcome("full", 16, 0.905)])  # that of full is not known
    found = Recommendation(known, cost="serving")
    assert found.taken.way.strategy == "linear"
    assert "a text takes a time that was not measured against 0.0 ms" in " ".join(recommendation(found))
    neither = Recommendation(Summary(replace(known.result, serving=())), cost="serving")
    assert neither.taken.way.strategy == "linear"
    assert "the time of serving was measured for neither" in " ".join(recommendation(neither))


def test_skipped_cells_give_a_line_for_each_strategy_and_budget() -> None:
    done = summary([outcome("linear", 4, 0.9)])
    skipped = tuple(Skipped(Cell("base", "full", 4, seed), "it would take about 9 s") for seed in range(3))
    (line,) = skipped_lines(Summary(replace(done.result, skipped=skipped)))
    assert line == "full, 4 a label, 3 seeds: it would take about 9 s"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.sampled_from(["accuracy", "macro_f1", "micro_f1"]))
def test_intervals_stay_within_0_and_1_and_contain_the_value(accuracies: list[float], metric: str) -> None:
    found = summary([outcome("linear", 4, a, seed=seed) for seed, a in enumerate(accuracies)])
    score = (
        Summary(replace(found.result, outcomes=tuple(map(with_micro, found.result.outcomes))), metric).points[0].score
    )
    assert 0 <= score.low <= score.value <= score.high <= 1
    if metric == "accuracy":
        assert score.high > score.low


def with_micro(found: Outcome) -> Outcome:
    """Return the outcome with a micro F1: with one label for each text, it equals the accuracy."""
    return replace(found, figures={**found.figures, "micro_f1": found.figures["accuracy"]})


def test_an_interval_is_that_of_a_binomial_for_one_seed_and_wider_if_seeds_differ() -> None:
    once = summary([outcome("linear", 4, 0.8)]).points[0].score
    error = (0.8 * 0.2 / TEXTS) ** 0.5
    assert once.high - once.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    # Two seeds that are equal (all texts, for example) add nothing; a t-interval would have no width.
    same = summary([outcome("linear", 4, 0.8, seed=seed) for seed in range(2)]).points[0].score
    assert same.high - same.low == pytest.approx(once.high - once.low, rel=0.05)
    # Two seeds that differ by 4 points: a t-interval would be ± 0.25.
    apart = summary([outcome("linear", 4, a, seed=seed) for seed, a in enumerate((0.78, 0.82))]).points[0].score
    assert 1.2 * (once.high - once.low) < apart.high - apart.low < 0.2


def test_the_difference_of_strategies_with_common_errors_has_a_narrow_interval() -> None:
    points = summary([outcome("linear", 4, 0.80), outcome("top-layers", 4, 0.84)]).points
    linear, tuned = points
    between = difference(tuned, linear)
    assert between.value == pytest.approx(0.04)
    assert between.low > 0.015
    other = summary([outcome("linear", 4, 0.80), outcome("top-layers", 4, 0.84, first_wrong=200)]).points
    assert difference(other[1], other[0]).low < 0


def test_the_bootstrap_computes_the_reported_figures() -> None:
    generator = np.random.default_rng(0)
    targets = generator.random((300, 3)) < 0.4
    decided = targets ^ (generator.random((300, 3)) < 0.1)
    given_labels = [np.flatnonzero(row).tolist() for row in decided]
    decisions = Decisions(list(range(300)), given_labels, [0.9] * 300)
    both, either = (decided & targets).sum(axis=0), decided.sum(axis=0) + targets.sum(axis=0)
    expected = {
        "accuracy": (decided == targets).all(axis=1).mean(),
        "macro_f1": (2 * both / either).mean(),
        "micro_f1": 2 * both.sum() / either.sum(),
    }
    bootstrap = Bootstrap(targets)
    for metric, value in expected.items():
        assert bootstrap.samples(metric, [decisions]).mean() == pytest.approx(value, abs=0.01)


def test_a_label_missing_in_a_bootstrap_sample_does_not_lower_its_macro_f1() -> None:
    targets = np.eye(50, dtype=bool)
    right = Decisions(list(range(50)), [[i] for i in range(50)], [0.9] * 50)
    assert Bootstrap(targets).samples("macro_f1", [right]).min() == 1
    empty = Decisions(list(range(50)), [[]] * 50, [0.9] * 50)
    assert Bootstrap(np.zeros((50, 3), dtype=bool)).samples("macro_f1", [empty]).max() == 0


def test_the_spread_over_seeds_is_pooled_over_strategies() -> None:
    assert spread_over_seeds([[0.8], [0.9]]) == 0
    assert spread_over_seeds([[0.8, 0.9], [0.5]]) == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert spread_over_seeds([[0.8, 0.9], [0.5, 0.5]]) == pytest.approx(np.std([0.8, 0.9], ddof=1) / 2**0.5)


def test_figures_of_each_label_are_means_over_the_seeds() -> None:
    found = summary([outcome("linear", ALL, 0.99), outcome("linear", ALL, 0.97, seed=1)])
    figures = class_figures(found.result.test, found.result.outcomes)
    assert {each.label for each in figures} == {"label 0", "label 1"}
    assert all(each.recall == pytest.approx(0.98) == pytest.approx(each.precision) for each in figures)
    assert all(each.texts == TEXTS / 2 for each in figures)


def test_a_missed_label_of_several_is_paired_with_each_label_that_was_given_wrongly() -> None:
    names = ("bike", "car", "train")
    targets = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)
    test = Examples(tuple(f"text {row}" for row in range(4)), targets, names, multi_label=True)
    # bike is missed in favour of train; car is missed and nothing else is given; train is given in addition.
    decisions = Decisions(list(range(4)), [[1, 2], [2], [], [2]], [0.9] * 4)
    found = summary([outcome("linear", ALL, 0.9)])
    multi = Summary(replace(found.result, test=test, train=test))
    point = replace(found.points[0], outcomes=(replace(found.result.outcomes[0], test=decisions),))
    assert [(each.label, each.given, each.count, each.share) for each in confusions(multi, point)] == [
        ("bike", "train", 2, 1.0),
        ("car", "(none)", 1, 0.5),
    ]


def test_thresholds_without_labels_find_cosines_that_stand_out() -> None:
    generator = np.random.default_rng(0)
    targets = generator.random((300, 12)) < 0.12
    # All cosines are above 0, and each label has its own mean.
    cosines = generator.normal(np.linspace(0.1, 0.5, 12), 0.05, size=(300, 12)) + 0.25 * targets
    logits = (10 * cosines).astype(np.float32)
    thresholds = thresholds_without_labels(logits)
    decided = DecisionRule(thresholds=thresholds, multi_label=True).labels(logits)
    assert 0.6 < decided.any(axis=1).mean() < 0.9
    assert 2 * (decided & targets).sum() / (decided.sum() + targets.sum()) > 0.85
    assert DecisionRule(multi_label=True).labels(logits).mean() > 0.9
    assert all(0 <= threshold <= 1 for threshold in thresholds_without_labels(logits[:1]))
