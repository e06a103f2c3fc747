"""The newest vectors, compared one by one until the graph takes them in."""

from __future__ import annotations

import threading

import numpy as np

from emberpc.server.index.metric import scores
from emberpc.server.index.types import Distance, Labels, Matrix


class Buffer:
    """Prepared vectors by label, in the order they came. Safe to use from several threads."""

    def __init__(self, dimensions: int, distance: Distance) -> None:
        self._distance = distance
        self._lock = threading.Lock()
        # Replaced, never changed in place: a search works on the arrays it got hold of.
        self._labels: Labels = np.empty(0, dtype=np.int64)
        self._vectors: Matrix = np.empty((0, dimensions), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Take in vectors, float32 (n, dimensions), under labels, int64 (n,)."""
        with self._lock:
            self._labels, self._vectors = (
                np.concatenate([self._labels, labels]),
                np.concatenate([self._vectors, vectors]),
            )

    def remove(self, labels: set[int]) -> None:
        """Drop those of the labels that are there."""
        with self._lock:
            keep = ~np.isin(self._labels, np.fromiter(labels, dtype=np.int64, count=len(labels)))
            if not keep.all():
                self._labels, self._vectors = self._labels[keep], self._vectors[keep]

    def contents(self) -> tuple[Labels, Matrix]:
        """Return labels and vectors as of now."""
        with self._lock:
            return self._labels, self._vectors

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix, int]:
        """Compare prepared queries, float32 (queries, dimensions), with every vector.

        Returns:
            Labels, int64 (queries, at most k), nearest first; their scores, float32 of the same shape; and how many
            vectors were compared.
        """
        labels, vectors = self.contents()
        found = scores(queries, vectors, self._distance)
        k = min(k, len(labels))
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        return labels[order], np.take_along_axis(found, order, axis=1), len(labels)
