"""Records and vectors for tests of the index, and exact scores to compare with."""

from __future__ import annotations

import numpy as np

from emberpc.server.collections import Distance, NewRecord

DIMENSIONS = 16


def records(*ids: str, text: str = "text") -> list[NewRecord]:
    return [NewRecord(each, f"{text} of {each}", {"id": each}) for each in ids]


def vectors(count: int, seed: int = 0, dimensions: int = DIMENSIONS) -> np.ndarray:
    """Return clustered vectors, like those of texts."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // 20), dimensions))
    found = centres[rng.integers(0, len(centres), count)] + 0.5 * rng.normal(size=(count, dimensions))
    return found.astype(np.float32)


def true_scores(query: np.ndarray, matrix: np.ndarray, distance: Distance) -> np.ndarray:
    """Return the scores of vectors for one query as documented in index.proto, in double precision."""
    query, matrix = query.astype(np.float64), matrix.astype(np.float64)
    if distance is Distance.EUCLIDEAN:
        return np.asarray(-np.linalg.norm(matrix - query, axis=1))
    if distance is Distance.COSINE:
        query, matrix = query / np.linalg.norm(query), matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix @ query)
