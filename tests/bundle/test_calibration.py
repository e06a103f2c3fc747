"""Calibration: probabilities agree with the share of right answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.bundle import probabilities
from emberpc.bundle.calibration import (
    FEW_TEXTS,
    TEMPERATURES,
    expected_calibration_error,
    fit_temperature,
    fit_thresholds,
    weakness,
)


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)), st.floats(0.05, 20))
def test_probabilities_add_up_to_one_for_all_logits(logits: np.ndarray, temperature: float) -> None:
    found = probabilities(logits, temperature)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_fit_temperature_finds_the_factor_that_scaled_the_logits(temperature: float) -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 3)) * 2
    labels = np.array([random.choice(3, p=row) for row in probabilities(true)])
    assert fit_temperature(true * temperature, np.eye(3, dtype=bool)[labels]) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("texts", [3, 21, 400])
def test_probabilities_stay_below_1_if_all_held_out_texts_are_right(texts: int, multi_label: bool) -> None:
    """The likelihood of texts that are all right has no maximum: it grows as the temperature falls."""
    random = np.random.default_rng(0)
    targets = np.eye(3, dtype=bool)[np.arange(texts) % 3]
    logits = np.where(targets, 3.0, -3.0) + random.normal(size=targets.shape) * 0.1
    found = probabilities(logits, fit_temperature(logits, targets, multi_label=multi_label), multi_label=multi_label)
    right = float(found[targets].mean())
    # Platt's (N + 1) / (N + 2), of the texts or of the decisions of the rarer outcome.
    assert right == pytest.approx((texts + 1) / (texts + 2), abs=0.4 / (texts + 2))
    assert found.max() < 1 - 0.2 / (texts + 2)


@pytest.mark.parametrize("labels", [2, 50])
@pytest.mark.parametrize("texts", [20, 200, 2000])
def test_the_number_of_texts_limits_the_mean_confidence_if_all_are_right(texts: int, labels: int) -> None:
    """The margins of real texts differ: some are far from the boundary between labels, and others are near."""
    random = np.random.default_rng(texts)
    targets = np.eye(labels, dtype=bool)[np.arange(texts) % labels]
    logits = random.normal(size=targets.shape)
    logits[targets] = logits.max(axis=1) + random.exponential(2, texts)
    temperature = fit_temperature(logits, targets)
    low, high = TEMPERATURES
    assert low < temperature < high
    confidence = probabilities(logits, temperature).max(axis=1)
    assert 0.8 < confidence.mean() <= (texts + 1) / (texts + 2)
    # Texts that belong to no label, with logits of the same noise, get a lower confidence.
    noise = random.normal(size=(500, labels))
    assert probabilities(noise, temperature).max(axis=1).mean() < confidence.mean()


@pytest.mark.parametrize("texts", [100, 500, 5000])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_smoothing_does_not_worsen_the_calibration_of_texts_with_errors(texts: int, scale: float) -> None:
    """Compare the error on new texts with that of the temperature without smoothing and of the true temperature."""
    random = np.random.default_rng(texts)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        true = random.normal(size=(count, 5)) * 2
        chosen = (probabilities(true).cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
        return true * scale, np.eye(5, dtype=bool)[chosen]

    logits, targets = drawn(texts)
    new, expected = drawn(20_000)
    grid = np.exp(np.linspace(-3, 3, 601))
    likelihood = [np.log(probabilities(logits, temperature)[targets]).sum() for temperature in grid]
    errors = [
        expected_calibration_error(probabilities(new, temperature), expected)
        for temperature in (fit_temperature(logits, targets), grid[int(np.argmax(likelihood))], scale)
    ]
    assert errors[0] <= errors[1] + 0.01
    assert errors[0] <= errors[2] + 1 / texts**0.5


def test_the_fitted_temperature_is_in_its_range_for_separable_and_inverted_logits() -> None:
    targets = np.eye(2, dtype=bool)[[0, 1, 0, 1]]
    for scale in (1e-6, 1.0, 1e4):
        for multi_label in (False, True):
            for wanted in (targets, ~targets):
                temperature = fit_temperature(np.where(targets, scale, -scale), wanted, multi_label=multi_label)
                assert 0.0499 < temperature < 20.01


def test_an_overconfident_model_has_a_calibration_error_and_a_calibrated_one_has_none() -> None:
    labels = np.eye(2, dtype=bool)[[0] * 80 + [1] * 20]
    honest = np.tile([0.8, 0.2], (100, 1))
    boastful = np.tile([0.99, 0.01], (100, 1))
    assert expected_calibration_error(honest, labels) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(boastful, labels) == pytest.approx(0.19)


def test_the_calibration_error_counts_a_probability_of_1_in_the_last_bin() -> None:
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([[True, False]])) == 0


def test_without_held_out_texts_the_temperature_is_1() -> None:
    assert fit_temperature(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool)) == 1


def test_multi_label_logits_have_a_fitted_temperature_and_calibrated_probabilities() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 3)) * 2
    targets = random.random(true.shape) < probabilities(true, multi_label=True)
    temperature = fit_temperature(true * 3, targets, multi_label=True)
    assert temperature == pytest.approx(3, rel=0.05)
    found = probabilities(true * 3, temperature, multi_label=True)
    assert expected_calibration_error(found, targets, multi_label=True) < 0.01


def test_thresholds_maximize_f1_and_rare_labels_share_a_threshold() -> None:
    found = np.tile(np.linspace(0, 1, 101)[:, None], (1, 2))
    targets = np.stack([found[:, 0] >= 0.3, found[:, 1] >= 0.6], axis=1)
    assert fit_thresholds(found, targets) == pytest.approx((0.295, 0.595), abs=0.006)
    few = np.stack([found[:, 0] >= 0.3, found[:, 1] >= 0.95], axis=1)
    rare = fit_thresholds(found, few)[1]
    assert rare != pytest.approx(0.945, abs=0.006)
    assert 0 < rare < 0.945


def test_a_warning_of_few_held_out_texts_states_the_share_that_may_be_wrong() -> None:
    assert weakness(0) == weakness(FEW_TEXTS) == ""
    assert weakness(5) == "too few texts were held out (5) to estimate how often answers are wrong"
    assert weakness(45) == "even if all answers to 45 held-out texts are right, up to 7 % of all answers may be wrong"
