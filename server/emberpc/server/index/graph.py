"""hnswlib, guarded: nothing reaches it that could crash it or make it lie."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np

from emberpc.server.index.locks import ReadWriteLock
from emberpc.server.index.metric import SPACES, graph_scores
from emberpc.server.index.types import CollectionSpec, Labels, Matrix

_FIRST_CAPACITY = 1024
#: Rows added while searches are kept out; about 20 ms.
SLICE = 64


class Graph:
    """An HNSW graph over labelled vectors.

    hnswlib is not safe to search while something is added, nor to resize while
    something is searched; a reader-writer lock keeps them apart. A label is
    added once and never changed: an in-place update costs 27 times an insert.
    Vectors must be prepared and checked (`metric`).
    """

    def __init__(self, spec: CollectionSpec) -> None:
        self._spec = spec
        self._lock = ReadWriteLock()
        self._live: set[int] = set()
        self._dead = 0
        self._index = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        self._index.init_index(_FIRST_CAPACITY, ef_construction=spec.ef_construction, M=spec.m)
        # Searches come from several threads already.
        self._index.set_num_threads(1)
        self._ef = 0

    @property
    def live(self) -> int:
        """Labels that can be found."""
        return len(self._live)

    @property
    def dead_share(self) -> float:
        """Share of the nodes that are deleted; they slow down every insert and search."""
        return self._dead / max(1, self._dead + len(self._live))

    def labels(self) -> set[int]:
        """Return the labels that can be found."""
        with self._lock.read():
            return set(self._live)

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,); searches get in between slices."""
        for start in range(0, len(labels), SLICE):
            part = slice(start, start + SLICE)
            with self._lock.write():
                need = len(self._live) + self._dead + len(labels[part])
                if need > self._index.get_max_elements():
                    self._index.resize_index(max(need, self._index.get_max_elements() * 2))
                self._index.add_items(vectors[part], labels[part], num_threads=1)
                self._live.update(labels[part].tolist())

    def remove(self, labels: set[int]) -> None:
        """Delete those of the labels that are there."""
        with self._lock.write():
            for label in labels & self._live:
                self._index.mark_deleted(label)
                self._live.remove(label)
                self._dead += 1

    def search(self, queries: Matrix, k: int, ef: int) -> tuple[Labels, Matrix]:
        """Search for prepared queries, float32 (queries, dimensions).

        Args:
            queries: the queries.
            k: how many to find for each; cut to the number that can be found.
            ef: candidates to keep, at least k.

        Returns:
            Labels, int64 (queries, found), nearest first, and their scores, float32 of the same shape.

        Raises:
            GraphError: the graph did not reach k of its nodes.
        """
        while True:
            with self._lock.read():
                if ef == self._ef:
                    return self._search(queries, k)
            # ef belongs to the whole index: it changes only while nobody searches, lest somebody find less than asked.
            with self._lock.write():
                self._index.set_ef(ef)
                self._ef = ef

    def save(self, path: Path) -> Labels:
        """Write the graph; return the labels in it that are deleted.

        hnswlib holds the GIL meanwhile, and reports success on a full disk: the caller checks what was written.
        """
        with self._lock.write():
            self._index.save_index(str(path))
            every = np.array(self._index.get_ids_list(), dtype=np.int64)
            return np.setdiff1d(every, np.fromiter(self._live, dtype=np.int64, count=len(self._live)))

    @classmethod
    def load(cls, spec: CollectionSpec, path: Path, dead: Labels) -> Graph:
        """Read what `save` wrote; the caller has checked that the file is unchanged."""
        graph = cls(spec)
        graph._index = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        graph._index.load_index(str(path), allow_replace_deleted=False)
        graph._index.set_num_threads(1)
        graph._live = set(graph._index.get_ids_list()) - set(dead.tolist())
        graph._dead = len(dead)
        return graph

    def _search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        # Asking for more than there are makes hnswlib raise, and leak its result.
        k = min(k, len(self._live))
        if not k:
            empty = np.empty((len(queries), 0))
            return empty.astype(np.int64), empty.astype(np.float32)
        try:
            labels, distances = self._index.knn_query(queries, k=k, num_threads=1)
        except RuntimeError as error:
            raise GraphError from error
        return labels.astype(np.int64), graph_scores(distances, self._spec.distance)


class GraphError(Exception):
    """The graph could not answer; the caller compares vectors one by one instead."""
