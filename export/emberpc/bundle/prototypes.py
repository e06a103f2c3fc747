"""Make the vectors that a rejection score stores from the vectors of training texts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emberpc.bundle.head import unit
from emberpc.bundle.scope import MAX_SCOPE_NUMBERS, RejectionScore, ScopeVectors, Vectors

#: Maximum number of prototypes of a label.
MAX_PROTOTYPES = 8
#: Minimum number of distinct training texts that a prototype is the mean of, so that a bundle gives no vector of a
#: training text away. A label with one distinct text is the exception: its prototype is that text's vector, as its mean
#: vector is.
_PROTOTYPE_TEXTS = 2
_ROUNDS = 10


def class_means(vectors: Vectors, targets: npt.NDArray[np.bool_]) -> Vectors:
    """Return the mean of the normalized vectors of each label's texts, itself normalized, float32 (labels, dimensions).

    Args:
        vectors: vectors of the texts, float32 (texts, dimensions), of any length.
        targets: the right labels, bool (texts, labels); a label without texts gets zeros.
    """
    counts = np.maximum(targets.sum(axis=0), 1)[:, None]
    return unit(np.asarray(targets.T.astype(np.float32) @ unit(vectors) / counts, dtype=np.float32))


def can_store(score: RejectionScore, labels: int, dimensions: int) -> bool:
    """Return whether a classifier with this number of labels and dimensions can have a score.

    A score that needs vectors stores at least one vector for each label, and `MAX_SCOPE_NUMBERS` limits these.
    """
    return not score.needs_vectors or labels * dimensions <= MAX_SCOPE_NUMBERS


def make_scope(
    score: RejectionScore, vectors: Vectors, targets: npt.NDArray[np.bool_], seed: int = 0
) -> ScopeVectors | None:
    """Return the vectors that a score stores, made from training texts; None if the score needs none.

    Args:
        score: the score; `can_store` must be true for it.
        vectors: vectors of the training texts, float32 (texts, dimensions), of any length.
        targets: the right labels, bool (texts, labels); at least one text has a label.
        seed: seed of the choice of prototypes.
    """
    if not score.needs_vectors:
        return None
    if score is RejectionScore.CLASS_COSINE:
        means = class_means(vectors, targets)
        return ScopeVectors(means[means.any(axis=1)])
    generator = np.random.default_rng(seed)
    maximum = min(MAX_PROTOTYPES, MAX_SCOPE_NUMBERS // (vectors.shape[1] * targets.shape[1]))
    units = unit(vectors)
    found = [
        _prototypes(units[targets[:, i]], maximum, generator) for i in range(targets.shape[1]) if targets[:, i].any()
    ]
    return ScopeVectors(np.concatenate(found))


def _prototypes(units: Vectors, maximum: int, generator: np.random.Generator) -> Vectors:
    """Return prototypes of one label by k-means on the sphere, float32 (prototypes, dimensions), each of length 1.

    Each prototype is the normalized mean of at least two distinct texts' vectors, unless there is only one. There are
    at most half as many prototypes as distinct texts, and at most `maximum`. The first centres are drawn as in
    k-means++ (Arthur and Vassilvitskii, 2007).

    Args:
        units: vectors of the label's texts, float32 (texts, dimensions), each of length 1; at least one text.
        maximum: maximum number of prototypes.
        generator: draws the first centres.
    """
    units = np.unique(units[units.any(axis=1)], axis=0)
    if not len(units):
        return units
    count = max(1, min(maximum, len(units) // _PROTOTYPE_TEXTS))
    centres = units[generator.integers(len(units), size=1)]
    while len(centres) < count:
        distances = np.maximum(0, 1 - (units @ centres.T).max(axis=1)).astype(np.float64)
        share = distances / distances.sum() if distances.any() else None
        centres = np.concatenate([centres, units[generator.choice(len(units), size=1, p=share)]])
    for _ in range(_ROUNDS):
        moved = _means(units, _nearest(units, centres))
        centres = moved if len(moved) else centres
    while len(centres) > 1:
        groups = _nearest(units, centres)
        sizes = np.bincount(groups, minlength=len(centres))
        if sizes.min() >= _PROTOTYPE_TEXTS:
            break
        centres = np.delete(centres, sizes.argmin(), axis=0)
    return _means(units, _nearest(units, centres))


def _nearest(units: Vectors, centres: Vectors) -> npt.NDArray[np.int64]:
    return np.asarray((units @ centres.T).argmax(axis=1))


def _means(units: Vectors, groups: npt.NDArray[np.int64]) -> Vectors:
    """Return the normalized mean of each group of vectors; leave out groups without vectors or with a mean of 0."""
    means = class_means(units, groups[:, None] == np.unique(groups))
    return means[means.any(axis=1)]
