"""The vectors of a collection behind an HNSW graph in which equal and nearly equal ones hide no other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import numpy as np

from emberpc.server.collections.metric import are_short, best_of, nearest
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix
from emberpc.server.index.graph.hnsw import FIRST_CAPACITY, GraphError, Hnsw
from emberpc.server.index.graph.pool import Pool
from emberpc.server.index.graph.shells import MAIN, Shells

#: Vectors are nearly equal if their distance is at most this share of their length: a cosine of 0.9998.
_NEAR = 0.02
#: Nodes that a search reads for each hit where there are groups, since a leader may be less near than its group.
_LEADERS_PER_HIT = 5
#: Candidates of the search for a nearly equal vector: a twentieth of an insert. The way to one is easy to find.
_LEADER_EF = 2
#: A group of more vectors has an HNSW graph of its own. Inserting 128 vectors takes some 10 ms.
_MOST_COMPARED = 128
#: As many strays are compared with every query, in less time than a search of a graph takes; more have a graph.
_MOST_STRAYS_COMPARED = 500
#: Capacity of the graph of a group.
_GROUP_CAPACITY = 2 * _MOST_COMPARED

#: Instead of a leader: the vector is compared with every query.
STRAY = -1
#: As `STRAY`, since the vector is too short for the graph.
SHORT = -2


class _Group(Protocol):
    """Vectors outside the graph, by label: a `Pool`, or `GroupedVectors`."""

    def __len__(self) -> int: ...
    def add(self, labels: Labels, vectors: Matrix) -> None: ...
    def remove(self, labels: set[int]) -> None: ...
    def held(self, labels: list[int]) -> dict[int, Matrix]: ...
    def found(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]: ...


class GroupedVectors:
    """Labelled vectors, most of them nodes of an HNSW graph. A label is added once and never changed.

    Labels with equal vectors share one vector, which is named by the label that it was added for, and stays until its
    last label is removed. Many nodes that are nearly equal would take up the candidates of a search, and the links that
    lead to other nodes. So a vector that is nearly equal to a node, its leader, joins the group of that leader and is
    no node. A search that finds a leader searches its group too. A node that searches for its own vector do not find is
    a stray: it is deleted from the graph and its vector is compared with every query, or if there are many it is a node
    of a graph of strays, which every search searches.

    With shells, the graph holds the vectors of the main shell, and each other shell is a group without a leader, which
    every search searches.

    `Neighbours` holds the lock: `search` and `save` need its read side, all else its write side.

    Args:
        spec: dimensions, distance and parameters.
        capacity: nodes to make room for; it grows by itself.
        groups: whether nearly equal vectors are grouped.
        shells: shells that have graphs of their own; None: all vectors are in one graph.
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
        #: Vector of each label that can be found.
        self._vector_of: dict[int, int] = {}
        #: Labels of each vector whose labels are not just the one that it is named by. A dict, since that keeps the
        #: order and removes in constant time.
        self._members: dict[int, dict[int, None]] = {}
        #: Vectors by their hash. Of two with one hash, only the later is here.
        self._by_hash: dict[int, int] = {}
        #: Leader of each vector that is no node, or STRAY.
        self._leader_of: dict[int, int] = {}
        self._groups: dict[int, _Group] = {}
        #: Vectors that no search of the graph found.
        self._strays: _Group = Pool(spec.dimensions, spec.distance)
        #: Whether a search for a node did not find it.
        self._has_missed = False
        #: Hashes of vectors that were strays. Added again they are strays again: as nodes they would cut off others.
        self._stray_hashes: set[int] = set()
        #: Groups that every search searches: of leaders that no search found, of shells, of short vectors.
        self._searched_always: set[int] = set()
        #: Leaders whose own labels are removed.
        self._ghosts: set[int] = set()
        #: Leaders of labels that a snapshot has, and whose vectors are to be read.
        self._awaited: dict[int, int] = {}
        self._checked = 0
        #: Vectors that were added since the last check of all began.
        self._added = 0

    def __len__(self) -> int:
        return len(self._vector_of)

    @property
    def live(self) -> int:
        """Number of labels that can be found."""
        return len(self._vector_of)

    @property
    def dead_share(self) -> float:
        """Share of the nodes that are deleted; they slow down every insert and search."""
        graphs = [self, *self._graphs()]
        dead = sum(graph._hnsw.dead for graph in graphs)
        return dead / max(1, dead + sum(graph._hnsw.count for graph in graphs))

    @property
    def stray_share(self) -> float:
        """Share of the vectors in graphs, or that were, that are compared with every query."""
        strays = self.strays
        return strays / max(1, strays + self._nodes_in_all)

    @property
    def _nodes_in_all(self) -> int:
        """Number of nodes that are not deleted, of this graph and of those of groups."""
        return self._hnsw.count + sum(graph._nodes_in_all for graph in _graphs_of(self._groups.values()))

    @property
    def strays(self) -> int:
        """Number of vectors that no search of a graph found, so that they are compared with every query."""
        return len(self._strays) + sum(graph.strays for graph in _graphs_of(self._groups.values()))

    @property
    def has_misses(self) -> bool:
        """Whether a search of a graph missed a node since the graphs were made."""
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
        """Number of nodes and of vectors in groups."""
        return self._hnsw.count + len(self._leader_of)

    @property
    def checked(self) -> int:
        """What `to_check` was when the last check of all ended."""
        return self._checked

    @property
    def added(self) -> int:
        """Number of vectors, without copies, that were added since the last check of all began."""
        return self._added

    @property
    def ef(self) -> int:
        """Candidates that a search keeps."""
        return self._hnsw.ef

    def set_ef(self, ef: int) -> None:
        """Set how many candidates a search keeps; at least the `k` of the searches that follow."""
        self._hnsw.set_ef(ef)
        for graph in _graphs_of((*self._groups.values(), self._strays)):
            graph.set_ef(ef)

    def labels(self) -> set[int]:
        """Return the labels that can be found."""
        return set(self._vector_of)

    def held(self, labels: list[int]) -> dict[int, Matrix]:
        """Return the vectors, float32 (dimensions,), of those labels that can be found."""
        here = [label for label in labels if label in self._vector_of]
        return dict(zip(here, self._vectors([self._vector_of[label] for label in here]), strict=True))

    def representatives(self) -> list[int]:
        """Return one label of each node: of equal and nearly equal vectors, one."""
        nodes = self._node_vectors()
        for leader, group in self._groups.items():
            if leader < SHORT:
                nodes += group.all()[0].tolist() if isinstance(group, Pool) else group.representatives()  # type: ignore[attr-defined]  # there is no third
        return [next(iter(self._members.get(node, (node,)))) for node in nodes]

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,); about 0.5 ms each."""
        # This would be the heap's corruption otherwise.
        if vectors.shape != (len(labels), self._spec.dimensions) or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
        # Nothing here changes until hnswlib has the new nodes, so an add that fails can be repeated.
        names, row_of, hashes = self._known(labels, vectors)
        rows = np.array(list(row_of.values()), dtype=np.int64)
        leaders = self._leaders(labels[rows], vectors[rows])
        new = rows[leaders == labels[rows]]
        self._hnsw.add(labels[new], vectors[new])
        self._join(leaders, labels[rows], vectors[rows])
        self._added += len(rows)
        self._name(labels, names, hashes)
        self._check(labels[new], vectors[new])
        # A record that is not found is upserted again, and must be found then. If its vector was known, its node or its
        # leader may be the one that is not found.
        known = set(names) - set(labels[rows].tolist())
        self.check(known | {self._leader_of.get(name, name) for name in known})

    def check(self, names: Iterable[int]) -> None:
        """Search for nodes, of this graph or a group's, by their vectors; make strays of the missed ones."""
        here: list[int] = []
        by_leader: dict[int, list[int]] = {}
        for name in names:
            leader = self._leader_of.get(name)
            if leader is not None:
                by_leader.setdefault(leader, []).append(name)
            elif self._is_node(name):
                here.append(name)
        if here:
            self._check(np.array(here, dtype=np.int64), self._hnsw.vectors(here))
        for leader, its in by_leader.items():
            group = self._group(leader)
            if isinstance(group, GroupedVectors):
                group.check(its)

    def check_labels(self, labels: Iterable[int]) -> None:
        """As `check`, of the vectors of those labels that are there."""
        self.check({self._vector_of[label] for label in labels if label in self._vector_of})

    def compare_always(self, labels: Iterable[int]) -> None:
        """Compare the vectors of those labels that are there with every query, since searches miss them."""
        for name in {self._vector_of[label] for label in labels if label in self._vector_of}:
            leader = self._leader_of.get(name)
            if leader is None:
                self._leave_out(name, self._hnsw.vectors([name]))
                continue
            group = self._group(leader)
            if leader != STRAY and leader not in self._searched_always:
                self._take_out(name, leader, group)
            elif isinstance(group, GroupedVectors):
                group.compare_always([name])

    def _take_out(self, name: int, leader: int, group: _Group) -> None:
        """Make a member of a group a stray."""
        vector = group.held([name])[name][None]
        self._leave_group(name, leader)
        self._put_aside(np.array([name], dtype=np.int64), vector)

    def check_begins(self) -> list[int]:
        """Return the vectors to be checked, for a check of all."""
        self._added = 0
        return [*dict.fromkeys(self._vector_of.values()), *self._ghosts]

    def check_ends(self) -> None:
        """Note that all nodes were checked."""
        self._checked = self.to_check

    def remove(self, labels: set[int]) -> None:
        """Delete those of the labels that are there."""
        for label in labels & self._vector_of.keys():
            name = self._vector_of.pop(label)
            members = self._members.get(name)
            if members is not None:
                del members[label]
                if members:
                    continue
                del self._members[name]
            self._drop(name)

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
        # Half of a graph is not worth searching.
        live = len(self._vector_of)
        if 2 * min(k, live) >= live > 0:
            raise GraphError
        if not live:
            return np.empty((len(queries), 0), dtype=np.int64), np.empty((len(queries), 0), dtype=np.float32)
        # Few nodes may have many labels. A leader may be less near than its group, so that more nodes must be found.
        wide = _LEADERS_PER_HIT * k if self._groups else k
        if 2 * wide >= self._hnsw.count:
            return self._expanded(*self._compared(queries, k), k)
        return self._expanded(*self._searched(queries, k, max(k, min(wide, self.ef))), k)

    def found(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Search, or where that cannot tell compare; as `search`, and always finds `k`, or all there are."""
        try:
            return self.search(queries, k)
        except GraphError:
            k = min(k, self.live)
            return self._expanded(*self._compared(queries, k), k)

    def _known(self, labels: Labels, vectors: Matrix) -> tuple[list[int], dict[int, int], dict[int, int]]:
        """Return the vector of each label, the rows of new vectors by name, and their names by hash."""
        row_of: dict[int, int] = {}
        hashes: dict[int, int] = {}
        names: list[int] = []
        # Reading a vector of hnswlib takes 20 µs, and many rows may be equal to one.
        known: dict[int, Matrix] = {}
        for row, (label, key) in enumerate(zip(labels.tolist(), hashes_of(vectors), strict=True)):
            name = hashes.get(key, self._by_hash.get(key))
            if name is not None and name not in known:
                known[name] = vectors[row_of[name]] if name in row_of else self._vectors([name])[0]
            if name is None or not np.array_equal(known[name], vectors[row]):
                name = hashes[key] = label
                row_of[label] = row
            names.append(name)
        return names, row_of, hashes

    def _leaders(self, labels: Labels, vectors: Matrix) -> Labels:
        """Return the leader of each new vector, int64 (n,): a node or a new vector; itself if it is to be a node."""
        leaders = labels.copy()
        if not len(labels):
            return leaders
        leaders[are_short(vectors, self._spec.distance)] = SHORT
        if self._stray_hashes:
            leaders[[key in self._stray_hashes for key in hashes_of(vectors)]] = STRAY
        if self._shells:
            shells = self._shells.of(vectors)
            others = (shells != MAIN) & (leaders == labels)
            leaders[others] = shells[others]
        rest = np.flatnonzero(leaders == labels)
        if not self._has_groups or not len(rest):
            return leaders
        near, nodes = self._hnsw.near(vectors[rest], _NEAR, _LEADER_EF)
        leaders[rest[near]] = nodes[near]
        rest = rest[~near]
        products = vectors[rest] @ vectors[rest].T
        squares = np.diagonal(products)
        alike = squares[:, None] + squares - 2 * products <= _NEAR**2 * squares[:, None]
        if np.count_nonzero(alike) == len(rest):
            return leaders
        for i in np.flatnonzero(np.tril(alike, -1).any(axis=1)).tolist():
            for j in np.flatnonzero(alike[i, :i]).tolist():
                if leaders[rest[j]] == labels[rest[j]]:
                    leaders[rest[i]] = labels[rest[j]]
                    break
        return leaders

    def _join(self, leaders: Labels, labels: Labels, vectors: Matrix) -> None:
        """Put vectors that have leaders into the groups of those."""
        for leader in dict.fromkeys(leaders[leaders != labels].tolist()):
            rows = np.flatnonzero((leaders == leader) & (labels != leader))
            if leader == STRAY:
                self._put_aside(labels[rows], vectors[rows])
                continue
            group = self._groups.get(leader)
            if group is None:
                group = self._groups[leader] = Pool(self._spec.dimensions, self._spec.distance)
                if leader < STRAY:
                    self._searched_always.add(leader)
            elif leader != SHORT and isinstance(group, Pool) and len(group) + len(rows) > _MOST_COMPARED:
                # Vectors of a shell may be nearly equal; the members of a group all are.
                group = self._groups[leader] = self._graph_of(group, groups=leader < SHORT)
            group.add(labels[rows], vectors[rows])
            self._leader_of.update((label, leader) for label in labels[rows].tolist())

    def _name(self, labels: Labels, names: list[int], hashes: dict[int, int]) -> None:
        """Note the vectors of new labels, and the hashes of new vectors."""
        self._by_hash.update(hashes)
        for label, name in zip(labels.tolist(), names, strict=True):
            if name != label:
                self._members.setdefault(name, {name: None})[label] = None
            self._vector_of[label] = name

    def _check(self, nodes: Labels, vectors: Matrix) -> None:
        """As `check`, of nodes whose vectors are at hand."""
        missed = self._hnsw.missed(nodes, vectors)
        for row in np.flatnonzero(np.isin(nodes, missed)) if len(missed) else ():
            self._leave_out(int(nodes[row]), vectors[row : row + 1])

    def _leave_out(self, node: int, vector: Matrix) -> None:
        """Delete a node from the graph and compare its vector, (1, dimensions), with every query."""
        self._has_missed = True
        self._hnsw.delete(node)
        if node in self._groups:
            self._searched_always.add(node)
        if node in self._ghosts:
            self._ghosts.remove(node)
        else:
            self._put_aside(np.array([node], dtype=np.int64), vector)

    def _put_aside(self, names: Labels, vectors: Matrix) -> None:
        """Make strays of vectors, (n, dimensions), that are in no graph and no group."""
        self._has_missed |= bool(len(names))
        if isinstance(self._strays, Pool) and len(self._strays) + len(names) > _MOST_STRAYS_COMPARED:
            # Without the vectors that took their links, most of them find each other.
            self._strays = self._graph_of(self._strays, groups=False)
        self._leader_of.update(dict.fromkeys(names.tolist(), STRAY))
        self._strays.add(names, vectors)
        self._stray_hashes.update(hashes_of(vectors))

    def _graph_of(self, pool: Pool, *, groups: bool) -> GroupedVectors:
        """Return a graph of what a pool holds."""
        graph = GroupedVectors(self._spec, _GROUP_CAPACITY, groups=groups)
        graph.set_ef(max(1, self.ef))
        graph.add(*pool.all())
        return graph

    def _drop(self, name: int) -> None:
        """Delete a vector that has no label any more."""
        (key,) = hashes_of(self._vectors([name]))
        if self._by_hash.get(key) == name:
            del self._by_hash[key]
        leader = self._leader_of.pop(name, None)
        if leader is None:
            if name in self._groups:
                self._ghosts.add(name)
            else:
                self._hnsw.delete(name)
        elif leader == STRAY:
            self._strays.remove({name})
        else:
            self._leave_group(name, leader)

    def _leave_group(self, name: int, leader: int) -> None:
        """Remove a vector from the group of its leader, and the group with its last vector."""
        group = self._groups[leader]
        group.remove({name})
        if not len(group):
            del self._groups[leader]
            self._searched_always.discard(leader)
            self._drop_if_ghost(leader)

    def _group(self, leader: int) -> _Group:
        """Return the group of a leader, or the strays."""
        return self._strays if leader == STRAY else self._groups[leader]

    def _graphs(self) -> list[GroupedVectors]:
        """Return the graphs of groups, and of groups within those."""
        graphs = _graphs_of((*self._groups.values(), self._strays))
        return [each for graph in graphs for each in (graph, *graph._graphs())]

    def _drop_if_ghost(self, node: int) -> None:
        if node in self._ghosts:
            self._ghosts.remove(node)
            self._hnsw.delete(node)

    def _is_node(self, name: int) -> bool:
        return name in self._ghosts or (
            name not in self._leader_of and (self._vector_of.get(name) == name or name in self._members)
        )

    def _node_vectors(self) -> list[int]:
        """Return the vectors that are nodes."""
        return [name for name in dict.fromkeys(self._vector_of.values()) if name not in self._leader_of]

    def _vectors(self, names: list[int]) -> Matrix:
        """Return vectors by name, float32 (names, dimensions)."""
        if self._leader_of.keys().isdisjoint(names):
            return self._hnsw.vectors(names)
        by_leader: dict[int | None, list[int]] = {}
        for name in names:
            by_leader.setdefault(self._leader_of.get(name), []).append(name)
        nodes = by_leader.pop(None, [])
        held = dict(zip(nodes, self._hnsw.vectors(nodes), strict=True))
        for leader, its in by_leader.items():
            held |= self._group(leader).held(its)  # type: ignore[arg-type]  # None is taken out
        return np.stack([held[name] for name in names])

    def _searched(self, queries: Matrix, k: int, wide: int) -> tuple[Labels, Matrix]:
        """Return the vectors nearest to each query, (queries, k), by a search of the graph for `wide` nodes."""
        nodes, scores = self._hnsw.search(queries, wide)
        if self._groups:
            nodes, scores = self._with_groups(queries, nodes, scores, k)
        if len(self._strays):
            nodes, scores = best_of([(nodes, scores), self._strays.found(queries, k)], k)
        return nodes, scores

    def _with_groups(self, queries: Matrix, nodes: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the `k` best of the nodes found for each query and of the groups that these lead."""
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
            its_names, its_scores = self._groups[leader].found(queries[rows], k)
            for i, row in enumerate(rows):
                parts.setdefault(row, []).append((its_names[i : i + 1], its_scores[i : i + 1]))
        for row, others in parts.items():
            own = (nodes[row : row + 1], scores[row : row + 1])
            best[0][row], best[1][row] = (part[0] for part in best_of([own, *others], k))
        return best

    def _compared(self, queries: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the vectors nearest to each query, (queries, at most k), of all there are."""
        every = self._node_vectors() if self._hnsw.count else []
        rows, scores = nearest(queries, self._hnsw.vectors(every), k, self._spec.distance)
        parts = [(np.array(every, dtype=np.int64)[rows], scores), self._strays.found(queries, k)]
        return best_of([*parts, *(group.found(queries, k) for group in self._groups.values())], k)

    def _expanded(self, names: Labels, scores: Matrix, k: int) -> tuple[Labels, Matrix]:
        """Return the first `k` labels of the vectors found for each query, of at least as many, and their scores."""
        if not self._members:
            return names, scores
        labels = np.empty((len(names), k), dtype=np.int64)
        expanded = np.empty((len(names), k), dtype=np.float32)
        for row, (found, its_scores) in enumerate(zip(names.tolist(), scores.tolist(), strict=True)):
            filled = 0
            for name, score in zip(found, its_scores, strict=True):
                members = list(islice(self._members.get(name, (name,)), k - filled))
                labels[row, filled : filled + len(members)] = members
                expanded[row, filled : filled + len(members)] = score
                filled += len(members)
                if filled == k:
                    break
        return labels, expanded


def _graphs_of(groups: Iterable[_Group]) -> list[GroupedVectors]:
    """Return those groups that have a graph of their own."""
    return [group for group in groups if isinstance(group, GroupedVectors)]


def hashes_of(vectors: Matrix) -> list[int]:
    """Return hashes, within this process, of vectors, float32 (n, dimensions); equal vectors have one hash."""
    # -0.0 equals 0.0 and has other bytes.
    return [hash(row.tobytes()) for row in vectors + np.float32(0)]
