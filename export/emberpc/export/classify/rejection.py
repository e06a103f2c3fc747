"""Fit the rejection of a classifier by texts outside all of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from emberpc.bundle import RejectionScore, ScopeVectors, rejection_scores
from emberpc.bundle.prototypes import can_store, make_scope
from emberpc.bundle.rejection import Rejection, fit_rejection
from emberpc.export.classify.linear import Matrix, stratify
from emberpc.export.classify.strategies import Fitted
from emberpc.export.data.examples import Examples, Rows, Targets
from emberpc.export.errors import ExportError

Scores = dict[RejectionScore, np.ndarray]


def reject_outside(
    fitted: Fitted,
    examples: Examples,
    validation: Examples | None,
    outside: Sequence[str],
    max_false_rejections: float,
    seed: int = 0,
) -> tuple[Rejection, ScopeVectors | None]:
    """Choose the rejection score and threshold of a classifier, and make the vectors that the score stores.

    Every score of a held-out text comes from vectors and heads of other texts. If the encoder was tuned, the scores
    come from the classifier that made the logits of the held-out texts. Otherwise the class means and prototypes that
    a held-out training text is compared with are made from the other four of five folds.

    Args:
        fitted: the classifier, with a linear head and with held-out texts.
        examples: the training texts.
        validation: the texts of the validation file, which are the held-out texts; None: they are training texts.
        outside: texts without any of the labels; at least one.
        max_false_rejections: greatest share of held-out texts to reject, in [0, 1).
        seed: seed of folds, prototypes and halves.

    Returns:
        The rejection with its figures, and the vectors for the bundle, made from all training texts; None if the score
        needs no vectors.

    Raises:
        ExportError: the classifier has no linear head, or texts cannot be embedded.
    """
    by = fitted.held_out_by or fitted
    if fitted.embed is None or by.embed is None or by.head is None:
        raise ExportError("texts outside all labels need a classifier with a linear head; choose another strategy")
    vectors, beyond = by.embed(examples.texts), by.embed(outside)
    names = [name for name in RejectionScore if can_store(name, len(examples.labels), vectors.shape[1])]
    scores = partial(_scores, names, seed)
    held_out, targets = fitted.held_out, examples.targets
    folds = _folds(fitted, targets, seed)
    if validation is not None:
        inside = scores(vectors, targets, held_out.logits, by.embed(validation.texts))
    else:
        inside = {name: np.zeros(len(held_out)) for name in names}
        for fold in np.unique(folds[held_out.rows]):
            known, in_fold = folds != fold, folds[held_out.rows] == fold
            found = scores(vectors[known], targets[known], held_out.logits[in_fold], vectors[held_out.rows[in_fold]])
            for name in names:
                inside[name][in_fold] = found[name]
    trained = np.ones(len(folds), dtype=bool) if fitted.tuned is None else folds < 0
    outer = scores(vectors[trained], targets[trained], by.head.logits(beyond), beyond)
    rejection = fit_rejection(inside, outer, max_false_rejections, seed)
    if rejection.score.needs_vectors and by is not fitted:
        vectors = fitted.embed(examples.texts)
    return rejection, make_scope(rejection.score, vectors, targets, seed)


def _folds(fitted: Fitted, targets: Targets, seed: int) -> Rows:
    """Return the fold of each training text, int (texts,); -1 for a text that is not held out.

    A tuned encoder was not trained on any held-out text, so all of these are one fold. `targets` is bool (texts,
    labels).
    """
    rows = fitted.held_out.rows
    folds = np.full(len(targets), -1, dtype=np.int64)
    # `stratify` gives -1 to a label's only text, which is in the first fold here.
    folds[rows] = 0 if fitted.tuned is not None else np.maximum(0, stratify(targets[rows], seed))
    return folds


def _scores(
    names: Sequence[RejectionScore], seed: int, known: Matrix, targets: Targets, logits: Matrix, vectors: Matrix
) -> Scores:
    """Return the rejection scores of texts by name, each float64 (texts,).

    Args:
        names: the scores.
        seed: seed of the prototypes.
        known: vectors of training texts for class means and prototypes, float32 (training texts, dimensions).
        targets: the right labels of the training texts, bool (training texts, labels).
        logits: logits of the texts, float32 (texts, labels).
        vectors: vectors of the texts, float32 (texts, dimensions).
    """
    return {name: rejection_scores(name, logits, vectors, make_scope(name, known, targets, seed)) for name in names}
