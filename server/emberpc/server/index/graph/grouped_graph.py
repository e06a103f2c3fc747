"""Adding, checking and removing vectors of an HNSW graph with groups of nearly equal vectors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from emberpc.server.collections.metric import are_short
from emberpc.server.collections.types import Labels, Matrix
from emberpc.server.index.graph.grouped_graph_reader import SHORT, STRAY, Group, GroupedGraphReader
from emberpc.server.index.graph.pool import Pool
from emberpc.server.index.graph.shells import MAIN

#: A new vector is nearly equal to another vector if their distance is at most this share of the new vector's length.
#: Between vectors of equal length this is a cosine of at least 0.9998.
_NEAR = 0.02
#: ef of the search for a node that is nearly equal to a new vector. A small ef is enough, since such nodes are easy to
#: find; the search takes only a twentieth of the time of an insert.
_LEADER_EF = 2
#: Maximum number of vectors of a group without a graph: a search compares them one by one. If an addition makes an
#: existing group larger, the group gets an HNSW graph of its own; inserting 128 vectors takes some 10 ms. The addition
#: that creates a group is not limited. Vectors that are too short for a graph never get one.
_MAX_COMPARED_GROUP = 128
#: Maximum number of strays that a search compares one by one, in less time than a search of a graph takes. More strays
#: get a graph of their own.
_MAX_COMPARED_STRAYS = 500
#: Number of nodes for which the graph of a group or of strays allocates memory at first; that of a shell allocates
#: more.
_GROUP_CAPACITY = 2 * _MAX_COMPARED_GROUP


class GroupedGraph(GroupedGraphReader):
    """Adds, checks and removes labelled vectors of an HNSW graph with groups and strays; see `GroupedGraphReader`."""

    def add(self, labels: Labels, vectors: Matrix) -> None:
        """Add prepared vectors, float32 (n, dimensions), under new labels, int64 (n,); takes about 0.5 ms per vector.

        Then check the new nodes, as `check` does. If a vector is equal to an older one, check that one and its leader.

        Raises:
            ValueError: the shape or type of the vectors is wrong.
        """
        # A wrong shape would corrupt hnswlib's heap.
        if vectors.shape != (len(labels), self._spec.dimensions) or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype} {vectors.shape}")
        # No attribute changes before hnswlib has the new nodes. So if hnswlib fails, the call can be repeated.
        vector_ids, row_of, hashes = self._find_equal(labels, vectors)
        rows = np.array(list(row_of.values()), dtype=np.int64)
        leaders = self._find_leaders(labels[rows], vectors[rows])
        new = rows[leaders == labels[rows]]
        self._hnsw.add(labels[new], vectors[new])
        self._join_groups(leaders, labels[rows], vectors[rows])
        self._added += len(rows)
        self._register(labels, vector_ids, hashes)
        self._check_nodes(labels[new], vectors[new])
        # A user may upsert a record again because searches miss it, and then searches must find it. If another record
        # has an equal vector, no node was added now, so check the node of that vector, or that of its leader.
        known = set(vector_ids) - set(labels[rows].tolist())
        self.check(known | {self._leader_of.get(vector_id, vector_id) for vector_id in known})

    def check(self, vector_ids: Iterable[int]) -> None:
        """Search for nodes by their own vectors, and make strays of the nodes that the searches miss.

        Args:
            vector_ids: ids of vectors. Those that are nodes, of this graph or of the graph of a group or of strays, are
                checked; others are ignored. A retained leader that is missed is deleted, and its group becomes part of
                every search.
        """
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
        """Check, as `check` does, the vectors of those labels that exist; other labels are ignored."""
        self.check({self._vector_of[label] for label in labels if label in self._vector_of})

    def compare_always(self, labels: Iterable[int]) -> None:
        """Make strays of the vectors of those labels that exist; the caller found that searches miss these vectors.

        A vector in a graph that is part of every search (of strays, a shell, or a former leader) becomes a stray of
        that graph. A vector that every search compares already is left as is.
        """
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
        """Remove a vector from the group of its leader, and make it a stray."""
        vector = group.held([vector_id])[vector_id][None]
        self._leave_group(vector_id, leader)
        self._add_strays(np.array([vector_id], dtype=np.int64), vector)

    def begin_check(self) -> list[int]:
        """Begin a complete check: set `added` to 0, and return the ids to check: all vectors and retained leaders."""
        self._added = 0
        return [*dict.fromkeys(self._vector_of.values()), *self._retained]

    def end_check(self) -> None:
        """End a complete check, after the caller has passed all vectors to `check`: set `checked` to `to_check`."""
        self._checked = self.to_check

    def remove(self, labels: set[int]) -> None:
        """Remove labels; missing labels are ignored.

        A vector without labels is deleted, but a node with a group becomes a retained leader.
        """
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
        """Find for each vector an equal vector in this graph, in its groups, among its strays or in an earlier row.

        Args:
            labels: new labels, int64 (n,).
            vectors: their vectors, float32 (n, dimensions).

        Returns:
            The vector id of each row: that of the equal vector, or the row's label if the vector is new; the row of
            each new vector, by its id; the id of each new vector, by its hash (the last of those with equal hashes).
        """
        row_of: dict[int, int] = {}
        hashes: dict[int, int] = {}
        vector_ids: list[int] = []
        # Vectors by id. Reading a vector from hnswlib takes 20 µs, and many rows may be equal to one vector.
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
        """Return the leader of each new vector, int64 (n,).

        The leader is `SHORT`, `STRAY` for a vector that was a stray before, the number of a shell other than the main
        shell, or the id of a nearly equal vector: a node, or another new vector. For a vector that becomes a node, its
        own label is returned.

        Args:
            labels: labels of the new vectors, int64 (n,).
            vectors: the new vectors, float32 (n, dimensions), no two of them equal.
        """
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
        """Add each vector to the group of its leader, or to the strays, unless its leader is its own label.

        A missing group is created. A group that becomes too large for a pool gets a graph.

        Args:
            leaders: leader of each vector, as `_find_leaders` returns them.
            labels: labels of the new vectors, int64 (n,).
            vectors: the new vectors, float32 (n, dimensions).
        """
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
                # Of the graphs of groups, only those of shells have groups themselves: the members of another group are
                # all nearly equal to their leader.
                group = self._groups[leader] = self._graph_of(group, groups=leader < SHORT)
            group.add(labels[rows], vectors[rows])
            self._leader_of.update((label, leader) for label in labels[rows].tolist())

    def _register(self, labels: Labels, vector_ids: list[int], hashes: dict[int, int]) -> None:
        """Note the vector ids of new labels, and the hashes of new vectors; arguments as `_find_equal` returns them."""
        self._by_hash.update(hashes)
        for label, vector_id in zip(labels.tolist(), vector_ids, strict=True):
            if vector_id != label:
                self._members.setdefault(vector_id, {vector_id: None})[label] = None
            self._vector_of[label] = vector_id

    def _check_nodes(self, nodes: Labels, vectors: Matrix) -> None:
        """Search for nodes by their own vectors; delete missed retained leaders, and make strays of other missed nodes.

        Args:
            nodes: ids of nodes of this graph, int64 (n,).
            vectors: their vectors, float32 (n, dimensions).
        """
        missed = self._hnsw.missed(nodes, vectors)
        for row in np.flatnonzero(np.isin(nodes, missed)) if len(missed) else ():
            self._make_stray(int(nodes[row]), vectors[row : row + 1])

    def _make_stray(self, node: int, vector: Matrix) -> None:
        """Delete a node from the graph; except of a retained leader, make a stray of its vector, float32 (1, d).

        If the node has a group, every search searches that group from now on.
        """
        self._has_missed = True
        self._hnsw.delete(node)
        if node in self._groups:
            self._searched_always.add(node)
        if node in self._retained:
            self._retained.remove(node)
        else:
            self._add_strays(np.array([node], dtype=np.int64), vector)

    def _add_strays(self, vector_ids: Labels, vectors: Matrix) -> None:
        """Make strays of vectors, float32 (n, dimensions), that are in no graph and no group; ids are int64 (n,)."""
        self._has_missed |= bool(len(vector_ids))
        if isinstance(self._strays, Pool) and len(self._strays) + len(vector_ids) > _MAX_COMPARED_STRAYS:
            # Searches of a graph of strays find most strays: the nodes that took their links are not in that graph.
            self._strays = self._graph_of(self._strays, groups=False)
        self._leader_of.update(dict.fromkeys(vector_ids.tolist(), STRAY))
        self._strays.add(vector_ids, vectors)
        self._stray_hashes.update(hashes_of(vectors))

    def _graph_of(self, pool: Pool, *, groups: bool) -> GroupedGraph:
        """Return a new graph with the vectors of a pool; `groups` is whether the graph groups nearly equal vectors."""
        graph = GroupedGraph(self._spec, _GROUP_CAPACITY, groups=groups)
        graph.set_ef(max(1, self.ef))
        graph.add(*pool.all())
        return graph

    def _delete_vector(self, vector_id: int) -> None:
        """Delete a vector that has no labels any more; a node that has a group becomes a retained leader instead."""
        (key,) = hashes_of(self._vectors([vector_id]))
        if self._by_hash.get(key) == vector_id:
            del self._by_hash[key]
        leader = self._leader_of.pop(vector_id, None)
        if leader is None:
            if vector_id in self._groups:
                self._retained.add(vector_id)
            else:
                self._hnsw.delete(vector_id)
        elif leader == STRAY:
            self._strays.remove({vector_id})
        else:
            self._leave_group(vector_id, leader)

    def _leave_group(self, vector_id: int, leader: int) -> None:
        """Remove a vector from the group of its leader.

        If the group becomes empty, delete the group, and also the leader if it is retained.
        """
        group = self._groups[leader]
        group.remove({vector_id})
        if not len(group):
            del self._groups[leader]
            self._searched_always.discard(leader)
            self._drop_if_retained(leader)

    def _drop_if_retained(self, node: int) -> None:
        if node in self._retained:
            self._retained.remove(node)
            self._hnsw.delete(node)

    def _is_node(self, vector_id: int) -> bool:
        return vector_id in self._retained or (
            vector_id not in self._leader_of
            and (self._vector_of.get(vector_id) == vector_id or vector_id in self._members)
        )


def hashes_of(vectors: Matrix) -> list[int]:
    """Return a hash of each vector, float32 (n, dimensions). Equal vectors have equal hashes in one process."""
    # -0.0 and 0.0 are equal but have different bytes; adding 0 turns -0.0 into 0.0.
    return [hash(row.tobytes()) for row in vectors + np.float32(0)]
