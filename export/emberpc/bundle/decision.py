"""The rule that turns a classifier's logits into probabilities, labels and rejections.

The export measures a classifier by this rule, and the server answers by it, so the figures in the manifest hold for
what is served. All steps are computed in float64: a logit in float32 and the same number in float64 give the same
result, and the comparison with a threshold does not depend on numpy's rules for mixed types (numpy 1 and 2 differ).
Infinite logits count as the largest finite float32. NaN is not handled: a row with NaN has NaN as probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Threshold of each label's probability in a multi-label classifier that has no thresholds of its own.
DEFAULT_THRESHOLD = 0.5
_MAX_LOGIT = float(np.finfo(np.float32).max)

Scores = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]
Indexes = npt.NDArray[np.int64]


def probabilities(logits: Scores, temperature: float = 1.0, *, multi_label: bool = False) -> npt.NDArray[np.float64]:
    """Return calibrated probabilities: softmax, or a sigmoid for each label if multi-label, of logits / temperature.

    Args:
        logits: float (texts, labels).
        temperature: divides the logits; above 0.
        multi_label: whether a text may have several labels.

    Returns:
        float64 (texts, labels), in [0, 1]. Each row adds up to 1 unless multi-label.
    """
    exact = _float64(logits)
    # A tiny temperature makes the quotient infinite, which tanh and exp turn into the right limit.
    with np.errstate(over="ignore"):
        if multi_label:
            # In contrast to exp, tanh does not overflow, whatever the logit.
            return np.asarray(0.5 * (1 + np.tanh(exact / temperature / 2)))
        exponentials = np.exp((exact - exact.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def ranking(logits: Scores) -> Indexes:
    """Return the labels of each text, best first, as indexes (texts, labels); equal logits keep the label order."""
    return np.asarray(np.argsort(-_float64(logits), axis=1, kind="stable"))


def best_labels(logits: Scores) -> Indexes:
    """Return the index of the best label of each text, (texts,); of equal logits, the first label is the best."""
    return np.asarray(_float64(logits).argmax(axis=1))


def scope_scores(logits: Scores) -> npt.NDArray[np.float64]:
    """Return how much each text seems to belong to any label at all: its best logit, float64 (texts,).

    The best logit separates texts of other subjects better than the best probability, which softmax raises wherever
    one label leads (Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022).
    """
    return np.asarray(_float64(logits).max(axis=1))


def _float64(logits: Scores) -> npt.NDArray[np.float64]:
    return np.clip(np.asarray(logits, dtype=np.float64), -_MAX_LOGIT, _MAX_LOGIT)


@dataclass(frozen=True)
class LabelDecisions:
    """Decisions on texts.

    `probabilities` is float64 (texts, labels). `ranking` has the indexes of the labels of each text, best first, int64
    (texts, labels). `labels` is bool (texts, labels) and all false for a rejected text. `rejected` is bool (texts,).
    """

    probabilities: npt.NDArray[np.float64]
    ranking: Indexes
    labels: Flags
    rejected: Flags


@dataclass(frozen=True)
class DecisionRule:
    """How a classifier decides; see the fields of the same names in `emberpc.bundle.Manifest`."""

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    rejection_logit: float | None = None
    multi_label: bool = False

    def probabilities(self, logits: Scores) -> npt.NDArray[np.float64]:
        """Return calibrated probabilities, float64 (texts, labels), of logits of the same shape."""
        return probabilities(logits, self.temperature, multi_label=self.multi_label)

    def label_thresholds(self, labels: int) -> tuple[float, ...]:
        """Return the threshold of each of the labels: those of the rule, or 0.5; empty unless multi-label."""
        if not self.multi_label:
            return ()
        return self.thresholds or (DEFAULT_THRESHOLD,) * labels

    def labels(self, logits: Scores) -> Flags:
        """Return the labels of each text if none is rejected, bool (texts, labels), of logits of the same shape.

        A single-label classifier gives the best label. A multi-label classifier gives each label whose probability is
        at least its threshold, which may be none.
        """
        width = logits.shape[1]
        if self.multi_label:
            return np.asarray(self.probabilities(logits) >= np.array(self.label_thresholds(width), dtype=np.float64))
        return np.asarray(np.arange(width) == best_labels(logits)[:, None])

    def rejected(self, logits: Scores) -> Flags:
        """Return whether each text seems to have none of the labels, bool (texts,): its best logit is too low."""
        if self.rejection_logit is None:
            return np.zeros(len(logits), dtype=bool)
        return np.asarray(scope_scores(logits) < self.rejection_logit)

    def decide(self, logits: Scores) -> LabelDecisions:
        """Return all decisions on texts by their logits, float (texts, labels)."""
        rejected = self.rejected(logits)
        labels = self.labels(logits) & ~rejected[:, None]
        return LabelDecisions(self.probabilities(logits), ranking(logits), labels, rejected)
