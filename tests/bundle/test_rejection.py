"""Rejection scores, the vectors that they store, and the choice of score and threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.bundle import BundleError, DecisionRule, RejectionScore, ScopeVectors, rejection_scores, unit
from emberpc.bundle.prototypes import MAX_PROTOTYPES, can_store, class_means, make_scope
from emberpc.bundle.rejection import auroc, capped_threshold, fit_rejection
from emberpc.bundle.scope import SCOPE_NAME

SCORES = arrays(np.float64, st.integers(1, 60), elements=st.integers(-8, 8).map(float))


def vectors_of(texts: int, dimensions: int = 6, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(texts, dimensions)).astype(np.float32))


def test_rejection_scores_follow_their_definitions() -> None:
    logits = np.array([[1.0, 3.0], [-4.0, -2.0]], dtype=np.float32)
    vectors = np.array([[3.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    scope = ScopeVectors(np.array([[1.0, 0.0], [0.0, -1.0]], dtype=np.float32))
    assert rejection_scores(RejectionScore.MAX_LOGIT, logits).tolist() == [3, -2]
    energy = rejection_scores(RejectionScore.ENERGY, logits)
    np.testing.assert_allclose(energy, np.log(np.exp(logits.astype(float)).sum(axis=1)))
    for name in (RejectionScore.CLASS_COSINE, RejectionScore.NEAREST_PROTOTYPE):
        np.testing.assert_allclose(rejection_scores(name, logits, vectors, scope), [1, 0.5**0.5], rtol=1e-6)
        with pytest.raises(ValueError, match=f"{name.value} needs vectors"):
            rejection_scores(name, logits)


@pytest.mark.parametrize("name", RejectionScore)
def test_rejection_scores_are_finite_for_all_logits_and_vectors(name: RejectionScore) -> None:
    logits = np.array([[np.inf, -np.inf], [3e38, 3e38], [0.0, 0.0]], dtype=np.float32)
    vectors = np.array([[0.0, 0.0], [1e-20, 0.0], [1e18, 1e18]], dtype=np.float32)
    found = rejection_scores(name, logits, vectors, ScopeVectors(np.eye(2, dtype=np.float32)))
    assert np.isfinite(found).all()
    assert len(rejection_scores(name, logits[:0], vectors[:0], ScopeVectors(np.eye(2, dtype=np.float32)))) == 0


def test_a_text_below_the_threshold_of_any_score_is_rejected() -> None:
    logits = np.zeros((300, 2), dtype=np.float32)
    vectors = vectors_of(300, 2)
    scope = ScopeVectors(np.array([[1.0, 0.0]], dtype=np.float32))
    rule = DecisionRule(rejection_threshold=0.25, rejection_score=RejectionScore.CLASS_COSINE)
    found = rule.decide(logits, vectors, scope)
    assert found.rejection_scores is not None
    np.testing.assert_allclose(found.rejection_scores, vectors[:, 0], rtol=1e-6)
    assert np.array_equal(found.rejected, vectors[:, 0] < 0.25)
    assert not found.labels[found.rejected].any()
    assert DecisionRule().decide(logits).rejection_scores is None


def test_class_means_are_unit_vectors_and_a_label_without_texts_has_none() -> None:
    vectors, targets = vectors_of(20), np.zeros((20, 3), dtype=bool)
    targets[:12, 0] = targets[8:, 2] = True
    means = class_means(5 * vectors, targets)
    np.testing.assert_allclose(means[0], unit(vectors[:12].mean(axis=0, keepdims=True))[0], rtol=1e-5)
    assert not means[1].any()
    scope = make_scope(RejectionScore.CLASS_COSINE, vectors, targets)
    assert scope is not None
    np.testing.assert_allclose(scope.vectors, means[[0, 2]], rtol=1e-5)
    assert make_scope(RejectionScore.ENERGY, vectors, targets) is None


@pytest.mark.parametrize("texts", [1, 2, 3, 5, 9, 40, 300])
def test_no_prototype_equals_the_vector_of_one_text(texts: int) -> None:
    """This also holds for a text that is given several times or is far from all others."""
    vectors = vectors_of(texts)
    vectors[0] = -np.abs(vectors[0])
    repeated = np.concatenate([vectors, vectors[: texts // 2]])
    targets = np.ones((len(repeated), 2), dtype=bool)
    scope = make_scope(RejectionScore.NEAREST_PROTOTYPE, repeated, targets)
    assert scope is not None
    np.testing.assert_allclose(np.linalg.norm(scope.vectors, axis=1), 1, rtol=1e-5)
    assert len(scope.vectors) <= 2 * min(MAX_PROTOTYPES, max(1, texts // 2))
    cosines = unit(vectors) @ scope.vectors.T
    assert (cosines.max() > 1 - 1e-6) == (texts == 1)
    again = make_scope(RejectionScore.NEAREST_PROTOTYPE, repeated, targets)
    assert again is not None
    assert np.array_equal(again.vectors, scope.vectors)


def test_prototypes_find_the_groups_of_a_label() -> None:
    random = np.random.default_rng(0)
    centres = np.repeat(np.eye(16, dtype=np.float32)[:5], 30, axis=0)
    vectors = unit(centres + 0.05 * random.normal(size=centres.shape).astype(np.float32))
    scope = make_scope(RejectionScore.NEAREST_PROTOTYPE, vectors, np.ones((150, 1), dtype=bool))
    assert scope is not None
    assert scope.nearest_cosines(np.eye(16, dtype=np.float32)[:5]).min() > 0.98
    assert scope.nearest_cosines(np.eye(16, dtype=np.float32)[5:]).max() < 0.3
    assert scope.nearest_cosines(np.zeros((1, 16), dtype=np.float32)).tolist() == [0]


def test_vectors_without_a_direction_have_no_prototype() -> None:
    targets = np.ones((2, 1), dtype=bool)
    for vectors in (np.zeros((2, 3)), np.array([[1.0, 0, 0], [-1, 0, 0]])):
        scope = make_scope(RejectionScore.NEAREST_PROTOTYPE, vectors.astype(np.float32), targets)
        assert scope is not None
        assert scope.vectors.shape == (0, 3)
        assert scope.nearest_cosines(vectors_of(2, 3)).tolist() == [-1, -1]


def test_the_count_of_stored_numbers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberpc.bundle.prototypes.MAX_SCOPE_NUMBERS", 4000)
    dimensions = 100
    vectors, targets = vectors_of(80, dimensions), np.eye(20, dtype=bool)[np.arange(80) % 20]
    scope = make_scope(RejectionScore.NEAREST_PROTOTYPE, vectors, targets)
    assert scope is not None
    assert scope.vectors.size <= 4000
    assert can_store(RejectionScore.CLASS_COSINE, 40, dimensions)
    assert not can_store(RejectionScore.CLASS_COSINE, 41, dimensions)
    assert can_store(RejectionScore.ENERGY, 30_000, dimensions)


def test_stored_vectors_are_read_as_they_were_written(tmp_path: Path) -> None:
    ScopeVectors(vectors_of(5)).write(tmp_path)
    assert np.array_equal(ScopeVectors.read(tmp_path, 6).vectors, vectors_of(5))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 3)), "cannot be read"),
        (np.array(["a"]), "cannot be read"),
        (np.eye(3, dtype=np.float32)[0], "has the shape"),
        (np.eye(3, dtype=np.float32)[:0], "has the shape"),
        (np.eye(4, dtype=np.float32), "has the shape"),
        (2 * np.eye(3, dtype=np.float32), "length is not 1"),
        (np.array([[1, 0, 0], [0, 0, 0]], dtype=np.float32), "length is not 1"),
        (np.array([[np.nan, 0, 0]], dtype=np.float32), "length is not 1"),
        (np.array([[np.inf, 0, 0]], dtype=np.float32), "length is not 1"),
        (np.array([[3e38, 3e38, 0]], dtype=np.float32), "length is not 1"),
        (np.tile(np.eye(3, dtype=np.float32), (60_000, 1)), "numbers|unpacks"),
    ],
)
def test_stored_vectors_that_cannot_be_used_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.savez(tmp_path / SCOPE_NAME, vectors=array)
    with pytest.raises(BundleError, match=words):
        ScopeVectors.read(tmp_path, 3)


def test_missing_or_damaged_stored_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"scope\.npz cannot be read"):
        ScopeVectors.read(tmp_path, 3)
    np.savez(tmp_path / SCOPE_NAME, other=np.eye(3, dtype=np.float32))
    with pytest.raises(BundleError, match=r"scope\.npz cannot be read"):
        ScopeVectors.read(tmp_path, 3)
    (tmp_path / SCOPE_NAME).write_bytes(b"PK")
    with pytest.raises(BundleError, match=r"scope\.npz cannot be read"):
        ScopeVectors.read(tmp_path, 3)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.05, 0.1, 0.5]))
def test_a_threshold_keeps_its_cap_and_rejects_the_most_out_of_scope_texts(
    inside: np.ndarray, outside: np.ndarray, maximum: float
) -> None:
    threshold = capped_threshold(inside, outside, maximum)
    allowed = max(0, int(maximum * (len(inside) + 1) + 1e-9) - 1)
    assert (inside < threshold).sum() <= allowed
    rejected = (outside < threshold).sum()
    for cut in np.unique(np.concatenate([inside, outside, [np.inf]])):
        if (inside < cut).sum() <= allowed:
            assert (outside < cut).sum() <= rejected
    if not rejected:
        assert not (inside < threshold).any()


def test_the_threshold_is_in_the_middle_of_a_gap_between_scores() -> None:
    inside, outside = np.array([5.0, 6, 7, 8]), np.array([1.0, 2, 3, 5.5])
    assert auroc(inside, outside) == pytest.approx(15 / 16)
    assert capped_threshold(inside, outside, 0.05) == pytest.approx(4)
    assert capped_threshold(inside, outside, 0.5) == pytest.approx(5.75)


def test_new_texts_are_rejected_no_more_often_than_the_cap() -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        threshold = capped_threshold(random.normal(size=60), random.normal(size=60), 0.1)
        shares.append((random.normal(size=500) < threshold).mean())
    assert 0.06 < np.mean(shares) <= 0.1


def test_the_best_score_is_chosen_on_one_half_and_measured_on_the_other() -> None:
    random = np.random.default_rng(0)
    better, worse = RejectionScore.NEAREST_PROTOTYPE, RejectionScore.MAX_LOGIT
    inside = {worse: random.normal(0.5, 1, 400), better: random.normal(2, 1, 400)}
    outside = {name: random.normal(0, 1, 300) for name in inside}
    found = fit_rejection(inside, outside, 0.05)
    assert (found.score, found.separate_texts) == (better, True)
    assert found.figures["rejection_texts"] == 200
    assert found.figures["rejection_out_of_scope_texts"] == 150
    assert found.figures["false_rejection_rate"] == pytest.approx(0.05, abs=0.04)
    assert found.figures["false_acceptance_rate"] == pytest.approx(0.36, abs=0.1)
    assert found.figures["out_of_scope_auroc"] == found.figures["auroc_nearest_prototype"] > 0.85
    assert found.figures["auroc_max_logit"] < 0.75
    # A higher cap rejects more of both kinds.
    loose = fit_rejection(inside, outside, 0.2)
    assert loose.threshold > found.threshold
    assert loose.figures["false_acceptance_rate"] < found.figures["false_acceptance_rate"]
    # Figures that chance alone makes good on one half are not good on the other.
    noise = {name: random.normal(size=40) for name in RejectionScore}
    measured = [
        fit_rejection(noise, {name: random.normal(size=40) for name in noise}, seed=seed).figures["out_of_scope_auroc"]
        for seed in range(100)
    ]
    assert np.mean(measured) == pytest.approx(0.5, abs=0.03)


def test_few_texts_are_used_both_to_choose_and_to_measure_a_score() -> None:
    random = np.random.default_rng(0)
    inside = {RejectionScore.MAX_LOGIT: random.normal(3, 1, 100)}
    found = fit_rejection(inside, {RejectionScore.MAX_LOGIT: random.normal(size=39)})
    assert not found.separate_texts
    assert (found.figures["rejection_texts"], found.figures["rejection_out_of_scope_texts"]) == (100, 39)
    single = fit_rejection({RejectionScore.MAX_LOGIT: np.ones(1)}, {RejectionScore.MAX_LOGIT: np.zeros(1)})
    assert (single.threshold, single.figures["false_rejection_rate"]) == (0.5, 0)


def test_the_simplest_of_equally_good_scores_is_chosen() -> None:
    scores = {name: np.arange(50.0) for name in reversed(RejectionScore)}
    assert fit_rejection(scores, scores).score is RejectionScore.MAX_LOGIT
