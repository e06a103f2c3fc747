"""The newest vectors, compared one by one until the graph takes them in."""

from __future__ import annotations

import numpy as np

from emberpc.server.index.metric import nearest
from emberpc.server.index.types import Distance, Labels, Matrix


class Buffer:
    """Prepared vectors by label, in ascending order of labels.

    Adding and removing cost in proportion to what is added and removed, however
    much waits: the arrays have room to grow, and what is removed is only marked
    until the arrays are next made anew.

    Not safe to use from several threads; `Neighbours` holds the lock.
    """

    def __init__(self, dimensions: int, distance: Distance) -> None:
        self._dimensions = dimensions
        self._distance = distance
        self._allocate(0)

    def __len__(self) -> int:
        return self._count

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Take in vectors, float32 (n, dimensions), under labels, int64 (n,), ascending and above all before."""
        if self._end + len(labels) > len(self._labels):
            self._make_room(len(labels))
        new = slice(self._end, self._end + len(labels))
        self._labels[new], self._vectors[new], self._present[new] = labels, vectors, True
        self._end += len(labels)
        self._count += len(labels)

    def remove(self, labels: set[int]) -> None:
        """Drop those of the labels that are there."""
        wanted = np.fromiter(labels, dtype=np.int64, count=len(labels))
        here = self._labels[self._first : self._end]
        rows = np.searchsorted(here, wanted)
        known = rows < len(here)
        rows = rows[known][here[rows[known]] == wanted[known]] + self._first
        self._count -= int(self._present[rows].sum())
        self._present[rows] = False
        if not self._count:
            self._allocate(0)
        else:
            self._first += int(np.argmax(self._present[self._first : self._end]))

    def oldest(self, count: int) -> tuple[Labels, Matrix]:
        """Return the labels and vectors that have waited longest, at most `count`."""
        rows = self._first + np.flatnonzero(self._present[self._first : self._end])[:count]
        return self._labels[rows], self._vectors[rows]

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that are there."""
        here = slice(self._first, self._end)
        rows = self._first + np.flatnonzero(np.isin(self._labels[here], labels) & self._present[here])
        return dict(zip(self._labels[rows].tolist(), self._vectors[rows], strict=True))

    def labels(self) -> set[int]:
        """Return the labels that are there."""
        here = slice(self._first, self._end)
        return set(self._labels[here][self._present[here]].tolist())

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Compare prepared queries, float32 (queries, dimensions), with every vector.

        Returns:
            Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
        """
        here = slice(self._first, self._end)
        present = self._present[here] if self._count < self._end - self._first else None
        rows, scores = nearest(queries, self._vectors[here], k, self._distance, present)
        return self._labels[here][rows], scores

    def _allocate(self, capacity: int) -> None:
        self._labels: Labels = np.empty(capacity, dtype=np.int64)
        self._vectors: Matrix = np.empty((capacity, self._dimensions), dtype=np.float32)
        self._present = np.zeros(capacity, dtype=bool)
        #: The rows in use are those from `_first` to before `_end`; `_count` of them are present.
        self._first = self._end = self._count = 0

    def _make_room(self, extra: int) -> None:
        labels, vectors = self.oldest(self._count)
        self._allocate(max(64, 2 * len(labels), len(labels) + extra))
        self.add(labels, vectors)
