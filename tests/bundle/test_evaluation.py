"""Figures of a classifier, computed with numpy only, equal those of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emberpc.bundle import DecisionRule, RejectionScore
from emberpc.bundle.evaluation import HeldOut, calibrate, measure, measure_scope
from emberpc.bundle.rejection import auroc


@pytest.fixture
def metrics() -> Any:
    """sklearn.metrics, imported for these tests only: it takes 0.5 CPU-seconds and 50 MB."""
    return pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("digits", [1, 6])
@pytest.mark.parametrize(("inside", "outside"), [(1, 1), (1, 40), (300, 70)])
def test_the_auroc_is_that_of_scikit_learn_with_and_without_ties(
    metrics: Any, inside: int, outside: int, digits: int
) -> None:
    random = np.random.default_rng(0)
    within, beyond = random.normal(0.8, 1, inside).round(digits), random.normal(0, 1, outside).round(digits)
    expected = metrics.roc_auc_score([1] * inside + [0] * outside, np.concatenate([within, beyond]))
    assert auroc(within, beyond) == pytest.approx(expected, abs=1e-12)


def test_auroc_counts_equal_scores_half() -> None:
    assert auroc(np.zeros(5), np.zeros(7)) == 0.5
    assert auroc(np.array([1.0, 0.0]), np.array([0.0])) == 0.75


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_f1_scores_are_those_of_scikit_learn(metrics: Any, multi_label: bool) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(60, 5)).astype(np.float32)
    logits[:, 4] = -9.0  # a label that no text has and none is given
    targets = np.eye(5, dtype=bool)[random.integers(0, 4, 60)]
    if multi_label:
        targets = random.random((60, 5)) < [0.5, 0.3, 0.1, 0.2, 0.0]
    rule = DecisionRule(multi_label=multi_label)
    decided, found = rule.labels(logits), measure(logits, targets, rule)
    macro = metrics.f1_score(targets[:, :4], decided[:, :4], average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro, abs=1e-12)
    assert found["micro_f1"] == pytest.approx(metrics.f1_score(targets, decided, average="micro", zero_division=0))


def test_measure_returns_figures_for_texts_without_labels() -> None:
    found = measure(
        np.full((3, 2), -5.0, dtype=np.float32), np.zeros((3, 2), dtype=bool), DecisionRule(multi_label=True)
    )
    assert (found["accuracy"], found["macro_f1"], found["micro_f1"]) == (1.0, 0.0, 0.0)


def test_calibrate_without_out_of_scope_texts_rejects_the_stated_share_by_the_best_logit() -> None:
    logits = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    targets = np.tile([False, True], (1000, 1))
    rule = calibrate(HeldOut(logits, targets), rejection_rate=0.05)
    assert rule.rejection_score is RejectionScore.MAX_LOGIT
    assert rule.rejection_threshold == pytest.approx(100.9)
    assert rule.decide(logits).rejected.mean() == pytest.approx(0.05)
    assert calibrate(HeldOut(logits, targets)).decide(logits).rejected.sum() == 10
    assert calibrate(HeldOut(logits, targets), rejection_rate=0).rejection_threshold is None
    assert calibrate(HeldOut(logits[:0], targets[:0])).rejection_threshold is None
    # `compare` measures this rule on out-of-scope texts.
    found = measure_scope(logits, np.array([[0.0, 1.0], [0.0, 1e6]], dtype=np.float32), rule)
    assert found["false_rejection_rate"] == pytest.approx(0.05)
    assert found["false_acceptance_rate"] == 0.5
    assert found["out_of_scope_auroc"] == pytest.approx(0.5 * (1 - 0.5 / 1000))
