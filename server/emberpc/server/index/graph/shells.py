"""Shells: ranges of the distance from a centre. Each has its own graph, so that dense and distant vectors are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.types import Labels, Matrix

#: Outer radius of a shell divided by its inner radius. A vector in the centre of vectors that are no nearer to each
#: other than to it takes the links of all of them; with a greater ratio some vectors of a shell do that.
_RATIO = 1.5
#: Shells inside the main one, and as many outside: distances from 1/130 of the main shell's to 130 times.
_MOST = 12
#: Number of the innermost shell; the outer ones follow downwards. -1 and -2 are `STRAY` and `SHORT`.
_INNERMOST = -3
#: Number of the main shell.
MAIN = 0


@dataclass(frozen=True)
class Shells:
    """Ranges of the distance from a centre.

    Attributes:
        centre: float32 (dimensions,).
        radius: distance in the middle of the main shell; positive.
    """

    centre: Matrix
    radius: float

    def of(self, vectors: Matrix) -> Labels:
        """Return the shell of each vector, float32 (n, dimensions): int64 (n,), `MAIN` or at most -3."""
        levels = _levels(_distances(vectors, self.centre) / self.radius)
        shells: Labels = np.where(levels == 0, MAIN, _INNERMOST - (levels + _MOST))
        return shells


def fitted(vectors: Matrix) -> Shells | None:
    """Fit shells to vectors, float32 (n, dimensions); the main one holds the most. None if all vectors are equal."""
    # Unlike the mean, the median does not follow a few long vectors.
    centre = np.median(vectors, axis=0).astype(np.float32)
    distances = _distances(vectors, centre)
    distances = distances[distances > 0]
    if not len(distances):
        return None
    middle = float(np.median(distances))
    levels, counts = np.unique(_levels(distances / middle), return_counts=True)
    return Shells(centre, middle * _RATIO ** float(levels[np.argmax(counts)]))


def _distances(vectors: Matrix, centre: Matrix) -> npt.NDArray[np.float64]:
    differences = vectors.astype(np.float64) - centre
    distances: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", differences, differences))
    return distances


def _levels(ratios: npt.NDArray[np.float64]) -> Labels:
    """Return by how many shells distances, as shares of the main shell's middle, are outside it; -12 to 12."""
    exponents = np.log(np.maximum(ratios, np.finfo(np.float64).tiny)) / np.log(_RATIO)
    levels: Labels = np.clip(np.floor(exponents + 0.5), -_MOST, _MOST).astype(np.int64)
    return levels
