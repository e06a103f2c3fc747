"""hnswlib, guarded: nothing reaches it that could crash it or make it lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

from emberpc.server.index.children import in_child
from emberpc.server.index.helpers import Helpers
from emberpc.server.index.metric import SPACES, graph_scores, nearest
from emberpc.server.index.types import CollectionSpec, Labels, Matrix

_FIRST_CAPACITY = 1024
#: Queries that are worth a helper: some milliseconds of work.
_PART = 8
#: Node vectors that are read at a time when a snapshot is loaded.
_READ_BATCH = 2000
_helpers: Helpers[Matrix, tuple[npt.NDArray[np.uint64], Matrix]] = Helpers()


class GraphError(Exception):
    """The graph cannot answer, or a file holds no graph; vectors can still be compared one by one."""


@dataclass(frozen=True)
class Saving:
    """A graph as it stood when its writing began.

    Attributes:
        size: bytes of its file.
        live: number of labels that can be found.
        dead: nodes that are deleted.
        members: labels of each node that has other labels than its own.
        newest: the greatest label or node, 0 for none.
        wait: waits until the file is written.
    """

    size: int
    live: int
    dead: Labels
    members: dict[int, list[int]]
    newest: int
    #: To be called once, by the thread that began it; raises OSError if the file was not written.
    wait: Callable[[], None]


class Graph:
    """An HNSW graph over labelled vectors.

    A label is added once and never changed: an in-place update costs 27 times an
    insert. Vectors must be prepared and checked (`metric`).

    Labels with equal vectors share one node: links among many equal nodes would
    take the place of the links that lead to other vectors. A node is named by the
    label that it was added for, and stays until its last label is removed.

    hnswlib must not be searched while something is added, and crashes if it is
    resized meanwhile. `Neighbours` holds the lock: `search` and `save` need its
    read side, all else its write side.

    hnswlib's index is made with the first vector: it takes 2.6 MB for its locks
    alone, and a small collection is searched without a graph.

    Args:
        spec: dimensions, distance and parameters.
        capacity: nodes to make room for; it grows by itself.
    """

    def __init__(self, spec: CollectionSpec, capacity: int = _FIRST_CAPACITY) -> None:
        self._spec = spec
        #: Node of each label that can be found.
        self._node_of: dict[int, int] = {}
        #: Labels of each node whose labels are not just the one that it is named by. A dict, since that keeps the
        #: order and removes in constant time.
        self._members: dict[int, dict[int, None]] = {}
        #: Nodes by the hash of their vectors. Of two nodes with one hash, only the later is here.
        self._by_hash: dict[int, int] = {}
        self._nodes = 0
        # hnswlib's own get_current_count counts the deleted ones too.
        self._dead = 0
        self._ef = 0
        self._capacity = max(capacity, _FIRST_CAPACITY)
        self._made: hnswlib.Index | None = None

    @property
    def _index(self) -> hnswlib.Index:
        """The index of hnswlib; made when it is first needed."""
        if self._made is None:
            index = hnswlib.Index(space=SPACES[self._spec.distance], dim=self._spec.dimensions)
            index.init_index(self._capacity, ef_construction=self._spec.ef_construction, M=self._spec.m)
            # Searches come from several threads already.
            index.set_num_threads(1)
            self._made = index
        return self._made

    @property
    def live(self) -> int:
        """Number of labels that can be found."""
        return len(self._node_of)

    @property
    def dead_share(self) -> float:
        """Share of the nodes that are deleted; they slow down every insert and search."""
        return self._dead / max(1, self._dead + self._nodes)

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
        return set(self._node_of)

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that can be found."""
        here = [label for label in labels if label in self._node_of]
        if not here:
            return {}
        return dict(zip(here, self._vectors([self._node_of[label] for label in here]), strict=True))

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,); about 0.5 ms each."""
        # This would be the heap's corruption otherwise.
        if vectors.shape != (len(labels), self._spec.dimensions) or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
        # Nothing here changes until hnswlib has the new nodes, so an add that fails can be repeated.
        row_of: dict[int, int] = {}
        new_hashes: dict[int, int] = {}
        nodes: list[int] = []
        for row, label in enumerate(labels.tolist()):
            key = _hash(vectors[row])
            node = new_hashes.get(key, self._by_hash.get(key))
            if node is not None:
                known = vectors[row_of[node]] if node in row_of else self._vectors([node])[0]
            if node is None or not np.array_equal(known, vectors[row]):
                node = new_hashes[key] = label
                row_of[label] = row
            nodes.append(node)
        need = self._nodes + self._dead + len(row_of)
        rows = list(row_of.values())
        if rows and need > self._index.get_max_elements():
            self._index.resize_index(max(need, self._index.get_max_elements() * 2))
        if rows:
            self._index.add_items(vectors[rows], labels[rows], num_threads=1)
        self._nodes += len(rows)
        self._by_hash.update(new_hashes)
        for label, node in zip(labels.tolist(), nodes, strict=True):
            if node != label:
                self._members.setdefault(node, {node: None})[label] = None
            self._node_of[label] = node

    def remove(self, labels: set[int]) -> None:
        """Delete those of the labels that are there."""
        for label in labels & self._node_of.keys():
            node = self._node_of.pop(label)
            members = self._members.get(node)
            if members is not None:
                del members[label]
                if members:
                    continue
                del self._members[node]
            key = _hash(self._vectors([node])[0])
            if self._by_hash.get(key) == node:
                del self._by_hash[key]
            self._index.mark_deleted(node)
            self._nodes -= 1
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
        live = len(self._node_of)
        if 2 * min(k, live) >= live > 0:
            raise GraphError
        if not live:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        if 2 * k >= self._nodes:
            # Few nodes have many labels.
            every = np.array(list(dict.fromkeys(self._node_of.values())), dtype=np.int64)
            rows, scores = nearest(queries, self._vectors(every.tolist()), k, self._spec.distance)
            return self._expanded(every[rows], scores, k)
        try:
            labels, distances = self._nearest(queries, k)
        except RuntimeError as error:
            raise GraphError from error
        return self._expanded(labels.view(np.int64), graph_scores(distances, self._spec.distance), k)

    def _expanded(self, nodes: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the first `k` labels of the nodes found for each query, and their scores; there must be that many."""
        if not self._members:
            return nodes, scores
        labels = np.empty((len(nodes), k), dtype=np.int64)
        expanded = np.empty((len(nodes), k), dtype=np.float32)
        for row, (found, its_scores) in enumerate(zip(nodes.tolist(), scores.tolist(), strict=True)):
            filled = 0
            for node, score in zip(found, its_scores, strict=True):
                members = list(islice(self._members.get(node, (node,)), k - filled))
                labels[row, filled : filled + len(members)] = members
                expanded[row, filled : filled + len(members)] = score
                filled += len(members)
                if filled == k:
                    break
        return labels, expanded

    def _vectors(self, nodes: list[int]) -> Matrix:
        """Return the vectors of nodes that are not deleted, float32 (nodes, dimensions)."""
        vectors: Matrix = np.asarray(self._index.get_items(nodes), dtype=np.float32)
        return vectors

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
        dead = np.setdiff1d(every, np.array(list(self._node_of.values()), dtype=np.int64))
        members = {node: list(labels) for node, labels in self._members.items()}
        newest = max(int(every.max(initial=0)), max(self._node_of, default=0))
        # hnswlib holds the GIL meanwhile, 0.7 s at 100,000 vectors, and every call would stand still.
        wait = in_child(lambda: self._index.save_index(str(path)))
        return Saving(self._index.index_file_size(), len(self._node_of), dead, members, newest, wait)

    @classmethod
    def load(cls, spec: CollectionSpec, path: Path, dead: Labels, members: dict[int, list[int]]) -> Graph:
        """Read what `save` wrote; the caller has checked that the file is unchanged and of this spec.

        Raises:
            GraphError: hnswlib does not take it.
        """
        graph = cls(spec)
        # A new index, since one that is initialised does not load; its ef is 10, so `_ef` stays unset.
        graph._made = hnswlib.Index(space=SPACES[spec.distance], dim=spec.dimensions)
        try:
            graph._index.load_index(str(path), allow_replace_deleted=False)
        except RuntimeError as error:
            raise GraphError from error
        graph._index.set_num_threads(1)
        nodes = sorted(set(graph._index.get_ids_list()) - set(dead.tolist()))
        graph._dead, graph._nodes = len(dead), len(nodes)
        graph._members = {node: dict.fromkeys(labels) for node, labels in members.items()}
        for start in range(0, len(nodes), _READ_BATCH):
            part = nodes[start : start + _READ_BATCH]
            for node, vector in zip(part, graph._vectors(part), strict=True):
                graph._by_hash[_hash(vector)] = node
                for label in graph._members.get(node, (node,)):
                    graph._node_of[label] = node
        return graph


def _hash(vector: Matrix) -> int:
    """Return a hash, within this process, of a vector, float32 (dimensions,); equal vectors have one hash."""
    # -0.0 equals 0.0 and has other bytes.
    return hash((vector + np.float32(0)).tobytes())
