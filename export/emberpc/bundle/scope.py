"""Rejection scores: how likely a text has any of a classifier's labels. Higher means more in scope.

Two scores need the logits only. The two others compare the text's vector with vectors that the bundle stores: the mean
vector of each label's training texts, or some prototypes of each label.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.arrays import read_arrays
from emberpc.bundle.errors import BundleError
from emberpc.bundle.head import unit

SCOPE_NAME = "scope.npz"
#: Maximum count of numbers of the stored vectors of a classifier, 2 MiB in float32. A text is compared with all of
#: these vectors, so this also bounds the work of a text: 0.5 million multiplications, far fewer than an encoder needs
#: for a token.
MAX_SCOPE_NUMBERS = 2**19
#: Rows of vectors that are compared at once. It bounds the memory of a call with many texts.
_CHUNK = 256
#: Allowed difference of a stored vector's length from 1.
_LENGTH_TOLERANCE = 1e-3
_MAX_LOGIT = float(np.finfo(np.float32).max)

Vectors = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]


class RejectionScore(str, Enum):
    """A score of texts; a classifier rejects the texts whose score is below its rejection threshold.

    The simplest score is the first, and the simpler of two scores that separate texts equally well is used.
    """

    #: The best logit, before the temperature. It separates texts of other subjects better than the best probability
    #: does: softmax gives a high probability to any label that is clearly ahead of the others, even if all logits are
    #: low (Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022).
    MAX_LOGIT = "max_logit"
    #: The logarithm of the sum of the exponentials of all logits, before the temperature (Liu et al., "Energy-based
    #: Out-of-distribution Detection", NeurIPS 2020; this is the negative of their energy).
    ENERGY = "energy"
    #: Cosine of the text's vector and the nearest mean vector of a label's training texts, in [-1, 1].
    CLASS_COSINE = "class_cosine"
    #: Cosine of the text's vector and the nearest prototype of a label, in [-1, 1].
    NEAREST_PROTOTYPE = "nearest_prototype"

    @property
    def needs_vectors(self) -> bool:
        """Whether the score compares the text's vector with stored vectors; otherwise it needs the logits only."""
        return self in (RejectionScore.CLASS_COSINE, RejectionScore.NEAREST_PROTOTYPE)


@dataclass(frozen=True, eq=False)
class ScopeVectors:
    """Vectors that a rejection score compares a text's vector with: float32 (vectors, dimensions), each of length 1."""

    vectors: Vectors

    def nearest_cosines(self, vectors: Vectors) -> Exact:
        """Return the cosine of each vector and the nearest stored vector, float64 (texts,), in [-1, 1].

        `vectors` is float32 (texts, dimensions), of any length; a zero vector has the cosine 0.
        """
        units = unit(vectors)
        parts = [units[start : start + _CHUNK] @ self.vectors.T for start in range(0, len(units), _CHUNK)]
        nearest = [part.max(axis=1, initial=-1) for part in parts] or [np.zeros(0, dtype=np.float32)]
        return np.asarray(np.clip(np.concatenate(nearest), -1, 1), dtype=np.float64)

    def write(self, folder: Path) -> None:
        """Write the vectors to `scope.npz` in a folder; an existing file is replaced."""
        np.savez(folder / SCOPE_NAME, allow_pickle=False, vectors=self.vectors)

    @classmethod
    def read(cls, folder: Path, dimensions: int) -> ScopeVectors:
        """Read vectors from `scope.npz` in a folder.

        Args:
            folder: the bundle.
            dimensions: number of dimensions that the vectors must have.

        Raises:
            BundleError: the file is missing or damaged, has more than `MAX_SCOPE_NUMBERS` numbers, has no vectors or
                vectors of other dimensions, or a vector is not finite or not of length 1.
        """
        path = folder / SCOPE_NAME
        arrays = read_arrays(path, "the vectors of a rejection score", 4 * MAX_SCOPE_NUMBERS + 4096)
        vectors = arrays.get("vectors")
        if vectors is None or vectors.dtype != np.float32:
            raise BundleError(f"{path} cannot be read as the vectors of a rejection score; export the model again")
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != dimensions:
            raise BundleError(
                f"{path} has the shape {vectors.shape}, not (vectors, {dimensions}); export the model again"
            )
        if vectors.size > MAX_SCOPE_NUMBERS:
            raise BundleError(f"{path} has {vectors.size} numbers; it may have at most {MAX_SCOPE_NUMBERS}")
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(vectors, axis=1)
            # `not <=` instead of `>`, so that NaN is refused, too.
            if not np.abs(lengths - 1).max() <= _LENGTH_TOLERANCE:
                raise BundleError(f"{path} has a vector whose length is not 1; export the model again")
        return cls(vectors)


def rejection_scores(
    score: RejectionScore,
    logits: npt.NDArray[np.floating],
    vectors: Vectors | None = None,
    scope: ScopeVectors | None = None,
) -> Exact:
    """Return the rejection score of each text, float64 (texts,); the lower, the less likely the text has any label.

    Args:
        score: the score.
        logits: float (texts, labels), before the temperature.
        vectors: vectors that the classifier's head takes, float32 (texts, dimensions), of any length.
        scope: stored vectors of the classifier.

    Raises:
        ValueError: the score needs `vectors` and `scope`, and one of them is None.
    """
    if score.needs_vectors:
        if vectors is None or scope is None:
            raise ValueError(f"the rejection score {score.value} needs vectors of the texts and of the classifier")
        return scope.nearest_cosines(vectors)
    exact = float64_logits(logits)
    best = exact.max(axis=1)
    if score is RejectionScore.ENERGY:
        best = best + np.log(np.exp(exact - best[:, None]).sum(axis=1))
    return np.asarray(best)


def float64_logits(logits: npt.NDArray[np.floating]) -> Exact:
    """Return logits as float64; an infinite logit becomes the largest finite float32, with its sign."""
    return np.clip(np.asarray(logits, dtype=np.float64), -_MAX_LOGIT, _MAX_LOGIT)
