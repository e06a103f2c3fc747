"""Measure a fitted classifier of a comparison on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emberpc.bundle import DecisionRule
from emberpc.bundle.calibration import reliability
from emberpc.bundle.decision import probabilities
from emberpc.bundle.evaluation import calibrate, measure, measure_scope
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.strategies import Fitted
from emberpc.export.compare.outcomes import ALL, Cell, Decisions, Outcome
from emberpc.export.data.examples import Examples, Rows

#: Quantile, over the texts, of the standardized logit of a text's best label: a label with a greater one is given.
_BEST_LABELS_QUANTILE = 0.25
#: Minimum standard deviation of the logits of a label.
_MIN_DEVIATION = 1e-6


def outcome_of(
    cell: Cell, texts: int, fitted: Fitted, test: Examples, outside: Sequence[str], unlabelled: Sequence[str] = ()
) -> Outcome:
    """Calibrate a fitted classifier on its held-out texts, measure it on the test texts, and return the outcome.

    Args:
        cell: the cell that was fitted.
        texts: number of training texts.
        fitted: the classifier, with the logits of its held-out texts.
        test: the test texts.
        outside: texts outside all labels; may be empty.
        unlabelled: texts that the classifier was not trained on; may be empty. Without held-out texts, the thresholds
            of a multi-label classifier whose logits are cosines come from these texts, without their labels.

    Returns:
        The outcome without the times of the training.
    """
    held_out, multi_label = fitted.held_out, test.multi_label
    rule = calibrate(held_out, multi_label=multi_label)
    if multi_label and fitted.cosines and not len(held_out) and unlabelled:
        rule = replace(rule, thresholds=thresholds_without_labels(fitted.classify(unlabelled)))
    logits = fitted.classify(test.texts)
    figures = {**fitted.figures, "held_out_texts": float(len(held_out))}
    figures |= measure(logits, test.targets, rule)
    if outside:
        figures |= measure_scope(logits, fitted.classify(outside), rule)
    return Outcome(
        cell,
        texts,
        figures,
        _decisions(logits, np.arange(len(logits)), rule),
        _decisions(held_out.logits, held_out.rows, rule) if cell.budget == ALL else Decisions([], [], []),
        reliability(rule.probabilities(logits), test.targets, multi_label=multi_label),
    )


def thresholds_without_labels(logits: Matrix) -> tuple[float, ...]:
    """Return thresholds with which about three quarters of the texts get at least one label, without their labels.

    Cosines of an encoder have another mean and spread for each label and are rarely below 0, so the default threshold
    gives almost every label to almost every text. By this rule, a text gets a label if its logit is above the label's
    mean by enough standard deviations. This number is the lower quartile, over the texts, of the number that a text's
    best label reaches. So it grows with the number of labels. Figures: docs/decisions/measurements/0024.

    Args:
        logits: float32 (texts, labels), of at least one text, by a classifier whose logits are cosines times a factor.
    """
    mean, deviation = logits.mean(axis=0), np.maximum(logits.std(axis=0), _MIN_DEVIATION)
    best = ((logits - mean) / deviation).max(axis=1)
    minimum = mean + np.quantile(best, _BEST_LABELS_QUANTILE) * deviation
    return tuple(float(value) for value in probabilities(minimum[None], multi_label=True)[0])


def _decisions(logits: Matrix, rows: Rows, rule: DecisionRule) -> Decisions:
    decided = rule.labels(logits)
    probable = rule.probabilities(logits)
    confidence = np.where(decided, probable, 1 - probable).min(axis=1) if rule.multi_label else probable.max(axis=1)
    return Decisions(
        [int(row) for row in rows],
        [[int(label) for label in np.flatnonzero(row)] for row in decided],
        [round(float(value), 4) for value in confidence],
    )
