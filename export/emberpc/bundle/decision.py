"""The rule that turns a classifier's logits into probabilities, labels and rejections.

The export measures a classifier by this rule, and the server answers by the same rule, so that the figures in the
manifest apply to the server. All steps are computed in float64. So a logit in float32 and the same number in float64
give the same result, and the comparison with a threshold does not depend on numpy's rules for mixed types (numpy 1 and
2 differ). An infinite logit counts as the largest finite float32, with its sign. NaN is not handled: a row of logits
with NaN has only NaN as probabilities, or if multi-label, NaN for the labels with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.bundle.scope import RejectionScore, ScopeVectors, Vectors, float64_logits, rejection_scores

#: Threshold of each label's probability, in a multi-label classifier without thresholds of its own.
DEFAULT_THRESHOLD = 0.5

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
    exact = float64_logits(logits)
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
    return np.asarray(np.argsort(-float64_logits(logits), axis=1, kind="stable"))


def best_labels(logits: Scores) -> Indexes:
    """Return the index of the label with the greatest logit, int64 (texts,); of equal logits, the first label's."""
    return np.asarray(float64_logits(logits).argmax(axis=1))


@dataclass(frozen=True)
class LabelDecisions:
    """Decisions of a `DecisionRule` on texts.

    `probabilities` is float64 (texts, labels), also of a rejected text. `ranking` has the indexes of the labels of each
    text, best first, int64 (texts, labels). `labels` is bool (texts, labels) and all false for a rejected text.
    `rejected` is bool (texts,). `rejection_scores` is float64 (texts,); a text below the rejection threshold is
    rejected. None: no text is.
    """

    probabilities: npt.NDArray[np.float64]
    ranking: Indexes
    labels: Flags
    rejected: Flags
    rejection_scores: npt.NDArray[np.float64] | None


@dataclass(frozen=True)
class DecisionRule:
    """Rule by which a classifier decides on labels.

    `temperature`, above 0, divides the logits before they become probabilities. `multi_label`: whether a text may have
    several labels. `thresholds` has, for each label of a multi-label classifier, the minimum probability from which a
    text has the label; empty: 0.5 for each. Other classifiers ignore `thresholds`. A text whose `rejection_score` is
    below `rejection_threshold` is rejected; None: no text is rejected.
    """

    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()
    rejection_threshold: float | None = None
    multi_label: bool = False
    rejection_score: RejectionScore = RejectionScore.MAX_LOGIT

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

    def rejection_scores(
        self, logits: Scores, vectors: Vectors | None = None, scope: ScopeVectors | None = None
    ) -> npt.NDArray[np.float64] | None:
        """Return the rejection score of each text, float64 (texts,); None if the rule has no rejection threshold.

        Args:
            logits: float (texts, labels).
            vectors: vectors that the classifier's head takes, float32 (texts, dimensions); needed by some scores only.
            scope: stored vectors of the classifier; needed by the same scores.

        Raises:
            ValueError: the score needs `vectors` and `scope`, and one of them is None.
        """
        if self.rejection_threshold is None:
            return None
        return rejection_scores(self.rejection_score, logits, vectors, scope)

    def decide(
        self, logits: Scores, vectors: Vectors | None = None, scope: ScopeVectors | None = None
    ) -> LabelDecisions:
        """Return the decisions on texts; the arguments and errors are those of `rejection_scores`."""
        scores, threshold = self.rejection_scores(logits, vectors, scope), self.rejection_threshold
        rejected = np.zeros(len(logits), dtype=bool)
        if scores is not None and threshold is not None:
            rejected = np.asarray(scores < threshold)
        labels = self.labels(logits) & ~rejected[:, None]
        return LabelDecisions(self.probabilities(logits), ranking(logits), labels, rejected, scores)

    def manifest_fields(self) -> dict[str, Any]:
        """Return the fields of the manifest that store this rule, with the lowest format version that can store it."""
        simple = self.rejection_score is RejectionScore.MAX_LOGIT
        return {
            "temperature": self.temperature,
            "thresholds": self.thresholds,
            "multi_label": self.multi_label,
            "rejection_score": self.rejection_score,
            "rejection_logit": self.rejection_threshold if simple else None,
            "rejection_threshold": None if simple else self.rejection_threshold,
            "format_version": 1 if simple else 2,
        }
