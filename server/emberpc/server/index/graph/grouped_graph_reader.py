"""Searches of an HNSW graph with groups, so that nearly equal vectors do not hide other vectors from a search."""

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

#: Number of nodes that a search finds for each hit if there are groups, but at most ef nodes in all. It is more than 1,
#: since a leader may be less near to the query than a member of its group.
_LEADERS_PER_HIT = 5

#: Value in place of a leader for a stray: a vector that every search covers apart from the graph.
STRAY = -1
#: Value in place of a leader for a vector that is too short for the graph: every search compares these vectors too.
SHORT = -2


class Group(Protocol):
    """The group of a leader, a shell, the short vectors or the strays: a `Pool`, or a graph of its own.

    The labels in a group are the ids that the vectors have in the graph to which the group belongs.
    """

    def __len__(self) -> int: ...

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,)."""

    def remove(self, labels: set[int]) -> None:
        """Remove labels with their vectors; missing labels are ignored."""

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that exist, by label."""

    def search_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the `k` nearest labels for each prepared query, float32 (queries, dimensions), or all if fewer exist.

        Returns:
            Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
        """


class GroupedGraphReader:
    """Searches labelled vectors, most of which are nodes of an HNSW graph; `GroupedGraph` adds and removes them.

    A label is added once, and its vector never changes. Labels with equal vectors share one vector. The id of a vector
    is the label for which the vector was added, even if that label was removed. A vector stays until its last label is
    removed.

    Many nearly equal nodes would fill the candidates of a search, and the links that lead to other nodes. So a vector
    that is nearly equal to a node joins the group of that node, its leader, and is no node itself. A search that finds
    a leader searches the leader's group too. A leader whose own labels are removed is retained: its node stays while it
    has a group, but is no hit.

    A stray is a vector that searches for that vector did not find. Its node is deleted from the graph, and the vector
    is compared with every query. If there are many strays, they are nodes of a graph of strays, which is part of every
    search.

    With shells, the graph holds the vectors of the main shell. Each other shell is a group without a leader, which is
    part of every search. So are the vectors that are too short for a graph.

    `Neighbours` holds the lock: methods that change vectors or ef, and `check`, which may make strays, need the write
    side of the lock, other methods its read side. `Neighbours` reads some properties without the lock.

    Args:
        spec: dimensions, distance and parameters of the graph.
        capacity: number of nodes to allocate memory for, at least 1024 if `groups`; the capacity grows by itself.
        groups: whether nearly equal vectors are grouped.
        shells: shells into which the vectors are divided; None: no division.
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
        #: Present labels of each vector that has, or had, labels besides its id, by id. The inner dict is a set that
        #: keeps order and removes in constant time.
        self._members: dict[int, dict[int, None]] = {}
        #: Vector ids by hash. Of different vectors with equal hashes, only the vector that was added last is here.
        self._by_hash: dict[int, int] = {}
        #: Leader of each vector that is not a node, by id: a node or former node, `STRAY`, `SHORT` or a shell.
        self._leader_of: dict[int, int] = {}
        self._groups: dict[int, Group] = {}
        #: Strays: vectors that searches of the graph miss.
        self._strays: Group = Pool(spec.dimensions, spec.distance)
        #: Whether this graph has had strays, or a node that a search for its own vector missed, since it was created
        #: or loaded.
        self._has_missed = False
        #: Hashes of vectors that are or, since this graph was created or loaded, were strays. Such a vector becomes a
        #: stray again if it is added again: as a node it would take links of other nodes, so that searches miss those.
        self._stray_hashes: set[int] = set()
        #: Leaders whose groups are part of every search: leaders whose nodes searches missed, shells, and `SHORT`.
        self._searched_always: set[int] = set()
        #: Retained leaders: nodes with a group whose own labels are removed.
        self._retained: set[int] = set()
        #: Leader of each label in a loaded snapshot whose vector must still be read from the store.
        self._awaited: dict[int, int] = {}
        self._checked = 0
        #: Number of vectors that were added since the last complete check began; a repeated vector does not count.
        self._added = 0

    def __len__(self) -> int:
        return len(self._vector_of)

    @property
    def live(self) -> int:
        """Number of labels in this graph, its groups and its strays."""
        return len(self._vector_of)

    @property
    def dead_share(self) -> float:
        """Share of deleted nodes, 0 to 1, among all nodes of this graph and of the graphs of groups and strays.

        Deleted nodes slow down inserts and searches.
        """
        graphs = [self, *self._graphs()]
        dead = sum(graph._hnsw.dead for graph in graphs)
        return dead / max(1, dead + sum(graph._hnsw.count for graph in graphs))

    @property
    def stray_share(self) -> float:
        """Number of strays, divided by the sum of the numbers of strays and of nodes; 0 if there are none."""
        strays = self.strays
        return strays / max(1, strays + self._nodes_in_all)

    @property
    def _nodes_in_all(self) -> int:
        """Number of nodes that are not deleted, in this graph and in the graphs of groups, not in those of strays."""
        return self._hnsw.count + sum(graph._nodes_in_all for graph in _graphs_of(self._groups.values()))

    @property
    def strays(self) -> int:
        """Number of strays in this graph and in the graphs of groups: vectors that searches of the graphs miss."""
        return len(self._strays) + sum(graph.strays for graph in _graphs_of(self._groups.values()))

    @property
    def has_misses(self) -> bool:
        """Whether this graph or that of a group has had strays or missed nodes since it was created or loaded."""
        return self._has_missed or any(graph.has_misses for graph in _graphs_of(self._groups.values()))

    @property
    def shells(self) -> Shells | None:
        """Shells into which the vectors are divided; None: no division."""
        return self._shells

    @property
    def nodes(self) -> int:
        """Number of nodes of this graph, with retained leaders, without deleted nodes and nodes in graphs of groups."""
        return self._hnsw.count

    @property
    def to_check(self) -> int:
        """Number of ids that `begin_check` returns: of nodes, retained leaders, members of groups, and strays."""
        return self._hnsw.count + len(self._leader_of)

    @property
    def checked(self) -> int:
        """Value of `to_check` when the last complete check ended; 0 before the first."""
        return self._checked

    @property
    def added(self) -> int:
        """Number of vectors that were added since the last complete check began; after loading, an estimate.

        A vector equal to one that was there already does not count.
        """
        return self._added

    @property
    def ef(self) -> int:
        """Number of candidates that a search of the graph keeps; 0 before `set_ef` is called."""
        return self._hnsw.ef

    def set_ef(self, ef: int) -> None:
        """Set the number of candidates that a search keeps, in this graph and in those of groups and strays.

        `ef` must be at least the `k` of the following searches.
        """
        self._hnsw.set_ef(ef)
        for graph in _graphs_of((*self._groups.values(), self._strays)):
            graph.set_ef(ef)

    def labels(self) -> set[int]:
        """Return the labels in this graph, its groups and its strays."""
        return set(self._vector_of)

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that exist, by label."""
        here = [label for label in labels if label in self._vector_of]
        return dict(zip(here, self._vectors([self._vector_of[label] for label in here]), strict=True))

    def node_labels(self) -> list[int]:
        """Return one label of each node, also in the graph of a shell, and of each vector in the pool of a shell.

        So the result has few nearly equal vectors, except those in the pool of a shell. Strays, short vectors and the
        members of a leader's group are left out, as are retained leaders, which have no label.
        """
        vector_ids = self._node_ids()
        for leader, group in self._groups.items():
            if leader < SHORT:
                vector_ids += group.all()[0].tolist() if isinstance(group, Pool) else group.node_labels()  # type: ignore[attr-defined]  # a group is one of the two
        return [next(iter(self._members.get(vector_id, (vector_id,)))) for vector_id in vector_ids]

    def search(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for the labels nearest to each prepared query, by the graph, its groups and the strays.

        Args:
            queries: float32 (queries, dimensions).
            k: number of labels to find for each query, at most the ef that `set_ef` set.

        Returns:
            Labels, int64 (queries, k), nearest first, and their scores, float32 of the same shape. If there are no
            labels, both have the shape (queries, 0).

        Raises:
            GraphError: links lead to too few nodes, or `k` is at least half of the number of labels. The caller must
                then compare all vectors.
        """
        # To find half of all labels, comparing all vectors is as quick as a search of the graph.
        live = len(self._vector_of)
        if 2 * min(k, live) >= live > 0:
            raise GraphError
        if not live:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        # A leader may be less near to the query than its group, so with groups more than `k` nodes must be found.
        # Labels with equal vectors share a node, so there may be few nodes: then all vectors are compared.
        wide = _LEADERS_PER_HIT * k if self._groups else k
        if 2 * wide >= self._hnsw.count:
            return self._expand(*self._compare_all(queries, k), k)
        return self._expand(*self._search_graph(queries, k, max(k, min(wide, self.ef))), k)

    def search_all(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search for the `k` labels nearest to each query, or all if there are fewer; arguments as for `search`.

        If `search` raises GraphError, compare the queries with all nodes instead.

        Returns:
            Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
        """
        try:
            return self.search(queries, k)
        except GraphError:
            k = min(k, self.live)
            return self._expand(*self._compare_all(queries, k), k)

    def _group(self, leader: int) -> Group:
        """Return the group of a leader; for `STRAY`, the strays."""
        return self._strays if leader == STRAY else self._groups[leader]

    def _graphs(self) -> list[GroupedGraphReader]:
        """Return the graphs of groups and of strays, and recursively their own graphs of groups and of strays."""
        graphs = _graphs_of((*self._groups.values(), self._strays))
        return [each for graph in graphs for each in (graph, *graph._graphs())]

    def _node_ids(self) -> list[int]:
        """Return the ids of the vectors that are nodes of this graph, without retained leaders."""
        return [vector_id for vector_id in dict.fromkeys(self._vector_of.values()) if vector_id not in self._leader_of]

    def _vectors(self, vector_ids: list[int]) -> Matrix:
        """Return the vectors with the given ids, which must exist, in the order of these: float32 (ids, dimensions)."""
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
        """Search the graph for `wide` nodes for each query, then groups (as `_search_groups`), and the strays.

        `wide` is at least `k`.

        Returns:
            The ids of the nearest vectors and their scores, best first: (queries, k), or (queries, wide) if the graph
            has neither groups nor strays.

        Raises:
            GraphError: links lead to too few nodes.
        """
        nodes, scores = self._hnsw.search(queries, wide)
        if self._groups:
            nodes, scores = self._search_groups(queries, nodes, scores, k)
        if len(self._strays):
            nodes, scores = best_of([(nodes, scores), self._strays.search_all(queries, k)], k)
        return nodes, scores

    def _search_groups(self, queries: Matrix, nodes: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search the groups of the nodes that were found for each query, and the groups that belong to every search.

        Args:
            queries: prepared queries, float32 (queries, dimensions).
            nodes: the nodes found for each query, best first, int64 (queries, n).
            scores: the nodes' scores, float32 (queries, n).
            k: number of vectors to find for each query, at most `n`.

        Returns:
            The ids of the `k` best vectors for each query (members of groups, and nodes that are not retained leaders),
            best first, and their scores: (queries, k).
        """
        rows_of = {leader: list(range(len(queries))) for leader in self._searched_always}
        for row, found in enumerate(nodes.tolist()):
            if not self._groups.keys().isdisjoint(found):
                for node in found:
                    if node in self._groups:
                        rows_of.setdefault(node, []).append(row)
        if self._retained:
            scores = np.where(np.isin(nodes, list(self._retained)), -np.inf, scores).astype(np.float32)
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
        """Compare the queries with all nodes, and search the strays and all groups by their `search_all`.

        Returns:
            Ids of the nearest vectors, best first, and their scores: (queries, at most k).
        """
        every = self._node_ids() if self._hnsw.count else []
        rows, scores = nearest(queries, self._hnsw.vectors(every), k, self._spec.distance)
        parts = [(np.array(every, dtype=np.int64)[rows], scores), self._strays.search_all(queries, k)]
        return best_of([*parts, *(group.search_all(queries, k) for group in self._groups.values())], k)

    def _expand(self, vector_ids: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Replace the ids of vectors by labels: a vector may have several labels.

        Args:
            vector_ids: for each query, best first, ids of vectors that together have at least `k` labels. If no vector
                has several labels, exactly `k` ids.
            scores: the scores of these vectors, of the same shape.
            k: number of labels to return for each query.

        Returns:
            The first `k` labels for each query, best first, and their scores: (queries, k).
        """
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
    """Return those groups that are graphs. Reads a copy, since a write may change the groups' dictionary meanwhile."""
    return [group for group in tuple(groups) if isinstance(group, GroupedGraphReader)]
