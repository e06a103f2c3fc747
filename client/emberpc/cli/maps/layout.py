"""Project vectors to a plane, so that similar vectors are near each other."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.client.types import Matrix

#: float64 (points, 2), within [-1, 1]; y grows downwards, as on a screen.
Places = npt.NDArray[np.float64]

#: Fewer points are projected linearly: t-SNE needs more neighbours.
_FEW = 12
_PERPLEXITY = 30.0
#: Points nearer to each other than this would cover each other; they are spread by this distance.
_SPACING = 0.004


@dataclass(frozen=True)
class Layout:
    """Places of points, and a description of the method that computed them."""

    places: Places
    method: str


def lay_out(vectors: Matrix, distance: str) -> Layout:
    """Project vectors to a plane; the result is the same for the same vectors.

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
    """Scale vectors so that their squares fit into float32; the proportions of distances do not change."""
    if metric == "cosine":
        size = np.abs(vectors).max(axis=1, keepdims=True)
        rows = vectors / np.where(size == 0, 1, size)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(length == 0, 1, length)
    else:
        rows = vectors / (np.abs(vectors).max() or 1)
    # Both projections need at least two columns.
    return np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1])))).astype(np.float32)


def _principal(rows: Matrix) -> Places:
    """Return the first two principal components."""
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * sizes[:2]
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def _fitted(places: npt.ArrayLike) -> Places:
    """Centre places and scale them into the square [-1, 1], keeping the proportions."""
    found = np.asarray(places, dtype=np.float64)
    low, high = found.min(axis=0), found.max(axis=0)
    half = float((high - low).max()) / 2
    # A smaller extent is a rounding error.
    return (found - (low + high) / 2) / half if half > 1e-9 else np.zeros_like(found)


def _spread(places: Places) -> Places:
    """Move points that would cover each other to a spiral around their place."""
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
