"""Fit the temperature and the thresholds of a classifier, and measure its calibration."""

from __future__ import annotations

from math import ceil

import numpy as np

from emberpc.bundle.decision import DEFAULT_THRESHOLD, Flags, Scores, best_labels

_BINS = 15
#: Bounds of a fitted temperature. Some strategies use 10 times a cosine as logit, and some encoders give any two texts
#: a cosine from 0.7 to 0.9. Then a logit that is 0.3 ahead is clearly ahead; a temperature of 0.05 makes it 6 ahead.
TEMPERATURES = (0.05, 20.0)
#: Minimum number of held-out texts of a label that gets a threshold of its own. All labels with fewer texts share one
#: threshold, since a threshold fitted to few texts is mostly chance.
_OWN_THRESHOLD_TEXTS = 20
#: Minimum number of held-out texts of a calibration without a warning. Fewer texts say little about how often a
#: confident answer is wrong: if all answers to N texts are right, the share of errors is below 3 / N with 95 %
#: confidence (Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?", JAMA 1983).
FEW_TEXTS = 100
#: With fewer held-out texts, even the bound on the share of errors says little: it is above 30 %.
_HARDLY_ANY = 10


def fit_temperature(logits: Scores, targets: Flags, *, multi_label: bool = False) -> float:
    """Return the temperature that makes the right labels most probable.

    This follows Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. A golden-section search over the
    logarithm of the temperature finds it within the bounds `TEMPERATURES`.

    The right labels count as slightly uncertain (Platt, "Probabilistic Outputs for Support Vector Machines", 1999):
    with N texts, the right label of each has the target probability (N + 1) / (N + 2). If right labels counted as
    certain, there would be no best temperature for logits that are right in all texts, which is common with few and
    easy texts: a lower temperature would always be better. With N texts that are all right, the mean probability of
    their right labels is at most (N + 1) / (N + 2).

    Args:
        logits: float (texts, labels), of texts that the model was not fitted to.
        targets: the right labels, bool (texts, labels).
        multi_label: whether a text may have several labels.

    Returns:
        The temperature, from 0.05 to 20; 1.0 if there are no texts.
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

    (low, high), ratio = np.log(TEMPERATURES), (5**0.5 - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def _smoothed(targets: Flags, *, multi_label: bool) -> Scores:
    """Return target probabilities in place of certain labels, float64 (texts, labels), by Platt's rule.

    Single-label, with N texts: a text's right label gets (N + 1) / (N + 2), and its other labels share the rest.
    Multi-label, where P entries of `targets` are true and Q are false: a true entry gets (P + 1) / (P + 2), and a false
    one 1 / (Q + 2). The counts are over all labels together, since one temperature serves all labels.
    """
    if multi_label:
        yes, no = targets.sum(), (~targets).sum()
        return np.asarray(np.where(targets, (yes + 1) / (yes + 2), 1 / (no + 2)))
    texts, labels = targets.shape
    wrong = 1 / (texts + 2)
    return np.asarray(np.where(targets, 1 - wrong, wrong / max(1, labels - 1)))


def weakness(held_out: int) -> str:
    """Return a clause for a warning that there are few held-out texts.

    Args:
        held_out: number of held-out texts.

    Returns:
        The clause, such as `even if all answers to 30 held-out texts are right, up to 10 % of all answers may be
        wrong`; empty if there are no held-out texts, or at least `FEW_TEXTS`.
    """
    if not 0 < held_out < FEW_TEXTS:
        return ""
    if held_out < _HARDLY_ANY:
        return f"too few texts were held out ({held_out}) to estimate how often answers are wrong"
    share = ceil(100 * 3 / held_out)
    return f"even if all answers to {held_out} held-out texts are right, up to {share} % of all answers may be wrong"


def reliability(found: Scores, targets: Flags, *, multi_label: bool = False) -> list[tuple[float, float, int]]:
    """Sort decisions into 15 equal bins of confidence.

    A decision is a text's best label; if multi-label, each label of each text. Its confidence is the label's
    probability.

    Args:
        found: probabilities, float (texts, labels).
        targets: the right labels, bool (texts, labels).
        multi_label: whether a text may have several labels.

    Returns:
        For each bin that is not empty, from the lowest confidence to the highest: the mean confidence of its decisions,
        the share of them whose label the text has, and the number of them.
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


def expected_calibration_error(found: Scores, targets: Flags, *, multi_label: bool = False) -> float:
    """Return the expected calibration error (ECE) on at least one text, in [0, 1].

    This error is the mean gap between confidence and accuracy over 15 equal bins of confidence, each bin weighted by
    its number of decisions. A decision is a text's best label; if multi-label, each label of each text.

    Args:
        found: probabilities, float (texts, labels).
        targets: the right labels, bool (texts, labels).
        multi_label: whether a text may have several labels.
    """
    bins = reliability(found, targets, multi_label=multi_label)
    return sum(abs(confidence - right) * count for confidence, right, count in bins) / sum(bin_[2] for bin_ in bins)


def fit_thresholds(found: Scores, targets: Flags) -> tuple[float, ...]:
    """Return the threshold of each label of a multi-label classifier: the probability with the best F1.

    Labels with fewer than 20 texts share one threshold, which is fitted to the decisions on all labels together.

    Args:
        found: probabilities, float (texts, labels), of texts that the model was not fitted to.
        targets: the right labels, bool (texts, labels).

    Returns:
        A threshold for each label, in their order; 0.5 for all of them if no text has a label.
    """
    if not targets.any():
        return (DEFAULT_THRESHOLD,) * len(targets.T)
    shared = _best_f1(found.ravel(), targets.ravel())
    own = targets.sum(axis=0) >= _OWN_THRESHOLD_TEXTS
    every = range(targets.shape[1])
    return tuple([_best_f1(found[:, i], targets[:, i]) if own[i] else shared for i in every])


def _best_f1(scores: Scores, wanted: Flags) -> float:
    """Return the threshold with the best F1: the middle between two adjacent scores.

    If the F1 is best when all scores are above the threshold, it is half of the lowest score. `scores` is float
    (decisions,), and `wanted` says whether each decision should be above the threshold, bool (decisions,).
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(wanted[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + wanted.sum())
    # A threshold cannot separate equal scores, so the positions between them are ruled out.
    ranked = scores[order]
    f1[:-1][ranked[:-1] == ranked[1:]] = -1
    cut = int(f1.argmax())
    below = ranked[cut + 1] if cut + 1 < len(ranked) else 0.0
    return float((ranked[cut] + below) / 2)
