"""The rule that turns a classifier's logits into probabilities, labels and rejections.

The export measures a classifier by this rule, and the server answers by the same rule, so that the figures in the
manifest apply to the server. All steps are computed in float64. So a logit in float32 and the same number in float64
give the same result, and the comparison with a threshold does not depend on numpy's rules for mixed types (numpy 1 and
2 differ). An infinite logit counts as the largest finite float32, with its sign. NaN is not handled: a row of logits
with NaN has only NaN as probabilities, or if multi-label, NaN for the labels with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Threshold of each label's probability, in a multi-label classifier without thresholds of its own.
DEFAULT_THRESHOLD = 0.5
_MAX_LOGIT = float(np.finfo(np.float32).max)

Scores = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]
Indexes = npt.NDArray[np.int64]


def probabilities(logits: Scores, temperature: float = 1.0, *, multi_label: bool = False) -> npt.NDArray[np.float64]:
    """Return probabilities: softmax, or a sigmoid for each label if multi-label, of logits / temperature.

    Args:
        logits: float (texts, labels).
        temperature: number above 0 that divides the logits. With a fitted one, the probabilities are calibrated.
        multi_label: whether a text may have several labels.

    Returns:
        float64 (texts, labels), in [0, 1]. Unless multi-label, each row adds up to 1 but for rounding.
    """
    exact = _float64(logits)
    # With a tiny temperature the quotient overflows to infinity. That needs no warning, since tanh and exp then give
    # their limits, which are the right results.
    with np.errstate(over="ignore"):
        if multi_label:
            # This is the sigmoid. It uses tanh and not exp, since exp overflows for large values.
            return np.asarray(0.5 * (1 + np.tanh(exact / temperature / 2)))
        exponentials = np.exp((exact - exact.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def ranking(logits: Scores) -> Indexes:
    """Return the indexes of the labels by falling logit, int64 (texts, labels); equal logits keep the label order."""
    return np.asarray(np.argsort(-_float64(logits), axis=1, kind="stable"))


def best_labels(logits: Scores) -> Indexes:
    """Return the index of the label with the greatest logit, int64 (texts,); of equal logits, the first label's."""
    return np.asarray(_float64(logits).argmax(axis=1))


def scope_scores(logits: Scores) -> npt.NDArray[np.float64]:
    """Return the best logit of each text, float64 (texts,): the greater, the more likely the text has any label.

    The best logit separates texts with none of the labels better than the best probability does: softmax gives a high
    probability to any label that is clearly ahead of the others, even if all logits are low (Hendrycks et al., "Scaling
    Out-of-Distribution Detection for Real-World Settings", ICML 2022).
    """
    return np.asarray(_float64(logits).max(axis=1))


def _float64(logits: Scores) -> npt.NDArray[np.float64]:
    return np.clip(np.asarray(logits, dtype=np.float64), -_MAX_LOGIT, _MAX_LOGIT)


@dataclass(frozen=True)
class LabelDecisions:
    """Decisions of a `DecisionRule` on texts.

    `probabilities` is float64 (texts, labels), also of a rejected text. `ranking` has the indexes of the labels of each
    text, best first, int64 (texts, labels). `labels` is bool (texts, labels) and all false for a rejected text.
    `rejected` is bool (texts,).
    """

    probabilities: npt.NDArray[np.float64]
    ranking: Indexes
    labels: Flags
    rejected: Flags


@dataclass(frozen=True)
class DecisionRule:
    """Rule by which a classifier decides on labels.

    `temperature`, above 0, divides the logits before they become probabilities. `multi_label`: whether a text may have
    several labels. `thresholds` has, for each label of a multi-label classifier, the least probability from which a
    text has the label; empty: 0.5 for each. Other classifiers ignore `thresholds`. A text whose best logit, not divided
    by the temperature, is below `rejection_logit` is rejected; None: no text is rejected.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    rejection_logit: float | None = None
    multi_label: bool = False

    def probabilities(self, logits: Scores) -> npt.NDArray[np.float64]:
        """Return the probabilities, float64 (texts, labels), of logits, float (texts, labels).

        They are those of the function `probabilities` with the temperature and `multi_label` of this rule.
        """
        return probabilities(logits, self.temperature, multi_label=self.multi_label)

    def label_thresholds(self, labels: int) -> tuple[float, ...]:
        """Return the threshold of each label of a multi-label rule, or () if the rule is not multi-label.

        A rule without thresholds has 0.5 for each label; `labels` is then their number.
        """
        if not self.multi_label:
            return ()
        return self.thresholds or (DEFAULT_THRESHOLD,) * labels

    def labels(self, logits: Scores) -> Flags:
        """Return whether each text gets each label, bool (texts, labels), without regard to rejection.

        A single-label classifier gives a text its best label. A multi-label classifier gives a text each label whose
        probability is at least the label's threshold, so a text may get no label. `logits` are float (texts, labels).
        """
        width = logits.shape[1]
        if self.multi_label:
            return np.asarray(self.probabilities(logits) >= np.array(self.label_thresholds(width), dtype=np.float64))
        return np.asarray(np.arange(width) == best_labels(logits)[:, None])

    def rejected(self, logits: Scores) -> Flags:
        """Return whether each text is rejected, bool (texts,): its best logit is below `rejection_logit`.

        All are False if `rejection_logit` is None. `logits` are float (texts, labels).
        """
        if self.rejection_logit is None:
            return np.zeros(len(logits), dtype=bool)
        return np.asarray(scope_scores(logits) < self.rejection_logit)

    def decide(self, logits: Scores) -> LabelDecisions:
        """Return all decisions on texts, given their logits, float (texts, labels). A rejected text gets no label."""
        rejected = self.rejected(logits)
        labels = self.labels(logits) & ~rejected[:, None]
        return LabelDecisions(self.probabilities(logits), ranking(logits), labels, rejected)
