"""Precision, recall and F1 of each label on the test texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emberpc.export.compare.outcomes import Outcome
from emberpc.export.compare.uncertainty import decided_labels
from emberpc.export.data.examples import Examples


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one label on the test texts, as means over the seeds.

    `precision` is the share, in [0, 1], of the texts given the label that have it; it is 0 if no text was given it.
    `recall` is the share of the texts with the label that were given it, and `f1` the harmonic mean of both. `texts` is
    the number of test texts with the label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    texts: int


def class_figures(test: Examples, outcomes: Sequence[Outcome]) -> list[ClassFigures]:
    """Return the figures of the labels that any test text has, the lowest F1 first.

    Args:
        test: the test texts.
        outcomes: outcomes of one strategy at one budget, one for each seed.
    """
    found = np.zeros((3, len(test.labels)))
    for outcome in outcomes:
        decided = decided_labels(outcome.test, test.targets.shape)
        both = (decided & test.targets).sum(axis=0)
        given, own = decided.sum(axis=0), test.targets.sum(axis=0)
        found += [both / np.maximum(given, 1), both / np.maximum(own, 1), 2 * both / np.maximum(given + own, 1)]
    found /= max(1, len(outcomes))
    figures = [
        ClassFigures(label, float(precision), float(recall), float(f1), int(texts))
        for label, precision, recall, f1, texts in zip(test.labels, *found, test.targets.sum(axis=0), strict=True)
        if texts
    ]
    return sorted(figures, key=lambda each: (each.f1, each.label))
