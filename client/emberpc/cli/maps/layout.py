"""Where records lie on a map: near each other if their vectors are alike."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.client.types import Matrix

#: float64 (points, 2), within [-1, 1]; y grows downwards, as on a screen.
Places = npt.NDArray[np.float64]

#: Fewer points are projected linearly: t-SNE has nothing to go by with hardly any neighbours.
_FEW = 12
_PERPLEXITY = 30.0
#: Points nearer to each other than this cover each other; they are spread by as much.
_SPACING = 0.004


@dataclass(frozen=True)
class Layout:
    """Where points lie, and in words how that was found."""

    places: Places
    method: str


def lay_out(vectors: Matrix, distance: str) -> Layout:
    """Project vectors to a plane; the same vectors always come to the same places.

    Args:
        vectors: finite, shape (points, dimensions), at least one point.
        distance: how the collection compares them: `cosine`, `dot_product` or `euclidean`.
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
    """Return vectors that are as far apart as before, in proportion, and whose squares are within float32."""
    if metric == "cosine":
        size = np.abs(vectors).max(axis=1, keepdims=True)
        rows = vectors / np.where(size == 0, 1, size)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(length == 0, 1, length)
    else:
        rows = vectors / (np.abs(vectors).max() or 1)
    # Both ways to a plane need two columns.
    return np.pad(rows, ((0, 0), (0, max(0, 2 - rows.shape[1])))).astype(np.float32)


def _principal(rows: Matrix) -> Places:
    """Return the first two principal components."""
    centred = rows.astype(np.float64) - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * sizes[:2]
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))


def _fitted(places: npt.ArrayLike) -> Places:
    """Return places moved to the middle and scaled into the square, their proportions kept."""
    found = np.asarray(places, dtype=np.float64)
    low, high = found.min(axis=0), found.max(axis=0)
    half = float((high - low).max()) / 2
    # What is left of a rounding is no distance.
    return (found - (low + high) / 2) / half if half > 1e-9 else np.zeros_like(found)


def _spread(places: Places) -> Places:
    """Return places where points that would cover each other lie in a spiral around their place, like seeds."""
    spread = places.copy()
    shared: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (x, y) in enumerate(np.round(places / (_SPACING / 2)).astype(int).tolist()):
        shared[x, y].append(i)
    for members in shared.values():
        for i, member in enumerate(members[1:], 1):
            angle, radius = i * math.pi * (3 - math.sqrt(5)), _SPACING * math.sqrt(i)
            spread[member] = places[members[0]] + (radius * math.cos(angle), radius * math.sin(angle))
    # A great many equal ones may reach past the edge.
    return _fitted(spread) if np.abs(spread).max() > 1 else spread
