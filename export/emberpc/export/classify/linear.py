"""Linear heads on vectors: logistic regression with its regularization chosen by cross-validation."""

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

#: Inverse strengths of regularization to choose from. Few examples need a large value, many a small one.
GRID = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
#: Value for one example of each label, where cross-validation is not possible. It was good for few examples.
FEW_EXAMPLES_C = 10.0
_FOLDS = 5
_MAX_ITERATIONS = 300
#: Stop once no entry of the gradient of the mean loss is larger. Smaller tolerances changed no figure's third digit.
_TOLERANCE = 3e-5
#: Stop at this many grid steps beyond the best value: along the grid, accuracy rises and then falls.
_PATIENCE = 2

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CrossValidated:
    """A head, and logits of texts by heads that were fitted in the same way but not on these texts.

    `c` is the chosen inverse strength of regularization. `rows` has the indexes of those texts, int (rows,); `logits`
    is float32 (rows, labels). Both are empty if every label has one text only.
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
    """Fit logistic regression with L-BFGS: multinomial, or one binary regression for each label if multi-label.

    Args:
        vectors: float32 (texts, dimensions); they are scaled to length 1.
        targets: bool (texts, labels).
        c: inverse strength of the L2 regularization, as in scikit-learn's `LogisticRegression`.
        multi_label: whether a text may have several labels.
        weights: weight of each text, float32 (texts,) with a mean of 1; default: equal weights.
        start: head to start from; one for a similar `c` saves time.
        check: called at every step; what it raises stops the fit.
    """
    import torch
    from torch.nn import functional

    inputs = torch.from_numpy(unit(vectors))
    wanted = torch.from_numpy(targets.astype(np.float32))
    counts = torch.ones(len(vectors)) if weights is None else torch.from_numpy(weights)
    coefficients = torch.zeros(vectors.shape[1] + 1, targets.shape[1])
    if start is not None:
        coefficients[:-1], coefficients[-1] = torch.from_numpy(start.weights), torch.from_numpy(start.bias)
    coefficients.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [coefficients],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        check()
        optimizer.zero_grad()
        logits = inputs @ coefficients[:-1] + coefficients[-1]
        if multi_label:
            losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1)
        else:
            losses = functional.cross_entropy(logits, wanted, reduction="none")
        penalty = 0.5 * coefficients[:-1].square().sum() / (c * len(inputs))
        loss: torch.Tensor = (losses * counts).mean() + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = coefficients.detach().numpy()
    return Head(np.ascontiguousarray(found[:-1]), found[-1].copy())


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
    """Fit a head with the C of the best cross-validated accuracy.

    Among the values within one standard error of the best, the smallest is taken, which is the most regularized head
    (Hastie et al., The Elements of Statistical Learning, 7.10). The error is that of the paired difference, text by
    text, since all heads are measured on the same texts.

    Args:
        vectors: float32 (texts, dimensions).
        targets: bool (texts, labels).
        multi_label: whether a text may have several labels.
        weights: weight of each text, float32 (texts,); default: equal weights.
        always: this many of the last texts are trained on in every fold and never measured on, such as label
            descriptions.
        seed: seed of the folds.
        progress: called with the number of fits done; what it raises stops the fits.
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
    """Return whether a head's accuracy is within one standard error of the best; both arrays are float64 (texts,)."""
    behind = best - hits
    return bool(behind.mean() <= behind.std() / len(behind) ** 0.5)


def balanced_weights(targets: Targets) -> Matrix:
    """Return weights under which every label has the same total weight, float32 (texts,) with a mean of 1.

    A text with several labels gets the weight of its rarest label. A text without labels gets the weight of a label
    with the mean number of texts.
    """
    counts = np.maximum(targets.sum(axis=0), 1)
    rarity = counts.mean() / counts
    weights = np.where(targets.any(axis=1), (targets * rarity).max(axis=1), 1.0)
    return np.asarray(weights / weights.mean(), dtype=np.float32)


def stratify(targets: Targets, seed: int, folds: int = _FOLDS) -> Rows:
    """Divide texts into folds, with the texts of each label spread as evenly as possible.

    A text with several labels counts for its rarest label. A label's only text is in no fold (-1), so that every head
    is trained on every label.

    Returns:
        The fold of each text, int (texts,).
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
    """Return 1 or 0 for each text whether its best label is right; if multi-label, its share of right labels."""
    chosen = DecisionRule(multi_label=multi_label).labels(logits)
    if multi_label:
        return np.asarray((chosen == targets).mean(axis=1))
    return np.asarray((chosen & targets).any(axis=1), dtype=np.float64)
