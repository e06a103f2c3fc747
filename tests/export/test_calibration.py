"""Probabilities that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.export.calibration import expected_calibration_error, fit_temperature, softmax


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)), st.floats(0.05, 20))
def test_probabilities_add_up_to_one_whatever_the_logits(logits: np.ndarray, temperature: float) -> None:
    probabilities = softmax(logits, temperature)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 3)) * 2
    labels = np.array([random.choice(3, p=row) for row in softmax(true)])
    assert fit_temperature(true * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    honest = np.tile([0.8, 0.2], (100, 1))
    boastful = np.tile([0.99, 0.01], (100, 1))
    assert expected_calibration_error(honest, labels) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(boastful, labels) == pytest.approx(0.19)


def test_certainty_falls_into_the_last_bin() -> None:
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
