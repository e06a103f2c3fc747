"""Project vectors to a plane, so that similar vectors are near each other."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.client.types import Matrix

#: Places of points on the map: x and y in map units, float64 (points, 2), within [-1, 1]. y grows downwards.
Places = npt.NDArray[np.float64]

#: Minimum number of points for t-SNE, which needs several neighbours of each. Fewer points are projected to their
#: principal components.
_FEW = 12
#: Perplexity of t-SNE, about the number of neighbours that count for a point; less if there are fewer than 91 points.
_PERPLEXITY = 30.0
#: Minimum distance, in map units, of points on the spiral to which `_spread` moves points with the same place.
_SPACING = 0.004


@dataclass(frozen=True)
class Layout:
    """Places of points, and the name of the method that computed the places, to show on the map."""

    places: Places
    method: str


def lay_out(vectors: Matrix, distance: str) -> Layout:
    """Project vectors to a plane by t-SNE. Fewer than 12 vectors, or equal ones, get their principal components.

    With the distances `cosine` and `dot_product`, only the directions of the vectors count. The random seed is fixed.

    Args:
        vectors: finite, float32 (points, dimensions), at least one point.
        distance: distance of the collection: `cosine`, `dot_product` or `euclidean`.
    """
    metric = "euclidean" if distance == "euclidean" else "cosine"
    scaled = _scaled(vectors, metric)
    if len(scaled) < _FEW or not np.ptp(scaled, axis=0).any():
        return Layout(_spread(_fitted(_principal(scaled))), "principal components")
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(scaled) - 1) / 3)
    model = TSNE(init="pca", metric=metric, perplexity=perplexity, random_state=0, n_jobs=-1)
    return Layout(_spread(_fitted(model.fit_transform(scaled))), f"t-SNE, {metric}, perplexity {perplexity:.0f}")


def _scaled(vectors: Matrix, metric: str) -> Matrix:
    """Return a scaled copy of vectors, float32, so that the squares of the components do not overflow.

    `metric` is `euclidean`, or `cosine`, which is also used for the distance `dot_product`. For `cosine` each vector
    gets the length 1, unless its length is 0. For `euclidean` all vectors are divided by the same number, so the
    proportions of distances do not change. Vectors with one component get a second component, 0.
    """
    if metric == "cosine":
        size = np.abs(vectors).max(axis=1, keepdims=True)
        rows = vectors / np.where(size == 0, 1, size)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(length == 0, 1, length)
    else:
        rows = vectors / (np.abs(vectors).max() or 1)
    # t-SNE starts from two principal components, so it needs at least two columns.
    return np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1])))).astype(np.float32)


def _principal(rows: Matrix) -> Places:
    """Return the coordinates of the rows in their first two principal components, float64 (rows, 2)."""
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * sizes[:2]
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def _fitted(places: npt.ArrayLike) -> Places:
    """Centre places and scale both axes by the same factor, so that the wider one fills [-1, 1].

    If all places are equal, the result is 0 for each.
    """
    found = np.asarray(places, dtype=np.float64)
    low, high = found.min(axis=0), found.max(axis=0)
    half = float((high - low).max()) / 2
    # If half the extent is at most 1e-9, the places differ by rounding errors only and count as equal.
    return (found - (low + high) / 2) / half if half > 1e-9 else np.zeros_like(found)


def _spread(places: Places) -> Places:
    """Return the places, with points in the same square of the side `_SPACING / 2` moved apart.

    The first point of a square stays. The others are moved to a spiral around it. If a point is then beyond [-1, 1],
    all places are fitted again.
    """
    spread = places.copy()
    shared: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (x, y) in enumerate(np.round(places / (_SPACING / 2)).astype(int).tolist()):
        shared[x, y].append(i)
    for members in shared.values():
        for i, member in enumerate(members[1:], 1):
            angle, radius = i * math.pi * (3 - math.sqrt(5)), _SPACING * math.sqrt(i)
            spread[member] = places[members[0]] + (radius * math.cos(angle), radius * math.sin(angle))
    # A spiral of many equal points may extend beyond the square.
    return _fitted(spread) if np.abs(spread).max() > 1 else spread
