"""Adding, checking and removing vectors of an HNSW graph with groups of nearly equal vectors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from emberpc.server.collections.metric import are_short
from emberpc.server.collections.types import Labels, Matrix
from emberpc.server.index.graph.grouped_graph_reader import SHORT, STRAY, Group, GroupedGraphReader
from emberpc.server.index.graph.pool import Pool
from emberpc.server.index.graph.shells import MAIN

#: Vectors are nearly equal if their distance is at most this share of their length: a cosine of 0.9998.
_NEAR = 0.02
#: Candidates of the search for a nearly equal vector: a twentieth of an insert. Nearly equal vectors are easy to find.
_LEADER_EF = 2
#: A larger group has an HNSW graph of its own. Inserting 128 vectors takes some 10 ms.
_MAX_COMPARED_GROUP = 128
#: Up to this many strays are compared with every query, in less time than a graph search takes; more have a graph.
_MAX_COMPARED_STRAYS = 500
#: Capacity of the graph of a group.
_GROUP_CAPACITY = 2 * _MAX_COMPARED_GROUP


class GroupedGraph(GroupedGraphReader):
    """Grouped vectors that can be added and removed; see `GroupedGraphReader`."""

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add vectors, float32 (n, dimensions), under new labels, int64 (n,); about 0.5 ms each."""
        # A wrong shape would corrupt hnswlib's heap.
        if vectors.shape != (len(labels), self._spec.dimensions) or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
        # Nothing changes here until hnswlib has the new nodes, so a failed add can be repeated.
        vector_ids, row_of, hashes = self._find_equal(labels, vectors)
        rows = np.array(list(row_of.values()), dtype=np.int64)
        leaders = self._find_leaders(labels[rows], vectors[rows])
        new = rows[leaders == labels[rows]]
        self._hnsw.add(labels[new], vectors[new])
        self._join_groups(leaders, labels[rows], vectors[rows])
        self._added += len(rows)
        self._register(labels, vector_ids, hashes)
        self._check_nodes(labels[new], vectors[new])
        # A user upserts a record again that searches miss, and it must be found then. If its vector was known, searches
        # may miss its node or its leader.
        known = set(vector_ids) - set(labels[rows].tolist())
        self.check(known | {self._leader_of.get(vector_id, vector_id) for vector_id in known})

    def check(self, vector_ids: Iterable[int]) -> None:
        """Search for nodes, of this graph or a group's, by their own vectors; make strays of missed nodes."""
        here: list[int] = []
        by_leader: dict[int, list[int]] = {}
        for vector_id in vector_ids:
            leader = self._leader_of.get(vector_id)
            if leader is not None:
                by_leader.setdefault(leader, []).append(vector_id)
            elif self._is_node(vector_id):
                here.append(vector_id)
        if here:
            self._check_nodes(np.array(here, dtype=np.int64), self._hnsw.vectors(here))
        for leader, its in by_leader.items():
            group = self._group(leader)
            if isinstance(group, GroupedGraph):
                group.check(its)

    def check_labels(self, labels: Iterable[int]) -> None:
        """Check the vectors of those labels that exist, as `check`."""
        self.check({self._vector_of[label] for label in labels if label in self._vector_of})

    def compare_always(self, labels: Iterable[int]) -> None:
        """Compare the vectors of those labels that exist with every query, since searches miss them."""
        for vector_id in {self._vector_of[label] for label in labels if label in self._vector_of}:
            leader = self._leader_of.get(vector_id)
            if leader is None:
                self._make_stray(vector_id, self._hnsw.vectors([vector_id]))
                continue
            group = self._group(leader)
            if leader != STRAY and leader not in self._searched_always:
                self._make_stray_of_member(vector_id, leader, group)
            elif isinstance(group, GroupedGraph):
                group.compare_always([vector_id])

    def _make_stray_of_member(self, vector_id: int, leader: int, group: Group) -> None:
        """Make a stray of a member of a group."""
        vector = group.held([vector_id])[vector_id][None]
        self._leave_group(vector_id, leader)
        self._add_strays(np.array([vector_id], dtype=np.int64), vector)

    def begin_check(self) -> list[int]:
        """Begin a complete check; return the ids of the vectors to check."""
        self._added = 0
        return [*dict.fromkeys(self._vector_of.values()), *self._ghosts]

    def end_check(self) -> None:
        """End a complete check: all vectors were checked."""
        self._checked = self.to_check

    def remove(self, labels: set[int]) -> None:
        """Delete those of the labels that exist."""
        for label in labels & self._vector_of.keys():
            vector_id = self._vector_of.pop(label)
            members = self._members.get(vector_id)
            if members is not None:
                del members[label]
                if members:
                    continue
                del self._members[vector_id]
            self._delete_vector(vector_id)

    def _find_equal(self, labels: Labels, vectors: Matrix) -> tuple[list[int], dict[int, int], dict[int, int]]:
        """Return the vector id of each row, the rows of new vectors by id, and ids by hash of new vectors."""
        row_of: dict[int, int] = {}
        hashes: dict[int, int] = {}
        vector_ids: list[int] = []
        # Reading a vector from hnswlib takes 20 µs, and many rows may be equal to one vector.
        known: dict[int, Matrix] = {}
        for row, (label, key) in enumerate(zip(labels.tolist(), hashes_of(vectors), strict=True)):
            vector_id = hashes.get(key, self._by_hash.get(key))
            if vector_id is not None and vector_id not in known:
                known[vector_id] = vectors[row_of[vector_id]] if vector_id in row_of else self._vectors([vector_id])[0]
            if vector_id is None or not np.array_equal(known[vector_id], vectors[row]):
                vector_id = hashes[key] = label
                row_of[label] = row
            vector_ids.append(vector_id)
        return vector_ids, row_of, hashes

    def _find_leaders(self, labels: Labels, vectors: Matrix) -> Labels:
        """Return the leader of each new vector, int64 (n,): a node, a new vector, or itself if it becomes a node."""
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

    def _join_groups(self, leaders: Labels, labels: Labels, vectors: Matrix) -> None:
        """Add vectors that have leaders to the groups of those."""
        for leader in dict.fromkeys(leaders[leaders != labels].tolist()):
            rows = np.flatnonzero((leaders == leader) & (labels != leader))
            if leader == STRAY:
                self._add_strays(labels[rows], vectors[rows])
                continue
            group = self._groups.get(leader)
            if group is None:
                group = self._groups[leader] = Pool(self._spec.dimensions, self._spec.distance)
                if leader < STRAY:
                    self._searched_always.add(leader)
            elif leader != SHORT and isinstance(group, Pool) and len(group) + len(rows) > _MAX_COMPARED_GROUP:
                # Vectors of a shell may be nearly equal; the members of any other group all are.
                group = self._groups[leader] = self._graph_of(group, groups=leader < SHORT)
            group.add(labels[rows], vectors[rows])
            self._leader_of.update((label, leader) for label in labels[rows].tolist())

    def _register(self, labels: Labels, vector_ids: list[int], hashes: dict[int, int]) -> None:
        """Register the vector ids of new labels, and the hashes of new vectors."""
        self._by_hash.update(hashes)
        for label, vector_id in zip(labels.tolist(), vector_ids, strict=True):
            if vector_id != label:
                self._members.setdefault(vector_id, {vector_id: None})[label] = None
            self._vector_of[label] = vector_id

    def _check_nodes(self, nodes: Labels, vectors: Matrix) -> None:
        """Check nodes as `check` does, with their vectors given."""
        missed = self._hnsw.missed(nodes, vectors)
        for row in np.flatnonzero(np.isin(nodes, missed)) if len(missed) else ():
            self._make_stray(int(nodes[row]), vectors[row : row + 1])

    def _make_stray(self, node: int, vector: Matrix) -> None:
        """Delete a node from the graph, and compare its vector, (1, dimensions), with every query."""
        self._has_missed = True
        self._hnsw.delete(node)
        if node in self._groups:
            self._searched_always.add(node)
        if node in self._ghosts:
            self._ghosts.remove(node)
        else:
            self._add_strays(np.array([node], dtype=np.int64), vector)

    def _add_strays(self, vector_ids: Labels, vectors: Matrix) -> None:
        """Make strays of vectors, (n, dimensions), that are in no graph and no group."""
        self._has_missed |= bool(len(vector_ids))
        if isinstance(self._strays, Pool) and len(self._strays) + len(vector_ids) > _MAX_COMPARED_STRAYS:
            # Without the vectors that took their links, most strays find each other.
            self._strays = self._graph_of(self._strays, groups=False)
        self._leader_of.update(dict.fromkeys(vector_ids.tolist(), STRAY))
        self._strays.add(vector_ids, vectors)
        self._stray_hashes.update(hashes_of(vectors))

    def _graph_of(self, pool: Pool, *, groups: bool) -> GroupedGraph:
        """Return a graph with the vectors of a pool."""
        graph = GroupedGraph(self._spec, _GROUP_CAPACITY, groups=groups)
        graph.set_ef(max(1, self.ef))
        graph.add(*pool.all())
        return graph

    def _delete_vector(self, vector_id: int) -> None:
        """Delete a vector that has no labels any more."""
        (key,) = hashes_of(self._vectors([vector_id]))
        if self._by_hash.get(key) == vector_id:
            del self._by_hash[key]
        leader = self._leader_of.pop(vector_id, None)
        if leader is None:
            if vector_id in self._groups:
                self._ghosts.add(vector_id)
            else:
                self._hnsw.delete(vector_id)
        elif leader == STRAY:
            self._strays.remove({vector_id})
        else:
            self._leave_group(vector_id, leader)

    def _leave_group(self, vector_id: int, leader: int) -> None:
        """Remove a vector from the group of its leader, and the group if it is empty then."""
        group = self._groups[leader]
        group.remove({vector_id})
        if not len(group):
            del self._groups[leader]
            self._searched_always.discard(leader)
            self._drop_if_ghost(leader)

    def _drop_if_ghost(self, node: int) -> None:
        if node in self._ghosts:
            self._ghosts.remove(node)
            self._hnsw.delete(node)

    def _is_node(self, vector_id: int) -> bool:
        return vector_id in self._ghosts or (
            vector_id not in self._leader_of
            and (self._vector_of.get(vector_id) == vector_id or vector_id in self._members)
        )


def hashes_of(vectors: Matrix) -> list[int]:
    """Return hashes, valid in this process, of vectors, float32 (n, dimensions); equal vectors have equal hashes."""
    # -0.0 equals 0.0 but has other bytes.
    return [hash(row.tobytes()) for row in vectors + np.float32(0)]
