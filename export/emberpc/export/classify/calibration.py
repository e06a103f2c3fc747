"""Calibration: fit the temperature, so that probabilities agree with the share of right answers, and the thresholds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emberpc.bundle import best_labels
from emberpc.bundle.decision import DEFAULT_THRESHOLD
from emberpc.export.data.examples import Targets

_BINS = 15
#: Least held-out texts of a label that gets its own threshold; the other labels share a threshold.
_OWN_THRESHOLD_TEXTS = 20
#: Fewer held-out texts say little of how often a confident answer is wrong: if all of N are right, the share of errors
#: is below 3 / N with 95 % confidence (Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?",
#: JAMA 1983).
FEW_TEXTS = 100
Scores = npt.NDArray[np.floating]


def fit_temperature(logits: Scores, targets: Targets, *, multi_label: bool = False) -> float:
    """Return the temperature under which the labels are likeliest (Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017), found by golden-section search over its logarithm in [-4, 4].

    The labels count as slightly uncertain (Platt, "Probabilistic Outputs for Support Vector Machines", 1999): a label
    that is right in each of N texts has a probability of (N + 1) / (N + 2). Where all texts are right, as few and easy
    ones are, labels that count as certain would have no likeliest temperature: the lower, the likelier.

    Args:
        logits: float (texts, labels), of texts that the model was not fitted to; 1 is returned where there are none.
        targets: bool (texts, labels).
        multi_label: whether labels do not exclude each other.
    """
    if not len(logits):
        return 1.0

    wanted = _smoothed(targets, multi_label=multi_label)
    centred = np.asarray(logits, dtype=np.float64)
    if not multi_label:
        centred = centred - centred.max(axis=1, keepdims=True)

    def loss(log_temperature: float) -> float:
        scaled = centred / np.exp(log_temperature)
        whole = np.logaddexp(0, scaled) if multi_label else np.log(np.exp(scaled).sum(axis=1))
        return float((whole.sum() - (wanted * scaled).sum()) / len(logits))

    low, high, ratio = -4.0, 4.0, (5**0.5 - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def _smoothed(targets: Targets, *, multi_label: bool) -> Scores:
    """Return Platt's probabilities instead of certain labels, (texts, labels); those of one text add up to 1.

    One temperature serves all labels, so all texts count together; if multi-label, all decisions of the same outcome.
    """
    if multi_label:
        yes, no = targets.sum(), (~targets).sum()
        return np.asarray(np.where(targets, (yes + 1) / (yes + 2), 1 / (no + 2)))
    texts, labels = targets.shape
    wrong = 1 / (texts + 2)
    return np.asarray(np.where(targets, 1 - wrong, wrong / max(1, labels - 1)))


def weakness(held_out: int) -> str:
    """Return what few held-out texts cannot show, in words; empty if they are not few."""
    if not 0 < held_out < FEW_TEXTS:
        return ""
    return f"{held_out} held-out texts cannot show whether errors are rarer than one in {max(1, held_out // 3)}"


def reliability(found: Scores, targets: Targets, *, multi_label: bool = False) -> list[tuple[float, float, int]]:
    """Sort decisions into 15 equal bins of confidence.

    A decision is a text's best label; if multi-label, each label of each text.

    Returns:
        For each bin that is not empty: the mean confidence, the share that is right, and how many there are.
    """
    if multi_label:
        confidence, right = found.ravel(), targets.ravel()
    else:
        confidence, right = found.max(axis=1), targets[np.arange(len(found)), best_labels(found)]
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    return [
        (float(confidence[bins == i].mean()), float(right[bins == i].mean()), int((bins == i).sum()))
        for i in range(_BINS)
        if (bins == i).any()
    ]


def expected_calibration_error(found: Scores, targets: Targets, *, multi_label: bool = False) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal bins of confidence, weighted by their size."""
    bins = reliability(found, targets, multi_label=multi_label)
    return sum(abs(confidence - right) * count for confidence, right, count in bins) / sum(bin_[2] for bin_ in bins)


def fit_thresholds(found: Scores, targets: Targets) -> tuple[float, ...]:
    """Return the threshold of each label of a multi-label classifier: the probability with the best F1.

    Labels with fewer than 20 texts share one threshold, which is fitted to all of these labels together.

    Args:
        found: probabilities (texts, labels), of texts that the model was not fitted to.
        targets: bool (texts, labels).
    """
    if not targets.any():
        return (DEFAULT_THRESHOLD,) * len(targets.T)
    shared = _best_f1(found.ravel(), targets.ravel())
    own = targets.sum(axis=0) >= _OWN_THRESHOLD_TEXTS
    every = range(targets.shape[1])
    return tuple([_best_f1(found[:, i], targets[:, i]) if own[i] else shared for i in every])


def _best_f1(scores: Scores, wanted: npt.NDArray[np.bool_]) -> float:
    """Return the threshold midway between the two scores where the F1 is best to cut."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(wanted[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + wanted.sum())
    # Only between different scores can be cut.
    ranked = scores[order]
    f1[:-1][ranked[:-1] == ranked[1:]] = -1
    cut = int(f1.argmax())
    below = ranked[cut + 1] if cut + 1 < len(ranked) else 0.0
    return float((ranked[cut] + below) / 2)


def out_of_scope_auroc(inside: Scores, outside: Scores) -> float:
    """Return the AUROC: the probability that an inside text has a higher scope score than an outside text.

    Args:
        inside: scope scores of texts that have a label, shape (texts,).
        outside: scope scores of texts that have none of the labels, shape (texts,).
    """
    from sklearn.metrics import roc_auc_score

    known = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    return float(roc_auc_score(known, np.concatenate([inside, outside])))


def fit_rejection(inside: Scores, outside: Scores | None, rate: float) -> float | None:
    """Return the rejection threshold: the scope score below which a text is rejected; None if `inside` is empty.

    With outside texts, the threshold maximizes the share of inside texts that are kept plus the share of outside texts
    that are rejected (Youden's J). Without them, it is the quantile `rate` of the inside scores.

    Args:
        inside: scope scores of held-out texts that have a label, shape (texts,).
        outside: scope scores of texts that have none of the labels, shape (texts,); None or empty if there are none.
        rate: the share of inside texts to reject if there are no outside texts, 0 to 1.
    """
    if not len(inside):
        return None
    if outside is None or not len(outside):
        return float(np.quantile(inside, rate))
    scores = np.sort(np.concatenate([inside, outside]))
    cuts = np.unique((scores[:-1] + scores[1:]) / 2) if len(scores) > 1 else scores
    kept = 1 - np.searchsorted(np.sort(inside), cuts) / len(inside)
    refused = np.searchsorted(np.sort(outside), cuts) / len(outside)
    return float(cuts[(kept + refused).argmax()])
