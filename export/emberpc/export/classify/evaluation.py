"""Calibrate a classifier, and measure it, on texts that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from emberpc.bundle import DecisionRule, probabilities, scope_scores
from emberpc.export.classify.calibration import (
    expected_calibration_error,
    fit_rejection,
    fit_temperature,
    fit_thresholds,
    out_of_scope_auroc,
)
from emberpc.export.classify.linear import Matrix
from emberpc.export.data.examples import Rows, Targets


@dataclass(frozen=True)
class HeldOut:
    """Logits of held-out texts, float32 (texts, labels), and the texts' right labels, bool (texts, labels).

    `rows` has the indexes of the texts among the training texts, int (texts,); it is empty for texts of a validation
    file. `unseen` says how the training texts at `rows` were held out. True: the final classifier was not trained on
    them. False: it was, and the logits come from other classifiers, fitted in the same way to other texts. `unseen`
    has no meaning if `rows` is empty.
    """

    logits: Matrix
    targets: Targets
    rows: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    unseen: bool = False

    def __len__(self) -> int:
        return len(self.logits)


def calibrate(
    held_out: HeldOut, *, multi_label: bool = False, outside: Matrix | None = None, rejection_rate: float = 0.01
) -> DecisionRule:
    """Fit a decision rule to held-out texts: temperature, thresholds and rejection threshold.

    Args:
        held_out: logits of texts that the classifier was not trained on; may be empty.
        multi_label: whether a text may have several labels.
        outside: logits of texts without any of the labels, float32 (texts, labels); None if there are no such texts.
        rejection_rate: used if `outside` is None: the share of held-out texts to reject, in [0, 1]; 0: none.

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
    if len(held_out) and (outside is not None or rejection_rate):
        beyond = None if outside is None else scope_scores(outside)
        rejection = fit_rejection(scope_scores(held_out.logits), beyond, rejection_rate)
    return DecisionRule(temperature, thresholds, rejection, multi_label)


def measure(logits: Matrix, targets: Targets, rule: DecisionRule) -> dict[str, float]:
    """Return figures of a classifier on labelled texts, each in [0, 1].

    Args:
        logits: float32 (texts, labels), of at least one text.
        targets: the right labels, bool (texts, labels).
        rule: temperature and thresholds. The rejection threshold of `rule` has no effect on these figures.

    Returns:
        `accuracy` (the share of texts with exactly the right labels), `macro_f1` (over the labels that any text has or
        is given), `micro_f1`, and the expected calibration error of the probabilities with the rule's temperature
        (`ece`) and with temperature 1 (`ece_uncalibrated`).
    """
    from sklearn.metrics import f1_score

    multi_label = rule.multi_label
    decided = rule.labels(logits)
    # Leave out labels that no text has and no text is given: macro F1 would count their F1 as 0.
    seen = targets.any(axis=0) | decided.any(axis=0)
    raw = probabilities(logits, multi_label=multi_label)
    return {
        "accuracy": float((decided == targets).all(axis=1).mean()),
        "macro_f1": float(f1_score(targets[:, seen], decided[:, seen], average="macro", zero_division=0)),
        "micro_f1": float(f1_score(targets, decided, average="micro", zero_division=0)),
        "ece_uncalibrated": expected_calibration_error(raw, targets, multi_label=multi_label),
        "ece": expected_calibration_error(rule.probabilities(logits), targets, multi_label=multi_label),
    }


def measure_scope(inside: Matrix, outside: Matrix, rule: DecisionRule) -> dict[str, float]:
    """Return figures of how well texts outside all labels are separated from texts with labels.

    Args:
        inside: logits of texts with labels, float32 (texts, labels); at least one text.
        outside: logits of texts outside all labels, float32 (texts, labels); at least one text.
        rule: decides which texts are rejected, if it has a rejection threshold.

    Returns:
        `out_of_scope_auroc`: the probability that an inside text has a higher best logit than an outside text. If
        `rule` has a rejection threshold, also the shares of rejected texts: `rejected_in_scope` of the inside texts and
        `rejected_out_of_scope` of the outside texts.
    """
    within, beyond = scope_scores(inside), scope_scores(outside)
    found = {"out_of_scope_auroc": out_of_scope_auroc(within, beyond)}
    if rule.rejection_logit is not None:
        found["rejected_in_scope"] = float(rule.rejected(inside).mean())
        found["rejected_out_of_scope"] = float(rule.rejected(outside).mean())
    return found
