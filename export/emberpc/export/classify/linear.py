"""Fit linear heads on vectors by logistic regression, with the regularization chosen by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from emberpc.bundle import DecisionRule, Head, unit
from emberpc.export.data.examples import Rows, Targets
from emberpc.export.progress import Progress, no_progress
from emberpc.export.threads import Check, bounded_threads, run_in_threads

#: Inverse strengths of regularization that cross-validation tries. Few examples need a large value, many a small one.
GRID = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
#: Inverse strength of regularization if every label has one example only, so that cross-validation is not possible.
#: This value was good with few examples.
FEW_EXAMPLES_C = 10.0
_FOLDS = 5
_MAX_ITERATIONS = 300
#: L-BFGS also stops once an iteration lowers the mean loss by less than this, or by a smaller share of a loss above 1.
_LEAST_GAIN = 1e-9
#: L-BFGS stops once no entry of the mean loss's gradient is larger. Smaller tolerances changed no measured figure's
#: third digit.
_TOLERANCE = 3e-5
#: Number of values of `GRID` that cross-validation tries beyond the best value so far before it stops. Along the grid,
#: accuracy rises and then falls, so later values are not better.
_PATIENCE = 2

Matrix = npt.NDArray[np.float32]
Parameters = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CrossValidated:
    """A head fitted to all texts, and logits of texts by other heads, fitted in the same way but not to these texts.

    `c` is the chosen inverse strength of regularization. `rows` has the indexes of the texts that have logits, int
    (rows,), and `logits` is float32 (rows, labels). `rows` and `logits` are empty if every label has one text only.
    """

    head: Head
    c: float
    rows: Rows
    logits: Matrix


def fit_head(
    vectors: Matrix,
    targets: Targets,
    c: float,
    *,
    multi_label: bool = False,
    weights: Matrix | None = None,
    start: Head | None = None,
    check: Check = lambda: None,
) -> Head:
    """Fit logistic regression with L-BFGS, and return it as a linear head.

    The regression is multinomial; if multi-label, there is one binary regression for each label.

    Args:
        vectors: float32 (texts, dimensions), of any length; the function scales a copy to length 1.
        targets: the right labels, bool (texts, labels).
        c: inverse strength of the L2 regularization, as in scikit-learn's `LogisticRegression`.
        multi_label: whether a text may have several labels.
        weights: weight of each text, float32 (texts,) with a mean of 1; default: equal weights.
        start: head to start from, to save time, such as a head fitted with a similar `c`; default: zeros.
        check: called at every step of the optimizer; an exception that it raises stops the fit.
    """
    from scipy.optimize import minimize

    inputs, wanted = unit(vectors), targets.astype(np.float32)
    texts, dimensions = inputs.shape
    shape = (dimensions + 1, wanted.shape[1])  # the last row is the bias
    shares = np.full((texts, 1), 1 / texts, dtype=np.float32)
    if weights is not None:
        shares *= weights[:, None]

    def loss(parameters: Parameters) -> tuple[float, Parameters]:
        """Return the mean loss with the penalty, and its gradient."""
        check()
        coefficients = parameters.reshape(shape).astype(np.float32)
        logits = inputs @ coefficients[:-1]
        logits += coefficients[-1]
        losses, errors = _binary_losses(logits, wanted) if multi_label else _losses(logits, wanted)
        errors *= shares
        gradient = np.empty(shape)
        gradient[:-1], gradient[-1] = inputs.T @ errors, errors.sum(axis=0)
        penalized = parameters[: -shape[1]]
        gradient.reshape(-1)[: -shape[1]] += penalized / (c * texts)
        return float(losses @ shares[:, 0]) + float(penalized @ penalized) / (2 * c * texts), gradient.reshape(-1)

    first = np.zeros(shape)
    if start is not None:
        first[:-1], first[-1] = start.weights, start.bias
    limits = {"maxiter": _MAX_ITERATIONS, "gtol": _TOLERANCE, "ftol": _LEAST_GAIN}
    fitted = minimize(loss, first.reshape(-1), jac=True, method="L-BFGS-B", options=limits)
    found = fitted.x.reshape(shape).astype(np.float32)
    return Head(found[:-1], found[-1])


def _losses(logits: Matrix, wanted: Matrix) -> tuple[Matrix, Matrix]:
    """Return the cross-entropy of each text, float32 (texts,), and its gradient by `logits`, which are overwritten.

    `logits`, `wanted` (1 for the right label, 0 for others) and the gradient are float32 (texts, labels).
    """
    logits -= logits.max(axis=1, keepdims=True)
    right = np.einsum("ij,ij->i", logits, wanted)
    exponentials = np.exp(logits, out=logits)
    sums = exponentials.sum(axis=1, keepdims=True)
    exponentials /= sums
    return np.log(sums[:, 0]) - right, exponentials - wanted


def _binary_losses(logits: Matrix, wanted: Matrix) -> tuple[Matrix, Matrix]:
    """Return the sum over labels of the binary cross-entropies of each text, and its gradient, as `_losses` does."""
    exponentials = np.exp(-np.abs(logits))
    losses = np.maximum(logits, 0) - logits * wanted + np.log1p(exponentials)
    probabilities = np.where(logits >= 0, 1, exponentials) / (1 + exponentials)
    return losses.sum(axis=1), probabilities - wanted


def cross_validate(
    vectors: Matrix,
    targets: Targets,
    *,
    multi_label: bool = False,
    weights: Matrix | None = None,
    always: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> CrossValidated:
    """Fit a head to all texts, with the inverse strength of regularization chosen by cross-validation in 5 folds.

    The smallest value of `GRID` whose accuracy is within one standard error of the best accuracy is chosen; it gives
    the most regularized head (Hastie et al., The Elements of Statistical Learning, 7.10). The standard error is that of
    the paired difference, text by text, since all heads are measured on the same texts. If every label has one text
    only, the value is `FEW_EXAMPLES_C`.

    Args:
        vectors: float32 (texts, dimensions), of any length.
        targets: the right labels, bool (texts, labels).
        multi_label: whether a text may have several labels.
        weights: weight of each text, float32 (texts,) with a mean of 1; default: equal weights.
        always: number of texts at the end of `vectors`, such as label descriptions, that every fold is trained on and
            none is measured on.
        seed: seed of the folds.
        progress: called with the number of fits done; an exception that it raises stops the fits.

    Returns:
        The head, the chosen value, and the cross-validated logits of the texts that were measured on.
    """
    folds = stratify(targets, seed)
    folds[len(folds) - always :] = -1
    rows = np.flatnonzero(folds >= 0)
    fit = partial(_fit, vectors, targets, multi_label, weights)
    every = np.ones(len(folds), dtype=bool)
    with bounded_threads(1):
        if not len(rows):
            (head,) = run_in_threads([partial(fit, every, FEW_EXAMPLES_C, None)])
            return CrossValidated(head, FEW_EXAMPLES_C, rows, np.zeros((0, targets.shape[1]), dtype=np.float32))
        tried: dict[float, Matrix] = {}
        hits: dict[float, npt.NDArray[np.float64]] = {}
        numbers = np.unique(folds[rows])
        total = len(GRID) * len(numbers)
        starts: Sequence[Head | None] = [None] * len(numbers)
        for step, c in enumerate(GRID):
            tasks = [partial(fit, folds != fold, c, start) for fold, start in zip(numbers, starts, strict=True)]
            starts = heads = run_in_threads(tasks, _reporting(progress, step * len(numbers), total))
            logits = np.zeros((len(folds), targets.shape[1]), dtype=np.float32)
            for fold, head in zip(numbers, heads, strict=True):
                logits[folds == fold] = head.logits(vectors[folds == fold])
            tried[c], hits[c] = logits[rows], right(logits[rows], targets[rows], multi_label)
            best = max(hits, key=lambda known: hits[known].mean())
            if GRID.index(c) - GRID.index(best) >= _PATIENCE:
                break
        chosen = min(c for c in hits if _as_good(hits[c], hits[best]))
        (head,) = run_in_threads([partial(fit, every, chosen, None)], _reporting(progress, total - 1, total))
    return CrossValidated(head, chosen, rows, tried[chosen])


def _fit(
    vectors: Matrix,
    targets: Targets,
    multi_label: bool,
    weights: Matrix | None,
    seen: npt.NDArray[np.bool_],
    c: float,
    start: Head | None,
    check: Check,
) -> Head:
    """Fit a head to the texts where `seen`, bool (texts,), is true; the other arguments are those of `fit_head`."""
    kept = None if weights is None else weights[seen]
    return fit_head(vectors[seen], targets[seen], c, multi_label=multi_label, weights=kept, start=start, check=check)


def _reporting(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """Return a function that reports that many fits more than `before` as done."""
    return lambda done: progress("cross-validating", before + done, total)


def _as_good(hits: npt.NDArray[np.float64], best: npt.NDArray[np.float64]) -> bool:
    """Return whether a head's mean accuracy is within one standard error of the best head's mean accuracy.

    `hits` and `best` are the accuracies of the two heads on the same texts, float64 (texts,), as `right` returns them.
    """
    behind = best - hits
    return bool(behind.mean() <= behind.std() / len(behind) ** 0.5)


def balanced_weights(targets: Targets) -> Matrix:
    """Return weights of texts that balance the labels, float32 (texts,) with a mean of 1.

    `targets` is bool (texts, labels). If each text has one label, all labels that have texts get the same total weight.
    A text with several labels gets the weight of its rarest label. A text without labels gets the weight of a label
    with the mean number of texts.
    """
    counts = np.maximum(targets.sum(axis=0), 1)
    rarity = counts.mean() / counts
    weights = np.where(targets.any(axis=1), (targets * rarity).max(axis=1), 1.0)
    return np.asarray(weights / weights.mean(), dtype=np.float32)


def stratify(targets: Targets, seed: int, folds: int = _FOLDS) -> Rows:
    """Divide texts into folds, with the texts of each label spread as evenly as possible.

    A text with several labels counts for its rarest label. Texts without labels are spread as those of one more label.

    Args:
        targets: bool (texts, labels).
        seed: seed of the division.
        folds: number of folds.

    Returns:
        The fold of each text, from 0, int (texts,); -1 for a text that is the only one to count for its label, so that
        every head is trained on every label.
    """
    generator = np.random.default_rng(seed)
    counts = targets.sum(axis=0)
    group = np.where(targets.any(axis=1), np.where(targets, counts, np.inf).argmin(axis=1), targets.shape[1])
    found = np.full(len(targets), -1, dtype=np.int64)
    start = 0
    for label in np.unique(group):
        rows = generator.permutation(np.flatnonzero(group == label))
        if len(rows) > 1:
            found[rows] = (start + np.arange(len(rows))) % folds
            start += len(rows)  # otherwise the first folds would get the surplus texts of every label
    return found


def right(logits: Matrix, targets: Targets, multi_label: bool) -> npt.NDArray[np.float64]:
    """Return how right the decision on each text is, float64 (texts,).

    The value is 1 if the text has the label with the best logit, else 0. If multi-label, the value is the share of all
    labels that the text is rightly given or rightly not given, with a threshold of 0.5.

    Args:
        logits: float32 (texts, labels).
        targets: the right labels, bool (texts, labels).
        multi_label: whether a text may have several labels.
    """
    chosen = DecisionRule(multi_label=multi_label).labels(logits)
    if multi_label:
        return np.asarray((chosen == targets).mean(axis=1))
    return np.asarray((chosen & targets).any(axis=1), dtype=np.float64)
