"""A set of vectors without a graph: a search compares the query with every vector."""

from __future__ import annotations

import numpy as np

from emberpc.server.collections.metric import nearest
from emberpc.server.collections.types import Distance, Labels, Matrix

_FIRST_ROWS = 4


class Pool:
    """Prepared vectors by label, unordered.

    Not safe to use from several threads; `Neighbours` holds the lock.

    Args:
        dimensions: dimensions of the vectors.
        distance: the measure by which `search_all` compares vectors.
    """

    def __init__(self, dimensions: int, distance: Distance) -> None:
        self._distance = distance
        self._row_of: dict[int, int] = {}
        self._labels: Labels = np.empty(_FIRST_ROWS, dtype=np.int64)
        self._vectors: Matrix = np.empty((_FIRST_ROWS, dimensions), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._row_of)

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,)."""
        first, count = len(self._row_of), len(self._row_of) + len(labels)
        if count > len(self._labels):
            more = max(count, 2 * first) - first
            self._labels = np.concatenate([self._labels[:first], np.empty(more, dtype=np.int64)])
            empty = np.empty((more, self._vectors.shape[1]), dtype=np.float32)
            self._vectors = np.concatenate([self._vectors[:first], empty])
        self._labels[first:count], self._vectors[first:count] = labels, vectors
        self._row_of.update(zip(labels.tolist(), range(first, count), strict=True))

    def remove(self, labels: set[int]) -> None:
        """Remove labels with their vectors; missing labels are ignored."""
        for label in labels & self._row_of.keys():
            row, last = self._row_of.pop(label), len(self._row_of)
            if row < last:
                self._labels[row], self._vectors[row] = self._labels[last], self._vectors[last]
                self._row_of[int(self._labels[row])] = row

    def all(self) -> tuple[Labels, Matrix]:
        """Return all labels, int64 (n,), and vectors, float32 (n, dimensions): views, valid until the pool changes."""
        return self._labels[: len(self)], self._vectors[: len(self)]

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return copies of the vectors, float32 (dimensions,), by label; labels not in the pool are left out."""
        return {label: self._vectors[self._row_of[label]].copy() for label in labels if label in self._row_of}

    def search_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Compare prepared queries, float32 (queries, dimensions), with every vector, and find the `k` nearest.

        Returns:
            Labels, int64 (queries, k), nearest first, and their scores, float32 of the same shape. Both have fewer
            columns if the pool has fewer vectors.
        """
        labels, vectors = self.all()
        rows, scores = nearest(queries, vectors, k, self._distance)
        return labels[rows], scores
