"""The decision rule of classifiers gives the server and the export equal results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.bundle import (
    DecisionRule,
    Manifest,
    RejectionScore,
    Task,
    best_labels,
    probabilities,
    rejection_scores,
)
from emberpc.bundle.decision import ranking

SHAPE = (4, 3)
LOGITS = arrays(np.float32, SHAPE, elements=st.floats(-1e4, 1e4, width=32))
#: Extreme values, equal ones among them, and infinities.
EXTREME = arrays(
    np.float32,
    SHAPE,
    elements=st.sampled_from(
        [float(np.float32(each)) for each in (-np.inf, -3.4e38, -1e4, -1, -1e-38, 0, 1e-38, 1, 1e4, 3.4e38, np.inf)]
    ),
)
THRESHOLDS = st.just(()) | st.tuples(*[st.floats(0, 1)] * SHAPE[1])
RULES = st.builds(
    DecisionRule,
    temperature=st.floats(1e-6, 1e6),
    thresholds=THRESHOLDS,
    rejection_threshold=st.none() | st.floats(-1e4, 1e4),
    multi_label=st.booleans(),
)


def classifier(manifest: Manifest, rule: DecisionRule) -> Manifest:
    """Return the manifest of a classifier that decides by a rule, as the export writes it."""
    return replace(
        manifest,
        task=Task.CLASSIFICATION,
        labels=("a", "b", "c"),
        multi_label=rule.multi_label,
        thresholds=rule.thresholds,
        temperature=rule.temperature,
        rejection_logit=rule.rejection_threshold,
    )


@pytest.fixture(scope="module")
def embedding_manifest() -> Manifest:
    from emberpc.bundle import Parity, Variant

    variants = (Variant("fp32", "onnx/model.onnx", Parity(1, 0.0, 1.0)),)
    names: dict[str, Any] = {"base_model": "m", "revision": "r", "weights_sha256": "0", "pooling": "mean"}
    return Manifest(
        Task.EMBEDDING, **names, dimensions=2, normalize=True, max_tokens=8, pad_token_id=0, variants=variants
    )


@given(logits=LOGITS | EXTREME, rule=RULES)
def test_a_rule_read_from_the_manifest_decides_like_the_rule_of_the_export(
    embedding_manifest: Manifest, logits: np.ndarray, rule: DecisionRule
) -> None:
    stored = Manifest.from_json(classifier(embedding_manifest, rule).to_json())
    served, exported = stored.decision_rule.decide(logits), rule.decide(logits)
    for name in ("probabilities", "ranking", "labels", "rejected"):
        assert np.array_equal(getattr(served, name), getattr(exported, name))
    # The export measures with these two methods.
    assert np.array_equal(served.probabilities, rule.probabilities(logits))
    assert np.array_equal(served.labels, rule.labels(logits) & ~exported.rejected[:, None])


@given(logits=LOGITS | EXTREME, rule=RULES)
def test_a_text_gets_the_same_decision_alone_and_in_a_batch(logits: np.ndarray, rule: DecisionRule) -> None:
    together = rule.decide(logits)
    for row in range(len(logits)):
        alone = rule.decide(logits[row : row + 1])
        np.testing.assert_allclose(alone.probabilities[0], together.probabilities[row], rtol=1e-12, atol=1e-300)
        assert np.array_equal(alone.ranking[0], together.ranking[row])
        assert alone.rejected[0] == together.rejected[row]
        if not rule.multi_label:
            assert np.array_equal(alone.labels[0], together.labels[row])


@given(logits=LOGITS | EXTREME, rule=RULES)
def test_logits_in_float32_and_float64_give_the_same_decision(logits: np.ndarray, rule: DecisionRule) -> None:
    narrow, wide = rule.decide(logits), rule.decide(logits.astype(np.float64))
    for name in ("probabilities", "ranking", "labels", "rejected"):
        assert np.array_equal(getattr(narrow, name), getattr(wide, name))


@given(logits=LOGITS | EXTREME, temperature=st.sampled_from([5e-324, 1e-300, 1e-6, 1e6, 1e300]) | st.floats(0.05, 20))
def test_probabilities_are_from_0_to_1_for_all_logits(logits: np.ndarray, temperature: float) -> None:
    single = probabilities(logits, temperature)
    assert ((single >= 0) & (single <= 1)).all()
    np.testing.assert_allclose(single.sum(axis=1), 1, rtol=1e-9)
    multi = probabilities(logits, temperature, multi_label=True)
    assert ((multi >= 0) & (multi <= 1)).all()


@given(logits=LOGITS | EXTREME, rule=RULES)
def test_the_ranking_has_the_best_label_first_and_probabilities_in_order(
    logits: np.ndarray, rule: DecisionRule
) -> None:
    found = rule.decide(logits)
    assert np.array_equal(found.ranking[:, 0], best_labels(logits))
    ordered = np.take_along_axis(found.probabilities, found.ranking, axis=1).astype(np.float32)
    assert (np.diff(ordered, axis=1) <= 0).all()


@given(logits=LOGITS | EXTREME, rule=RULES)
def test_a_rejected_text_has_no_label_and_other_texts_of_a_single_label_classifier_have_one(
    logits: np.ndarray, rule: DecisionRule
) -> None:
    found = rule.decide(logits)
    count = found.labels.sum(axis=1)
    assert not count[found.rejected].any()
    if not rule.multi_label:
        assert (count[~found.rejected] == 1).all()
        assert found.labels[np.arange(len(logits)), found.ranking[:, 0]][~found.rejected].all()


def test_the_first_of_labels_with_equal_logits_is_the_best() -> None:
    logits = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [np.inf, -np.inf, np.inf]])
    assert best_labels(logits).tolist() == [1, 0, 0]
    assert ranking(logits).tolist() == [[1, 2, 0], [0, 1, 2], [0, 2, 1]]
    np.testing.assert_allclose(probabilities(logits)[2], [0.5, 0, 0.5])


def test_logits_decide_between_labels_whose_probabilities_are_equal() -> None:
    """In float32 and at a high temperature, both probabilities round to the same number."""
    logits = np.array([[0.0, 1e-3]], dtype=np.float32)
    found = DecisionRule(temperature=1e20).decide(logits)
    assert found.probabilities[0, 0] == found.probabilities[0, 1]
    assert found.labels.tolist() == [[False, True]]


def test_a_multi_label_classifier_gives_labels_at_or_above_their_thresholds() -> None:
    logits = np.log(np.array([[0.3 / 0.7, 4.0, 0.7 / 0.3]]))
    rule = DecisionRule(thresholds=(0.2, 0.9, 0.6), multi_label=True)
    assert rule.decide(logits).labels.tolist() == [[True, False, True]]
    # Without thresholds of its own, the threshold is 0.5, which a logit of 0 reaches.
    default = DecisionRule(multi_label=True)
    assert default.decide(np.array([[0.0, -1e-9, 1.0]])).labels.tolist() == [[True, False, True]]
    assert default.label_thresholds(3) == (0.5, 0.5, 0.5)
    assert DecisionRule(thresholds=(0.2, 0.9, 0.6)).label_thresholds(3) == ()


def test_a_threshold_is_compared_in_float64() -> None:
    """The nearest float32 to 0.1 is above 0.1, so a comparison in float32 would give a label that is below it."""
    threshold = float(np.float32(0.1))
    logits = np.array([[np.log(0.1 / 0.9)]])
    assert probabilities(logits, multi_label=True)[0, 0] < threshold
    assert not DecisionRule(thresholds=(threshold,), multi_label=True).labels(logits).any()


def test_a_text_of_a_multi_label_classifier_may_have_no_label_and_is_not_rejected() -> None:
    found = DecisionRule(multi_label=True, rejection_threshold=-5.0).decide(np.array([[-1.0, -2.0, -3.0]]))
    assert not found.labels.any()
    assert not found.rejected.any()


def test_a_text_whose_best_logit_is_below_the_rejection_logit_is_rejected() -> None:
    logits = np.array([[1.0, 4.0, 1.0], [1.0, 3.0, -9.0], [3.5, 0.0, 0.0]], dtype=np.float32)
    rule = DecisionRule(temperature=0.5, rejection_threshold=3.5)
    assert rule.decide(logits).rejected.tolist() == [False, True, False]
    assert rule.decide(logits).labels.any(axis=1).tolist() == [True, False, True]
    assert not DecisionRule().decide(logits).rejected.any()
    assert rejection_scores(RejectionScore.MAX_LOGIT, logits).tolist() == [4.0, 3.0, 3.5]
