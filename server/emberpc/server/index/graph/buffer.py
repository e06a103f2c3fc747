"""The buffer of the newest vectors, which are not in the graph yet: a search compares the query with all of them."""

from __future__ import annotations

import numpy as np

from emberpc.server.collections.metric import best_of, nearest
from emberpc.server.collections.types import Distance, Labels, Matrix

#: Maximum number of float32 values in a chunk (2 MiB), and the number of vectors that a new chunk has space for.
_CHUNK, _MIN_ROWS = 2**19, 16


class Buffer:
    """Prepared vectors by label, in ascending order of labels.

    The vectors are stored in chunks of one size. Only the last chunk may be smaller. When it is full, it at least
    doubles, up to that size. The cost of adding and removing grows with the vectors that are added or removed, and
    little with the size of the buffer: a removed vector is only marked, and a chunk is freed when it is empty.

    Several threads may read at the same time; a change must run alone. `Neighbours` holds the lock.

    Args:
        dimensions: dimensions of the vectors.
        distance: the measure by which `search` compares vectors.
    """

    def __init__(self, dimensions: int, distance: Distance) -> None:
        self._dimensions = dimensions
        self._distance = distance
        self._rows = max(_MIN_ROWS, _CHUNK // dimensions)
        self._chunks: list[_Chunk] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Append vectors, float32 (n, dimensions), under labels, int64 (n,), ascending and above all present labels."""
        start = 0
        while start < len(labels):
            if not self._chunks or (not self._chunks[-1].space and self._chunks[-1].rows >= self._rows):
                self._chunks.append(_Chunk(_MIN_ROWS, self._dimensions))
            last = self._chunks[-1]
            if (wanted := last.rows - last.space + len(labels) - start) > last.rows:
                last.grow(min(self._rows, max(wanted, 2 * last.rows)))
            end = min(len(labels), start + last.space)
            last.add(labels[start:end], vectors[start:end])
            start = end
        self._count += len(labels)

    def remove(self, labels: set[int]) -> None:
        """Remove labels with their vectors; missing labels are ignored."""
        if not self._count:
            return
        wanted = np.sort(np.fromiter(labels, dtype=np.int64, count=len(labels)))
        for chunk in self._chunks:
            self._count -= chunk.remove(wanted)
        self._chunks = [chunk for chunk in self._chunks if chunk.count]

    def oldest(self, count: int) -> tuple[Labels, Matrix]:
        """Return the smallest labels, at most `count`, int64 (n,) ascending, and their vectors, float32 (n, d)."""
        parts: list[tuple[Labels, Matrix]] = []
        for chunk in self._chunks:
            if count <= 0:
                break
            parts.append(chunk.oldest(count))
            count -= len(parts[-1][0])
        if not parts:
            return np.empty(0, dtype=np.int64), np.empty((0, self._dimensions), dtype=np.float32)
        return np.concatenate([labels for labels, _ in parts]), np.concatenate([vectors for _, vectors in parts])

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that are in the buffer, by label."""
        found: dict[int, Matrix] = {}
        for chunk in self._chunks:
            found.update(chunk.held(labels))
        return found

    def labels(self) -> set[int]:
        """Return all labels in the buffer."""
        return {label for chunk in self._chunks for label in chunk.present_labels().tolist()}

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Compare prepared queries, float32 (queries, dimensions), with every vector, and find the `k` nearest.

        Returns:
            Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
        """
        found = [chunk.search(queries, k, self._distance) for chunk in self._chunks]
        if not found:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        return best_of(found, k)


class _Chunk:
    """Vectors with their labels, ascending, in the rows of an array. The rows from `_end` on are free.

    Of the rows from `_first` to before `_end`, `count` have present vectors; the vectors of the others were removed.
    All vectors before `_first` were removed too. Rows of removed vectors are not used again.
    """

    def __init__(self, rows: int, dimensions: int) -> None:
        self._labels: Labels = np.empty(rows, dtype=np.int64)
        self._vectors: Matrix = np.empty((rows, dimensions), dtype=np.float32)
        self._present = np.zeros(rows, dtype=bool)
        self._first = self._end = self.count = 0

    @property
    def rows(self) -> int:
        """Number of all rows: with present vectors, with removed vectors, and free."""
        return len(self._labels)

    def grow(self, rows: int) -> None:
        """Increase the number of rows to `rows`, which must not be less than now."""
        more = rows - self.rows
        self._labels = np.pad(self._labels, (0, more))
        self._vectors = np.pad(self._vectors, ((0, more), (0, 0)))
        self._present = np.pad(self._present, (0, more))

    @property
    def space(self) -> int:
        """Number of free rows, which are at the end; rows of removed vectors do not count."""
        return len(self._labels) - self._end

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Append vectors, float32 (n, dimensions), under labels, int64 (n,), as `Buffer.add`; `n` rows must be free."""
        new = slice(self._end, self._end + len(labels))
        self._labels[new], self._vectors[new], self._present[new] = labels, vectors, True
        self._end += len(labels)
        self.count += len(labels)

    def remove(self, wanted: Labels) -> int:
        """Remove those `wanted` labels, int64 (n,) ascending, that are present in this chunk; return their number."""
        here = self._labels[self._first : self._end]
        # Of many wanted labels, search this chunk only for those between its first and its last label.
        low, high = np.searchsorted(wanted, here[[0, -1]])
        mine = wanted[low : high + 1]
        rows = np.searchsorted(here, mine)
        known = rows < len(here)
        rows = rows[known][here[rows[known]] == mine[known]] + self._first
        gone = int(self._present[rows].sum())
        self._present[rows] = False
        self.count -= gone
        if self.count:
            self._first += int(np.argmax(self._present[self._first : self._end]))
        return gone

    def oldest(self, count: int) -> tuple[Labels, Matrix]:
        """Return the smallest present labels, at most `count`, int64 (n,) ascending, and vectors, float32 (n, d)."""
        rows = self._first + np.flatnonzero(self._present[self._first : self._end])[:count]
        return self._labels[rows], self._vectors[rows]

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that are present, by label."""
        here = slice(self._first, self._end)
        rows = self._first + np.flatnonzero(np.isin(self._labels[here], labels) & self._present[here])
        return dict(zip(self._labels[rows].tolist(), self._vectors[rows], strict=True))

    def present_labels(self) -> Labels:
        """Return the labels that are present, int64 (count,), ascending."""
        here = slice(self._first, self._end)
        return self._labels[here][self._present[here]]

    def search(self, queries: Matrix, k: int, distance: Distance) -> tuple[Labels, Matrix]:
        """Compare prepared queries, float32 (queries, dimensions), with every present vector; find the `k` nearest.

        Returns:
            Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
        """
        here = slice(self._first, self._end)
        present = self._present[here] if self.count < self._end - self._first else None
        rows, scores = nearest(queries, self._vectors[here], k, distance, present)
        return self._labels[here][rows], scores
