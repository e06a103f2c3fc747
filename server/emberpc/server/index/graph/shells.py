"""Shells: ranges of the distance from the centre of a collection's vectors, each with a graph of its own.

In one common graph, the vectors near the centre would take the links of distant vectors. A shell with few vectors,
other than the main shell, has no graph: a search compares the query with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.types import Labels, Matrix

#: Outer radius of a shell divided by its inner radius. With a greater ratio, some vectors of a shell are so central
#: that the other vectors are no nearer to each other than to the central vectors. HNSW would then link those other
#: vectors to the central vectors only.
_RATIO = 1.5
#: Number of shells inside the main shell, and number of shells outside it. The middle of the innermost shell is at
#: 1/130 of the main shell's distance from the centre, the middle of the outermost shell at 130 times that distance.
_MAX_LEVEL = 12
#: Number of the innermost shell. The number falls by 1 from shell to shell outwards, to -27. The main shell has the
#: number `MAIN` in place of -15. -1 and -2 have other meanings: `STRAY` and `SHORT`.
_INNERMOST = -3
#: Number of the main shell.
MAIN = 0


@dataclass(frozen=True)
class Shells:
    """The main shell, 12 shells inside it and 12 outside. The outer radius of a shell is 1.5 times its inner radius.

    The innermost shell also has all vectors nearer to the centre, and the outermost shell all vectors farther away.

    Attributes:
        centre: float32 (dimensions,).
        radius: distance from the centre to the middle of the main shell, the geometric mean of its two radii; positive.
    """

    centre: Matrix
    radius: float

    def of(self, vectors: Matrix) -> Labels:
        """Return the number of the shell of each vector, float32 (n, dimensions): int64 (n,), see `_INNERMOST`."""
        levels = _levels(_distances(vectors, self.centre) / self.radius)
        shells: Labels = np.where(levels == 0, MAIN, _INNERMOST - (levels + _MAX_LEVEL))
        return shells


def fitted(vectors: Matrix) -> Shells | None:
    """Return shells around the centre of vectors, float32 (n, dimensions), n > 0; None if all vectors are equal.

    The main shell is the shell with the most vectors. Vectors equal to the centre, such as many copies of one text, do
    not count.
    """
    # The centre is the median of each component: unlike the mean, a few long vectors hardly move the median.
    centre = np.median(vectors, axis=0).astype(np.float32)
    distances = _distances(vectors, centre)
    distances = distances[distances > 0]
    if not len(distances):
        return None
    middle = float(np.median(distances))
    levels, counts = np.unique(_levels(distances / middle), return_counts=True)
    return Shells(centre, middle * _RATIO ** float(levels[np.argmax(counts)]))


def _distances(vectors: Matrix, centre: Matrix) -> npt.NDArray[np.float64]:
    """Return the Euclidean distance of each vector, (n, dimensions), from the centre, (dimensions,): float64 (n,)."""
    differences = vectors.astype(np.float64) - centre
    distances: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", differences, differences))
    return distances


def _levels(ratios: npt.NDArray[np.float64]) -> Labels:
    """Return the level of the shell of each ratio, int64 (n,): 0 around ratio 1, up to 12 outwards, to -12 inwards.

    Args:
        ratios: distances from the centre, divided by the distance to the middle of level 0, float64 (n,).
    """
    exponents = np.log(np.maximum(ratios, np.finfo(np.float64).tiny)) / np.log(_RATIO)
    levels: Labels = np.clip(np.floor(exponents + 0.5), -_MAX_LEVEL, _MAX_LEVEL).astype(np.int64)
    return levels
