"""hnswlib, guarded: nothing reaches it that could crash it or make it lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

from emberpc.server.index.children import in_child
from emberpc.server.index.helpers import Helpers
from emberpc.server.index.metric import SPACES, graph_scores
from emberpc.server.index.types import CollectionSpec, Labels, Matrix

_FIRST_CAPACITY = 1024
#: Queries that are worth a helper: some milliseconds of work.
_PART = 8
_helpers: Helpers[Matrix, tuple[npt.NDArray[np.uint64], Matrix]] = Helpers()


class GraphError(Exception):
    """The graph cannot answer, or a file holds no graph; vectors can still be compared one by one."""


@dataclass(frozen=True)
class Saving:
    """A graph as it stood when its writing began.

    Bytes of its file; how many labels can be found; those that are deleted; the greatest of all, 0 for none.
    """

    size: int
    live: int
    dead: Labels
    newest: int
    #: To be called once, by the thread that began it; raises OSError if the file was not written.
    wait: Callable[[], None]


class Graph:
    """An HNSW graph over labelled vectors.

    A label is added once and never changed: an in-place update costs 27 times an
    insert. Vectors must be prepared and checked (`metric`).

    hnswlib must not be searched while something is added, and crashes if it is
    resized meanwhile. `Neighbours` holds the lock: `search` and `save` need its
    read side, all else its write side.

    Args:
        spec: dimensions, distance and parameters.
        capacity: nodes to make room for; it grows by itself.
    """

    def __init__(self, spec: CollectionSpec, capacity: int = _FIRST_CAPACITY) -> None:
        self._spec = spec
        self._live: set[int] = set()
        # hnswlib's own get_current_count counts the deleted ones too.
        self._dead = 0
        self._ef = 0
        self._index = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        self._index.init_index(max(capacity, _FIRST_CAPACITY), ef_construction=spec.ef_construction, M=spec.m)
        # Searches come from several threads already.
        self._index.set_num_threads(1)

    @property
    def live(self) -> int:
        """Number of labels that can be found."""
        return len(self._live)

    @property
    def dead_share(self) -> float:
        """Share of the nodes that are deleted; they slow down every insert and search."""
        return self._dead / max(1, self._dead + len(self._live))

    @property
    def ef(self) -> int:
        """Candidates that a search keeps."""
        return self._ef

    def set_ef(self, ef: int) -> None:
        """Set how many candidates a search keeps; at least the `k` of the searches that follow."""
        self._index.set_ef(ef)
        self._ef = ef

    def labels(self) -> set[int]:
        """Return the labels that can be found."""
        return set(self._live)

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that can be found."""
        here = [label for label in labels if label in self._live]
        if not here:
            return {}
        return dict(zip(here, np.asarray(self._index.get_items(here), dtype=np.float32), strict=True))

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,); about 0.5 ms each."""
        # This would be the heap's corruption otherwise.
        if vectors.shape != (len(labels), self._spec.dimensions) or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
        need = len(self._live) + self._dead + len(labels)
        if need > self._index.get_max_elements():
            self._index.resize_index(max(need, self._index.get_max_elements() * 2))
        self._index.add_items(vectors, labels, num_threads=1)
        self._live.update(labels.tolist())

    def remove(self, labels: set[int]) -> None:
        """Delete those of the labels that are there."""
        for label in labels & self._live:
            self._index.mark_deleted(label)
            self._live.remove(label)
            self._dead += 1

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for prepared queries, float32 (queries, dimensions).

        Args:
            queries: the queries.
            k: how many to find for each; cut to the number that can be found.

        Returns:
            Labels, int64 (queries, found), nearest first, and their scores, float32 of the same shape.

        Raises:
            GraphError: it would take, or took, more nodes than links lead to.
        """
        # Asking for more than can be reached makes hnswlib raise, and leak its result. Half of a graph is not worth
        # searching anyway.
        if 2 * min(k, len(self._live)) >= len(self._live) > 0:
            raise GraphError
        if not self._live:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        try:
            labels, distances = self._nearest(queries, k)
        except RuntimeError as error:
            raise GraphError from error
        return labels.view(np.int64), graph_scores(distances, self._spec.distance)

    def _nearest(self, queries: Matrix, k: int) -> tuple[npt.NDArray[np.uint64], Matrix]:
        """Search for queries, many of them on all cores."""

        def nearest(part: Matrix) -> tuple[npt.NDArray[np.uint64], Matrix]:
            labels, distances = self._index.knn_query(part, k=k, num_threads=1)
            return labels, distances

        count = min(_helpers.most + 1, len(queries) // _PART)
        if count < 2:
            return nearest(queries)
        labels, distances = zip(*_helpers.each(nearest, np.array_split(queries, count)), strict=True)
        return np.concatenate(labels), np.concatenate(distances)

    def save(self, path: Path) -> Saving:
        """Begin to write the graph as it stands; what changes it later does not change the file.

        Raises:
            OSError: it cannot be begun.
        """
        every = np.array(self._index.get_ids_list(), dtype=np.int64)
        dead = np.setdiff1d(every, np.fromiter(self._live, dtype=np.int64, count=len(self._live)))
        # hnswlib holds the GIL meanwhile, 0.7 s at 100,000 vectors, and every call would stand still.
        wait = in_child(lambda: self._index.save_index(str(path)))
        return Saving(self._index.index_file_size(), len(self._live), dead, int(every.max(initial=0)), wait)

    @classmethod
    def load(cls, spec: CollectionSpec, path: Path, dead: Labels) -> Graph:
        """Read what `save` wrote; the caller has checked that the file is unchanged and of this spec.

        Raises:
            GraphError: hnswlib does not take it.
        """
        graph = cls(spec)
        # A new index, since one that is initialised does not load; its ef is 10, so `_ef` stays unset.
        graph._index = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        try:
            graph._index.load_index(str(path), allow_replace_deleted=False)
        except RuntimeError as error:
            raise GraphError from error
        graph._index.set_num_threads(1)
        graph._live = set(graph._index.get_ids_list()) - set(dead.tolist())
        graph._dead = len(dead)
        return graph
