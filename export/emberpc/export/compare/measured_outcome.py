"""Measure a fitted classifier of a comparison on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emberpc.bundle import DecisionRule
from emberpc.bundle.calibration import reliability
from emberpc.bundle.evaluation import calibrate, measure, measure_scope
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.strategies import Fitted
from emberpc.export.compare.outcomes import ALL, Cell, Decisions, Outcome
from emberpc.export.data.examples import Examples, Rows


def outcome_of(cell: Cell, texts: int, fitted: Fitted, test: Examples, outside: Sequence[str]) -> Outcome:
    """Calibrate a fitted classifier on its held-out texts, measure it on the test texts, and return the outcome.

    Args:
        cell: the cell that was fitted.
        texts: number of training texts.
        fitted: the classifier, with the logits of its held-out texts.
        test: the test texts.
        outside: texts outside all labels; may be empty.

    Returns:
        The outcome without the times of the training.
    """
    held_out, multi_label = fitted.held_out, test.multi_label
    rule = calibrate(held_out, multi_label=multi_label)
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


def _decisions(logits: Matrix, rows: Rows, rule: DecisionRule) -> Decisions:
    decided = rule.labels(logits)
    probable = rule.probabilities(logits)
    confidence = np.where(decided, probable, 1 - probable).min(axis=1) if rule.multi_label else probable.max(axis=1)
    return Decisions(
        [int(row) for row in rows],
        [[int(label) for label in np.flatnonzero(row)] for row in decided],
        [round(float(value), 4) for value in confidence],
    )
