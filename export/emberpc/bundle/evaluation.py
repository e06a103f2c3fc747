"""Calibrate a classifier, and measure it, on texts that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from emberpc.bundle.calibration import (
    expected_calibration_error,
    fit_temperature,
    fit_thresholds,
)
from emberpc.bundle.decision import DecisionRule, Flags, Indexes, probabilities
from emberpc.bundle.rejection import auroc, quantile_threshold
from emberpc.bundle.scope import RejectionScore, rejection_scores

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeldOut:
    """Logits of held-out texts, float32 (texts, labels), and the texts' right labels, bool (texts, labels).

    `rows` has the indexes of the texts among the training texts, int (texts,); it is empty for texts of a validation
    file. `from_final_classifier` says how the training texts at `rows` were held out. True: the logits come from the
    final classifier, which was not trained on the texts. False: it was, and the logits come from other classifiers,
    fitted in the same way to other texts. `from_final_classifier` has no meaning if `rows` is empty.
    """

    logits: Matrix
    targets: Flags
    rows: Indexes = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    from_final_classifier: bool = False

    def __len__(self) -> int:
        return len(self.logits)


def calibrate(held_out: HeldOut, *, multi_label: bool = False, rejection_rate: float = 0.01) -> DecisionRule:
    """Fit a decision rule to held-out texts: temperature, thresholds, and a rejection threshold of the best logit.

    Texts outside all labels are not needed. If there are some, `emberpc.bundle.rejection` fits a better rejection.

    Args:
        held_out: logits of texts that the classifier was not trained on; may be empty.
        multi_label: whether a text may have several labels.
        rejection_rate: the share of held-out texts to reject, in [0, 1]; 0: none.

    Returns:
        The rule. Only a multi-label rule has thresholds. Without held-out texts, the temperature is 1, and the rule has
        neither thresholds nor a rejection threshold.
    """
    temperature = fit_temperature(held_out.logits, held_out.targets, multi_label=multi_label)
    thresholds: tuple[float, ...] = ()
    if multi_label and len(held_out):
        found = probabilities(held_out.logits, temperature, multi_label=True)
        thresholds = fit_thresholds(found, held_out.targets)
    rejection = None
    if len(held_out) and rejection_rate:
        rejection = quantile_threshold(rejection_scores(RejectionScore.MAX_LOGIT, held_out.logits), rejection_rate)
    return DecisionRule(temperature, thresholds, rejection, multi_label)


def measure(logits: Matrix, targets: Flags, rule: DecisionRule) -> dict[str, float]:
    """Return figures of a classifier on labelled texts, each in [0, 1].

    Args:
        logits: float32 (texts, labels), of at least one text.
        targets: the right labels, bool (texts, labels).
        rule: temperature and thresholds. The rejection threshold of `rule` has no effect on these figures.

    Returns:
        The figures of `decision_figures`, and the expected calibration error of the probabilities with the rule's
        temperature (`ece`) and with temperature 1 (`ece_uncalibrated`).
    """
    multi_label = rule.multi_label
    raw = probabilities(logits, multi_label=multi_label)
    return {
        **decision_figures(rule.labels(logits), targets),
        "ece_uncalibrated": expected_calibration_error(raw, targets, multi_label=multi_label),
        "ece": expected_calibration_error(rule.probabilities(logits), targets, multi_label=multi_label),
    }


def decision_figures(decided: Flags, targets: Flags) -> dict[str, float]:
    """Return figures of the labels that texts were given, each in [0, 1].

    Args:
        decided: the labels that each text was given, bool (texts, labels), of at least one text.
        targets: the right labels, bool (texts, labels).

    Returns:
        `accuracy` (the share of texts with exactly the right labels), `macro_f1` (over the labels that any text has or
        is given) and `micro_f1`.
    """
    # Leave out labels that no text has and no text is given: macro F1 would count their F1 as 0.
    seen = targets.any(axis=0) | decided.any(axis=0)
    hits, wanted, given = (flags.sum(axis=0) for flags in (targets & decided, targets, decided))
    return {
        "accuracy": float((decided == targets).all(axis=1).mean()),
        "macro_f1": float(_f1(hits[seen], wanted[seen], given[seen]).mean()) if seen.any() else 0.0,
        "micro_f1": float(_f1(hits.sum(), wanted.sum(), given.sum())),
    }


def _f1(hits: Indexes, wanted: Indexes, given: Indexes) -> npt.NDArray[np.float64]:
    """Return F1 scores, float64 of the shape of the arguments; 0 if no text has or is given the label.

    Args:
        hits: numbers of texts that have a label and are given it.
        wanted: numbers of texts that have the label.
        given: numbers of texts that are given the label.
    """
    return np.asarray(2 * hits / np.maximum(wanted + given, 1))


def measure_scope(inside: Matrix, outside: Matrix, rule: DecisionRule) -> dict[str, float]:
    """Return figures of how well the best logit separates texts outside all labels from texts with labels.

    Args:
        inside: logits of texts with labels, float32 (texts, labels); at least one text.
        outside: logits of texts outside all labels, float32 (texts, labels); at least one text.
        rule: a rule whose rejection score is the best logit.

    Returns:
        `out_of_scope_auroc`: the probability that an inside text has a higher best logit than an outside text. If
        `rule` has a rejection threshold, also the error rates: `false_rejection_rate` (the share of inside texts that
        are rejected) and `false_acceptance_rate` (the share of outside texts that are not).
    """
    within, beyond = (rejection_scores(RejectionScore.MAX_LOGIT, logits) for logits in (inside, outside))
    found = {"out_of_scope_auroc": auroc(within, beyond)}
    if rule.rejection_threshold is not None:
        found["false_rejection_rate"] = float((within < rule.rejection_threshold).mean())
        found["false_acceptance_rate"] = float((beyond >= rule.rejection_threshold).mean())
    return found
