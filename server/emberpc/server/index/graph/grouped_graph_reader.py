"""Searches of vectors in an HNSW graph and in groups of nearly equal vectors, so that none hides another."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import numpy as np

from emberpc.server.collections.metric import best_of, nearest
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix
from emberpc.server.index.graph.hnsw import FIRST_CAPACITY, GraphError, Hnsw
from emberpc.server.index.graph.pool import Pool
from emberpc.server.index.graph.shells import Shells

#: Nodes that a search reads for each hit if there are groups, since a leader may be less near than its group.
_LEADERS_PER_HIT = 5

#: Stands for the leader of a stray: a vector that is compared with every query.
STRAY = -1
#: As `STRAY`, for a vector that is too short for the graph.
SHORT = -2


class Group(Protocol):
    """Vectors outside the graph, by label: a `Pool`, or a graph of their own."""

    def __len__(self) -> int: ...

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,)."""

    def remove(self, labels: set[int]) -> None:
        """Remove those of the labels that exist."""

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that exist."""

    def search_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the `k` nearest labels for each query, or all if there are fewer, and their scores."""


class GroupedGraphReader:
    """Searches labelled vectors, most of which are nodes of an HNSW graph; `GroupedGraph` adds and removes them.

    A label is added once and never changed. Labels with equal vectors share one vector. Its id is the label that it was
    added for, and it stays until its last label is removed.

    Many nearly equal nodes would fill the candidates of a search, and the links that lead to other nodes. So a vector
    that is nearly equal to a node joins the group of that node, its leader, and is no node itself. A search that finds
    a leader searches its group too. A leader whose own labels are removed is a ghost: it stays while it has a group.

    A stray is a node that searches for its own vector did not find. It is deleted from the graph, and its vector is
    compared with every query. If there are many strays, they are nodes of a graph of strays, which every search
    searches.

    With shells, the graph holds the vectors of the main shell. Each other shell is a group without a leader, which
    every search searches.

    `Neighbours` holds the lock: `search` and `save` need its read side, all other methods its write side.

    Args:
        spec: dimensions, distance and parameters.
        capacity: nodes to allocate; the capacity grows by itself.
        groups: whether nearly equal vectors are grouped.
        shells: shells with graphs of their own; None: all vectors are in one graph.
    """

    def __init__(
        self,
        spec: CollectionSpec,
        capacity: int = FIRST_CAPACITY,
        *,
        groups: bool = True,
        shells: Shells | None = None,
    ) -> None:
        self._spec = spec
        self._shells = shells
        self._has_groups = groups
        self._hnsw = Hnsw(spec, max(capacity, FIRST_CAPACITY if groups else 1))
        #: Vector id of each label.
        self._vector_of: dict[int, int] = {}
        #: Labels of each vector that has other labels than its id. A dict keeps the order and removes in constant time.
        self._members: dict[int, dict[int, None]] = {}
        #: Vector ids by hash. Of two vectors with one hash, only the later is here.
        self._by_hash: dict[int, int] = {}
        #: Leader of each vector that is not a node, or `STRAY`, `SHORT` or a shell.
        self._leader_of: dict[int, int] = {}
        self._groups: dict[int, Group] = {}
        #: Vectors that no search of the graph found.
        self._strays: Group = Pool(spec.dimensions, spec.distance)
        #: Whether a search for a node did not find it.
        self._has_missed = False
        #: Hashes of vectors that were strays. Added again they become strays again: as nodes they would cut off others.
        self._stray_hashes: set[int] = set()
        #: Leaders whose groups every search searches: leaders that no search found, shells, and `SHORT`.
        self._searched_always: set[int] = set()
        #: Leaders whose own labels are removed.
        self._ghosts: set[int] = set()
        #: Leaders of labels in a snapshot whose vectors must still be read from the store.
        self._awaited: dict[int, int] = {}
        self._checked = 0
        #: Vectors that were added since the last complete check began.
        self._added = 0

    def __len__(self) -> int:
        return len(self._vector_of)

    @property
    def live(self) -> int:
        """Number of labels that searches can find."""
        return len(self._vector_of)

    @property
    def dead_share(self) -> float:
        """Share of the nodes that are deleted; they slow down every insert and search."""
        graphs = [self, *self._graphs()]
        dead = sum(graph._hnsw.dead for graph in graphs)
        return dead / max(1, dead + sum(graph._hnsw.count for graph in graphs))

    @property
    def stray_share(self) -> float:
        """Share of strays in the vectors that are or were nodes."""
        strays = self.strays
        return strays / max(1, strays + self._nodes_in_all)

    @property
    def _nodes_in_all(self) -> int:
        """Number of nodes that are not deleted, in this graph and in those of groups."""
        return self._hnsw.count + sum(graph._nodes_in_all for graph in _graphs_of(self._groups.values()))

    @property
    def strays(self) -> int:
        """Number of vectors that no search of a graph found, so that they are compared with every query."""
        return len(self._strays) + sum(graph.strays for graph in _graphs_of(self._groups.values()))

    @property
    def has_misses(self) -> bool:
        """Whether a search of a graph missed a node since the graphs were created."""
        return self._has_missed or any(graph.has_misses for graph in _graphs_of(self._groups.values()))

    @property
    def shells(self) -> Shells | None:
        """Shells that have graphs of their own."""
        return self._shells

    @property
    def nodes(self) -> int:
        """Number of nodes that are not deleted."""
        return self._hnsw.count

    @property
    def to_check(self) -> int:
        """Number of nodes and of vectors in groups, which a complete check covers."""
        return self._hnsw.count + len(self._leader_of)

    @property
    def checked(self) -> int:
        """Value of `to_check` when the last complete check ended."""
        return self._checked

    @property
    def added(self) -> int:
        """Number of vectors, without copies, that were added since the last complete check began."""
        return self._added

    @property
    def ef(self) -> int:
        """Candidates that a search keeps."""
        return self._hnsw.ef

    def set_ef(self, ef: int) -> None:
        """Set how many candidates a search keeps; at least the `k` of the following searches."""
        self._hnsw.set_ef(ef)
        for graph in _graphs_of((*self._groups.values(), self._strays)):
            graph.set_ef(ef)

    def labels(self) -> set[int]:
        """Return the labels that searches can find."""
        return set(self._vector_of)

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that exist."""
        here = [label for label in labels if label in self._vector_of]
        return dict(zip(here, self._vectors([self._vector_of[label] for label in here]), strict=True))

    def representatives(self) -> list[int]:
        """Return one label of each node, and of each vector in a shell's pool; none of strays or short vectors."""
        vector_ids = self._node_ids()
        for leader, group in self._groups.items():
            if leader < SHORT:
                vector_ids += group.all()[0].tolist() if isinstance(group, Pool) else group.representatives()  # type: ignore[attr-defined]  # a group is one of the two
        return [next(iter(self._members.get(vector_id, (vector_id,)))) for vector_id in vector_ids]

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for prepared queries, float32 (queries, dimensions).

        Args:
            queries: the queries.
            k: labels to find for each query; at most the number of labels counts.

        Returns:
            Labels, int64 (queries, found), nearest first, and their scores, float32 of the same shape.

        Raises:
            GraphError: links lead to too few nodes, or k is at least half of the labels.
        """
        # For half of all labels, comparing all vectors is as quick.
        live = len(self._vector_of)
        if 2 * min(k, live) >= live > 0:
            raise GraphError
        if not live:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        # A leader may be less near than its group, so with groups more nodes must be found than hits are wanted.
        # Records with equal vectors share a node. If there are few nodes for that, all vectors are compared.
        wide = _LEADERS_PER_HIT * k if self._groups else k
        if 2 * wide >= self._hnsw.count:
            return self._expand(*self._compare_all(queries, k), k)
        return self._expand(*self._search_graph(queries, k, max(k, min(wide, self.ef))), k)

    def search_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search as `search`; compare all vectors if the graph fails. Finds `k` labels, or all if there are fewer."""
        try:
            return self.search(queries, k)
        except GraphError:
            k = min(k, self.live)
            return self._expand(*self._compare_all(queries, k), k)

    def _group(self, leader: int) -> Group:
        """Return the group of a leader, or the strays."""
        return self._strays if leader == STRAY else self._groups[leader]

    def _graphs(self) -> list[GroupedGraphReader]:
        """Return the graphs of groups, and of groups within those."""
        graphs = _graphs_of((*self._groups.values(), self._strays))
        return [each for graph in graphs for each in (graph, *graph._graphs())]

    def _node_ids(self) -> list[int]:
        """Return the ids of the vectors that are nodes."""
        return [vector_id for vector_id in dict.fromkeys(self._vector_of.values()) if vector_id not in self._leader_of]

    def _vectors(self, vector_ids: list[int]) -> Matrix:
        """Return vectors by id, float32 (ids, dimensions)."""
        if self._leader_of.keys().isdisjoint(vector_ids):
            return self._hnsw.vectors(vector_ids)
        by_leader: dict[int | None, list[int]] = {}
        for vector_id in vector_ids:
            by_leader.setdefault(self._leader_of.get(vector_id), []).append(vector_id)
        nodes = by_leader.pop(None, [])
        held = dict(zip(nodes, self._hnsw.vectors(nodes), strict=True))
        for leader, its in by_leader.items():
            held |= self._group(leader).held(its)  # type: ignore[arg-type]  # None was removed
        return np.stack([held[vector_id] for vector_id in vector_ids])

    def _search_graph(self, queries: Matrix, k: int, wide: int) -> tuple[Labels, Matrix]:
        """Search the graph for `wide` nodes per query, then their groups and the strays.

        Returns:
            The ids of the nearest vectors and their scores, best first. Shape (queries, k) if the graph has groups or
            strays, else (queries, wide).
        """
        nodes, scores = self._hnsw.search(queries, wide)
        if self._groups:
            nodes, scores = self._search_groups(queries, nodes, scores, k)
        if len(self._strays):
            nodes, scores = best_of([(nodes, scores), self._strays.search_all(queries, k)], k)
        return nodes, scores

    def _search_groups(self, queries: Matrix, nodes: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search the groups of the nodes that were found for each query.

        Returns:
            The ids of the `k` best nodes and group members, and their scores, (queries, k).
        """
        rows_of = {leader: list(range(len(queries))) for leader in self._searched_always}
        for row, found in enumerate(nodes.tolist()):
            if not self._groups.keys().isdisjoint(found):
                for node in found:
                    if node in self._groups:
                        rows_of.setdefault(node, []).append(row)
        if self._ghosts:
            scores = np.where(np.isin(nodes, list(self._ghosts)), -np.inf, scores).astype(np.float32)
        best = nodes[:, :k].copy(), scores[:, :k].copy()
        parts: dict[int, list[tuple[Labels, Matrix]]] = {}
        for leader, rows in rows_of.items():
            its_ids, its_scores = self._groups[leader].search_all(queries[rows], k)
            for i, row in enumerate(rows):
                parts.setdefault(row, []).append((its_ids[i : i + 1], its_scores[i : i + 1]))
        for row, others in parts.items():
            own = (nodes[row : row + 1], scores[row : row + 1])
            best[0][row], best[1][row] = (part[0] for part in best_of([own, *others], k))
        return best

    def _compare_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Compare the queries with all vectors; return ids and scores of the nearest, (queries, at most k) each."""
        every = self._node_ids() if self._hnsw.count else []
        rows, scores = nearest(queries, self._hnsw.vectors(every), k, self._spec.distance)
        parts = [(np.array(every, dtype=np.int64)[rows], scores), self._strays.search_all(queries, k)]
        return best_of([*parts, *(group.search_all(queries, k) for group in self._groups.values())], k)

    def _expand(self, vector_ids: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Replace at least `k` vector ids for each query by their first `k` labels; return these with their scores."""
        if not self._members:
            return vector_ids, scores
        labels = np.empty((len(vector_ids), k), dtype=np.int64)
        expanded = np.empty((len(vector_ids), k), dtype=np.float32)
        for row, (found, its_scores) in enumerate(zip(vector_ids.tolist(), scores.tolist(), strict=True)):
            filled = 0
            for vector_id, score in zip(found, its_scores, strict=True):
                members = list(islice(self._members.get(vector_id, (vector_id,)), k - filled))
                labels[row, filled : filled + len(members)] = members
                expanded[row, filled : filled + len(members)] = score
                filled += len(members)
                if filled == k:
                    break
        return labels, expanded


def _graphs_of(groups: Iterable[Group]) -> list[GroupedGraphReader]:
    """Return those groups that have a graph of their own."""
    return [group for group in groups if isinstance(group, GroupedGraphReader)]
