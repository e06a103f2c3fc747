"""A wrapper of hnswlib that passes it no arguments that could crash it."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

from emberpc.server.collections.metric import SPACES, graph_scores, lengthened
from emberpc.server.collections.types import CollectionSpec, Distance, Labels, Matrix
from emberpc.server.index.graph.worker_threads import WorkerThreads

FIRST_CAPACITY = 1024
#: Queries for which a worker thread pays off: some milliseconds of work.
_PART = 8
#: Hits and candidates of the searches that check whether a node is found; each search checks the nodes that the search
#: before missed. The first finds 99 % of clustered vectors and costs a twentieth of an insert. The second finds most of
#: the others. The third keeps as few candidates as any search does by default.
_CHECKS = ((1, 3), (1, 16), (10, 100))
#: Relative difference of a distance in float32 that is computed in two ways.
ROUNDING = 1e-5
_helpers: WorkerThreads[Matrix, tuple[npt.NDArray[np.uint64], Matrix]] = WorkerThreads()


class GraphError(Exception):
    """The graph cannot answer, or a file holds no graph; all vectors can still be compared."""


class Hnsw:
    """An HNSW graph of vectors, each under a label of its own.

    A label is added once and never changed: an in-place update costs 27 times an insert. Vectors must be prepared and
    checked (`metric`).

    hnswlib must not be searched while vectors are added, and crashes if it is resized meanwhile: `search`, `vectors`
    and `every` may run concurrently, and all other methods must run alone.

    hnswlib's index is created with the first vector: its locks alone take 2.6 MB, and a small collection is searched
    without a graph.

    Args:
        spec: dimensions, distance and parameters.
        capacity: nodes to allocate; the capacity grows by itself.
    """

    def __init__(self, spec: CollectionSpec, capacity: int) -> None:
        self._spec = spec
        #: Nodes that are not deleted, and those that are; hnswlib's get_current_count returns the sum.
        self.count = self.dead = 0
        #: Candidates that a search keeps.
        self.ef = 0
        self._capacity = capacity
        self._made: hnswlib.Index | None = None

    @property
    def _index(self) -> hnswlib.Index:
        """The index of hnswlib; created on first use."""
        if self._made is None:
            index = hnswlib.Index(space=SPACES[self._spec.distance], dim=self._spec.dimensions)
            index.init_index(self._capacity, ef_construction=self._spec.ef_construction, M=self._spec.m)
            # Searches already run on several threads.
            index.set_num_threads(1)
            self._made = index
        return self._made

    @property
    def size(self) -> int:
        """Bytes of the file that `write` writes."""
        return int(self._index.index_file_size())

    def set_ef(self, ef: int) -> None:
        """Set how many candidates a search keeps; at least the `k` of the following searches."""
        self._index.set_ef(ef)
        self.ef = ef

    def every(self) -> Labels:
        """Return all nodes, deleted or not, int64 (nodes,)."""
        return np.array(self._index.get_ids_list(), dtype=np.int64)

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add nodes, int64 (n,), for vectors, float32 (n, dimensions); about 0.5 ms each."""
        if not len(labels):
            return
        need = self.count + self.dead + len(labels)
        if need > self._index.get_max_elements():
            self._index.resize_index(max(need, self._index.get_max_elements() * 2))
        self._index.add_items(vectors, labels, num_threads=1)
        self.count += len(labels)

    def delete(self, node: int) -> None:
        """Mark a node as deleted: searches pass through it and do not return it."""
        self._index.mark_deleted(node)
        self.count -= 1
        self.dead += 1

    def vectors(self, nodes: list[int]) -> Matrix:
        """Return the vectors of nodes that are not deleted, float32 (nodes, dimensions)."""
        if not nodes:
            return np.empty((0, self._spec.dimensions), dtype=np.float32)
        vectors: Matrix = np.asarray(self._index.get_items(nodes), dtype=np.float32)
        return vectors

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for queries, float32 (queries, dimensions); many queries are divided among all cores.

        Args:
            queries: the queries.
            k: nodes to find for each query, at most half of the nodes. If links lead to fewer than k, hnswlib raises
                and leaks its result.

        Returns:
            Nodes, int64 (queries, k), nearest first, and their scores, float32 of the same shape.

        Raises:
            GraphError: links lead to fewer nodes.
        """
        scales = None
        if self._spec.distance is Distance.DOT_PRODUCT:
            queries, scales = lengthened(queries)
        try:
            nodes, distances = self._nearest(queries, k)
        except RuntimeError as error:
            raise GraphError from error
        scores = graph_scores(distances, self._spec.distance)
        return nodes.view(np.int64), scores if scales is None else scores / scales

    def near(self, vectors: Matrix, share: float, ef: int) -> tuple[npt.NDArray[np.bool_], Labels]:
        """Search for nodes that are nearly equal to vectors, float32 (vectors, dimensions).

        Args:
            vectors: the vectors.
            share: greatest distance, as a share of a vector's length.
            ef: candidates of the search.

        Returns:
            Whether each vector has such a node, bool (vectors,), and the nearest node that was found, int64 (vectors,).
        """
        none = np.zeros(len(vectors), dtype=bool), np.zeros(len(vectors), dtype=np.int64)
        if not self.count:
            return none
        try:
            self._index.set_ef(ef)
            found, distances = self._index.knn_query(vectors, k=1, num_threads=1)
        except RuntimeError:  # links lead to no node
            return none
        finally:
            self._index.set_ef(max(1, self.ef))
        nodes, distance = found.view(np.int64)[:, 0], distances[:, 0]
        if self._spec.distance is Distance.COSINE:
            return 2 * distance <= share**2, nodes
        squares = np.einsum("ij,ij->i", vectors, vectors)
        if self._spec.distance is Distance.EUCLIDEAN:
            return distance <= share**2 * squares, nodes
        # hnswlib returns 1 - product. The length of the node is not known, and reading its vector is slow.
        near = 1 - distance >= (1 - share) * squares
        rows = np.flatnonzero(near)
        differences = vectors[rows] - self.vectors(nodes[rows].tolist())
        near[rows] = np.einsum("ij,ij->i", differences, differences) <= share**2 * squares[rows]
        return near, nodes

    def missed(self, nodes: Labels, vectors: Matrix) -> Labels:
        """Return the nodes that searches for their own vectors do not find, int64 (m,).

        Args:
            nodes: the nodes to check, int64 (n,).
            vectors: their vectors, float32 (n, dimensions).
        """
        # A search compares every node of a smaller graph.
        suspects = np.arange(len(nodes) if self.count > 1 else 0)
        try:
            for most, ef in _CHECKS:
                if len(suspects):
                    k = min(most, self.count // 2)
                    self._index.set_ef(ef)
                    suspects = suspects[self._not_found(nodes[suspects], vectors[suspects], k)]
        except RuntimeError:
            pass  # links lead to fewer than k nodes: the suspects are not found
        finally:
            self._index.set_ef(max(1, self.ef))
        return nodes[suspects]

    def _not_found(self, nodes: Labels, vectors: Matrix, k: int) -> npt.NDArray[np.bool_]:
        """Return which nodes are not hits although some hit is farther away: bool (nodes,)."""
        found, distances = self._index.knn_query(vectors, k=k, num_threads=1)
        missed: npt.NDArray[np.bool_] = (found.view(np.int64) != nodes[:, None]).all(axis=1)
        if not missed.any():
            return missed
        if self._spec.distance is Distance.EUCLIDEAN:
            own = np.zeros(len(nodes), dtype=np.float32)
        else:
            own = 1 - np.einsum("ij,ij->i", vectors, vectors)
        last = distances[:, -1]
        missed &= last > own + ROUNDING * np.maximum(np.abs(own), np.abs(last))
        return missed

    def _nearest(self, queries: Matrix, k: int) -> tuple[npt.NDArray[np.uint64], Matrix]:
        def nearest(part: Matrix) -> tuple[npt.NDArray[np.uint64], Matrix]:
            labels, distances = self._index.knn_query(part, k=k, num_threads=1)
            return labels, distances

        count = min(_helpers.most + 1, len(queries) // _PART)
        if count < 2:
            return nearest(queries)
        labels, distances = zip(*_helpers.each(nearest, np.array_split(queries, count)), strict=True)
        return np.concatenate(labels), np.concatenate(distances)

    def write(self, path: Path) -> None:
        """Write the graph to a file. hnswlib holds the GIL meanwhile, 0.7 s at 100,000 vectors."""
        self._index.save_index(str(path))

    @classmethod
    def read(cls, spec: CollectionSpec, path: Path, dead: int) -> Hnsw:
        """Read a file of `write` with `dead` deleted nodes; the file must be unchanged and of this spec.

        Raises:
            GraphError: hnswlib cannot read it.
        """
        graph = cls(spec, 1)
        # A new index, since hnswlib cannot load into an initialised one; its ef is 10, so `ef` stays unset.
        graph._made = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        try:
            graph._index.load_index(str(path), allow_replace_deleted=False)
        except RuntimeError as error:
            raise GraphError from error
        graph._index.set_num_threads(1)
        graph.dead, graph.count = dead, graph._index.get_current_count() - dead
        return graph
