"""A wrapper of hnswlib. Callers must prevent wrong arguments and concurrent calls that could crash the process."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

from emberpc.server.collections.metric import SPACES, graph_scores, lengthened
from emberpc.server.collections.types import CollectionSpec, Distance, Labels, Matrix
from emberpc.server.index.graph.worker_threads import WorkerThreads

FIRST_CAPACITY = 1024
#: Minimum number of queries that are given to a worker thread: some milliseconds of work, so that the hand-over pays.
_PART = 8
#: `k` and ef of the searches that check whether a node is found. Each search checks the nodes that the search before it
#: missed. The first search finds 99 % of clustered vectors and takes a twentieth of the time of an insert. The second
#: search finds most of the others. The third search has ef 100, the minimum default ef.
_CHECKS = ((1, 3), (1, 16), (10, 100))
#: Relative difference up to which two float32 results count as equal: one distance, computed in two ways.
ROUNDING = 1e-5
_helpers: WorkerThreads[Matrix, tuple[npt.NDArray[np.uint64], Matrix]] = WorkerThreads()


class GraphError(Exception):
    """The graph cannot answer a search, so all vectors must be compared; or hnswlib cannot read the file of a graph."""


class Hnsw:
    """An HNSW graph of vectors, each under a label of its own.

    A label is added once, and its vector never changes: an in-place update takes 27 times as long as an insert. Vectors
    must be valid (`metric.check_vectors`) and prepared (`metric.prepare`).

    hnswlib must not be searched while vectors are added, and crashes if it is resized meanwhile: `search`, `vectors`,
    `every`, `size` and `write` may run concurrently, and all other methods must run alone.

    hnswlib's index is created on first use, since the locks of an empty index take 2.6 MB, and a small collection,
    which is searched without a graph, does not need one.

    Args:
        spec: dimensions, distance and parameters of the graph.
        capacity: number of nodes to allocate memory for; the capacity grows by itself.
    """

    def __init__(self, spec: CollectionSpec, capacity: int) -> None:
        self._spec = spec
        #: Number of nodes that are not deleted, and number of deleted nodes; hnswlib's get_current_count is the sum.
        self.count = self.dead = 0
        #: Number of candidates that a search keeps; 0: not set yet.
        self.ef = 0
        self._capacity = capacity
        self._made: hnswlib.Index | None = None

    @property
    def _index(self) -> hnswlib.Index:
        """The index of hnswlib; created on first use."""
        if self._made is None:
            index = hnswlib.Index(space=SPACES[self._spec.distance], dim=self._spec.dimensions)
            index.init_index(self._capacity, ef_construction=self._spec.ef_construction, M=self._spec.m)
            # One thread for each call of hnswlib, since the server already runs searches on several threads.
            index.set_num_threads(1)
            self._made = index
        return self._made

    @property
    def size(self) -> int:
        """Number of bytes of the file that `write` writes."""
        return int(self._index.index_file_size())

    def set_ef(self, ef: int) -> None:
        """Set the number of candidates that a search keeps; it must be at least the `k` of the following searches."""
        self._index.set_ef(ef)
        self.ef = ef

    def every(self) -> Labels:
        """Return the labels of all nodes, deleted or not, int64 (nodes,)."""
        return np.array(self._index.get_ids_list(), dtype=np.int64)

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add nodes with new labels, int64 (n,), for prepared vectors, float32 (n, dimensions).

        Takes about 0.5 ms per vector. If the capacity is too small, it at least doubles.
        """
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
        """Return the prepared vectors of nodes, none of them deleted, in the order of `nodes`: float32 (n, d)."""
        if not nodes:
            return np.empty((0, self._spec.dimensions), dtype=np.float32)
        vectors: Matrix = np.asarray(self._index.get_items(nodes), dtype=np.float32)
        return vectors

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for the nodes nearest to each prepared query. If there are 16 or more, several cores share them.

        Args:
            queries: float32 (queries, dimensions).
            k: number of nodes to find for each query, at most half of the nodes that are not deleted, so that links
                seldom lead to too few nodes: hnswlib then raises an error and leaks the memory of its result.

        Returns:
            Nodes, int64 (queries, k), nearest first, and their scores, float32 of the same shape.

        Raises:
            GraphError: links lead to fewer than `k` nodes.
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
        """Search for a node that is nearly equal to each prepared vector.

        Args:
            vectors: float32 (vectors, dimensions).
            share: greatest distance of nearly equal vectors, as a share of the vector's length.
            ef: number of candidates that this search keeps.

        Returns:
            For each vector, whether a nearly equal node was found, bool (vectors,); and that node, int64 (vectors,),
            valid only where the first is true.
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
        # hnswlib returns 1 minus the inner product, from which the distance does not follow without the length of the
        # node's vector. Reading that vector is slow, so it is read only where the inner product is great enough for a
        # nearly equal vector.
        near = 1 - distance >= (1 - share) * squares
        rows = np.flatnonzero(near)
        differences = vectors[rows] - self.vectors(nodes[rows].tolist())
        near[rows] = np.einsum("ij,ij->i", differences, differences) <= share**2 * squares[rows]
        return near, nodes

    def missed(self, nodes: Labels, vectors: Matrix) -> Labels:
        """Return those of `nodes` that searches for their own vectors do not find, int64 (m,).

        A node also counts as found if no hit is farther away than the node, as among nodes at equal distances, or if
        it is the only node. If links lead to too few nodes for one search, all nodes that were not found before are
        returned.

        Args:
            nodes: the nodes to check, int64 (n,).
            vectors: their vectors, float32 (n, dimensions).
        """
        # The only node of a graph counts as found: no other node can hide it.
        suspects = np.arange(len(nodes) if self.count > 1 else 0)
        try:
            for maximum, ef in _CHECKS:
                if len(suspects):
                    k = min(maximum, self.count // 2)
                    self._index.set_ef(ef)
                    suspects = suspects[self._not_found(nodes[suspects], vectors[suspects], k)]
        except RuntimeError:
            pass  # links lead to fewer than k nodes: the suspects are not found
        finally:
            self._index.set_ef(max(1, self.ef))
        return nodes[suspects]

    def _not_found(self, nodes: Labels, vectors: Matrix, k: int) -> npt.NDArray[np.bool_]:
        """Search for `nodes`, int64 (n,), by their own `vectors`, with `k` hits for each vector.

        Returns:
            For each node, whether it is missing among the hits for its vector although one hit is farther away than
            the node: bool (n,).

        Raises:
            RuntimeError: links lead to fewer than `k` nodes for one of the vectors.
        """
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

        count = min(_helpers.maximum + 1, len(queries) // _PART)
        if count < 2:
            return nearest(queries)
        labels, distances = zip(*_helpers.each(nearest, np.array_split(queries, count)), strict=True)
        return np.concatenate(labels), np.concatenate(distances)

    def write(self, path: Path) -> None:
        """Write the graph to a file. hnswlib holds the GIL meanwhile, for example 0.7 s for 100,000 vectors.

        hnswlib reports no error on a full disk; the caller must compare the bytes of the file with `size`.
        """
        self._index.save_index(str(path))

    @classmethod
    def read(cls, spec: CollectionSpec, path: Path, dead: int) -> Hnsw:
        """Read a graph from a file that `write` wrote; the file must be unchanged, as hnswlib does not check it fully.

        Args:
            spec: the spec of the collection of which the file was written.
            path: the file.
            dead: number of deleted nodes in the file, which hnswlib does not tell.

        Raises:
            GraphError: hnswlib cannot read the file.
        """
        graph = cls(spec, 1)
        # hnswlib cannot load a file into an initialised index, so this index is not initialised. After loading, hnswlib
        # has an ef of 10, so `ef` of the graph stays 0 (not set).
        graph._made = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        try:
            graph._index.load_index(str(path), allow_replace_deleted=False)
        except RuntimeError as error:
            raise GraphError from error
        graph._index.set_num_threads(1)
        graph.dead, graph.count = dead, graph._index.get_current_count() - dead
        return graph
