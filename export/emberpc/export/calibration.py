"""Calibration: probabilities that mean what they say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BINS = 15
Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]


def softmax(logits: Scores, temperature: float = 1.0) -> Scores:
    """Turn logits (texts, labels) into probabilities of the same shape."""
    scaled = logits / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def fit_temperature(logits: Scores, labels: Labels) -> float:
    """Return the temperature under which the labels are likeliest (Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017), found by golden-section search over its logarithm in [-3, 3].

    Args:
        logits: float (texts, labels), of texts that the model was not fitted to.
        labels: int (texts,), the right label of each.
    """

    def loss(log_temperature: float) -> float:
        chosen = softmax(logits, float(np.exp(log_temperature)))[np.arange(len(labels)), labels]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    low, high, ratio = -3.0, 3.0, (5**0.5 - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def expected_calibration_error(probabilities: Scores, labels: Labels) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal bins of confidence, weighted by their size."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[bins == i].mean() - right[bins == i].mean()) * (bins == i).sum()
        for i in range(_BINS)
        if (bins == i).any()
    ]
    return float(sum(gaps) / len(labels))
