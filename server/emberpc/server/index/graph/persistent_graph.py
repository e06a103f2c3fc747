"""A grouped graph that can be written to a file and read from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emberpc.server.collections.types import CollectionSpec, Labels, Matrix
from emberpc.server.index.graph.child_process import in_child
from emberpc.server.index.graph.grouped_graph import GroupedGraph, hashes_of
from emberpc.server.index.graph.grouped_graph_reader import STRAY
from emberpc.server.index.graph.hnsw import Hnsw
from emberpc.server.index.graph.shells import Shells

#: Maximum number of vectors of a group in a snapshot. While a collection is opened, the vectors of these groups are
#: read from the store and inserted again. Larger groups would take too long, so snapshots leave them out, and their
#: vectors are inserted in the background after the opening. A shell and the short vectors are groups too. All strays
#: are saved.
_MAX_SAVED_GROUP = 2000
#: Number of nodes whose vectors are read from hnswlib at a time when a snapshot is loaded.
_READ_BATCH = 2000


@dataclass(frozen=True)
class GraphContents:
    """The part of a snapshot that is not in hnswlib's file.

    Attributes:
        dead: nodes that are deleted, int64 (n,).
        members: all labels of each node that has or had labels besides its id, by the node's id.
        outside: labels of the vectors that are not nodes, by leader. In place of a leader there is -1 for strays, -2
            for short vectors, and the number of its shell for a vector outside the main shell. Groups of more than
            2,000 vectors are left out.
        retained: leaders whose own labels are removed.
        checked: value of `PersistentGraph.to_check` when the last complete check ended; 0 before the first.
        shells: the shells into which the vectors are divided; None: all vectors are in one graph.
    """

    dead: Labels = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    members: dict[int, list[int]] = field(default_factory=dict)
    outside: dict[int, list[int]] = field(default_factory=dict)
    retained: list[int] = field(default_factory=list)
    checked: int = 0
    shells: Shells | None = None


@dataclass(frozen=True)
class PendingSave:
    """The state of a graph when writing it to a file began.

    Attributes:
        size: number of bytes that the file must have at the end.
        live: number of labels in the snapshot, without those of groups that are left out.
        contents: the part of the snapshot that is not in the file.
        newest: the greatest of all labels and all ids of nodes, deleted or not; 0 if the graph is empty.
        wait: waits until the writing ends.
    """

    size: int
    live: int
    contents: GraphContents
    newest: int
    #: To be called once, by the thread that called `save`. Raises OSError if the child process failed. Without an error
    #: the file may still be missing or too short, as on a full disk, so its bytes must be compared with `size`.
    wait: Callable[[], None]


class PersistentGraph(GroupedGraph):
    """A `GroupedGraph` that can be written to a file and read from it; for the arguments see `GroupedGraphReader`."""

    def save(self, path: Path) -> PendingSave:
        """Begin to write the present graph to a file. Later changes of the graph do not reach the file.

        On Linux a child process writes the file in the background; elsewhere it is written when this returns.

        Returns:
            The state of the graph. Call `wait` of the result, then check that the file has `size` bytes of the result.

        Raises:
            OSError: writing cannot begin.
        """
        every = self._hnsw.every()
        alive = np.array([*self._node_ids(), *self._retained], dtype=np.int64)
        outside: dict[int, list[int]] = {}
        for vector_id, leader in self._leader_of.items():
            if leader == STRAY or len(self._groups[leader]) <= _MAX_SAVED_GROUP:
                outside.setdefault(leader, []).extend(self._members.get(vector_id, (vector_id,)))
        # Labels of a loaded snapshot whose vectors were not read yet keep their leader in the new snapshot.
        for label, leader in self._awaited.items():
            outside.setdefault(leader, []).append(label)
        members = {vector_id: list(its) for vector_id, its in self._members.items() if vector_id not in self._leader_of}
        contents = GraphContents(
            np.setdiff1d(every, alive), members, outside, sorted(self._retained), self._checked, self._shells
        )
        nodes = sum(len(members.get(vector_id, (vector_id,))) for vector_id in self._node_ids())
        live = nodes + sum(len(labels) for labels in outside.values())
        newest = max(int(every.max(initial=0)), max(self._vector_of, default=0))
        # On Linux a child process writes the file, since hnswlib holds the GIL meanwhile, which would block every call.
        wait = in_child(lambda: self._hnsw.write(path))
        return PendingSave(self._hnsw.size, live, contents, newest, wait)

    @classmethod
    def load(cls, spec: CollectionSpec, path: Path, contents: GraphContents) -> PersistentGraph:
        """Read a graph from a file that `save` wrote; the caller has checked that the file is unchanged.

        The file has only the vectors of nodes. `awaited` returns the labels of other vectors that belong to the
        snapshot. The caller must read these vectors from the store, pass them to `restore`, and then call `restored`.
        Groups that the snapshot leaves out are missing in the graph, and must be added.

        Args:
            spec: the spec of the collection of which the file was written.
            path: the file.
            contents: the part of the snapshot that is not in the file.

        Raises:
            GraphError: hnswlib cannot read the file.
        """
        graph = cls(spec, shells=contents.shells)
        graph._hnsw = Hnsw.read(spec, path, len(contents.dead))
        graph._retained = set(contents.retained)
        graph._checked = contents.checked
        graph._awaited = {label: leader for leader, labels in contents.outside.items() for label in labels}
        graph._members = {vector_id: dict.fromkeys(labels) for vector_id, labels in contents.members.items()}
        nodes = sorted(set(graph._hnsw.every().tolist()) - set(contents.dead.tolist()) - graph._retained)
        for start in range(0, len(nodes), _READ_BATCH):
            part = nodes[start : start + _READ_BATCH]
            for node, key in zip(part, hashes_of(graph._hnsw.vectors(part)), strict=True):
                graph._by_hash[key] = node
                for label in graph._members.get(node, (node,)):
                    graph._vector_of[label] = node
        return graph

    @property
    def awaited(self) -> set[int]:
        """Labels of a loaded snapshot whose vectors its file lacks; empty after `restored`, or without a snapshot."""
        return set(self._awaited)

    def restore(self, labels: Labels, vectors: Matrix) -> None:
        """Add prepared vectors, float32 (n, dimensions), of labels in `awaited`, int64 (n,), to groups and strays.

        May be called several times, each time with other labels. `awaited` stays as it is.
        """
        vector_ids, row_of, hashes = self._find_equal(labels, vectors)
        rows = np.array(list(row_of.values()), dtype=np.int64)
        leaders = np.array([self._awaited[label] for label in labels[rows].tolist()], dtype=np.int64)
        strays = rows[leaders == STRAY]
        self._add_strays(labels[strays], vectors[strays])
        others = leaders != STRAY
        self._join_groups(leaders[others], labels[rows[others]], vectors[rows[others]])
        self._register(labels, vector_ids, hashes)

    def restored(self) -> None:
        """Finish loading: empty `awaited`, and delete retained leaders without group. Labels not restored stay out."""
        self._awaited = {}
        self._searched_always = {leader for leader in self._groups if not self._is_node(leader)}
        for node in [node for node in self._retained if node not in self._groups]:
            self._drop_if_retained(node)
        self._added = max(0, self.to_check - self._checked)
