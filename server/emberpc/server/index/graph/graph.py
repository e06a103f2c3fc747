"""A graph that is written to a file and read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emberpc.server.collections.types import CollectionSpec, Labels, Matrix
from emberpc.server.index.graph.child_process import in_child
from emberpc.server.index.graph.grouped_vectors import STRAY, GroupedVectors, hashes_of
from emberpc.server.index.graph.hnsw import Hnsw
from emberpc.server.index.graph.shells import Shells

#: Larger groups are not in snapshots: their vectors are grouped again, in the background. Inserting 2,000 takes
#: some 0.5 s at the start of a collection.
_MOST_SAVED = 2000
#: Node vectors that are read at a time when a snapshot is loaded.
_READ_BATCH = 2000


@dataclass(frozen=True)
class Contents:
    """What the file of a graph does not say.

    Attributes:
        dead: nodes that are deleted, int64 (n,).
        members: labels of each node that has other labels than its own.
        outside: leaders of vectors that are no nodes, and the labels of those vectors; -1 as leader of strays.
        ghosts: nodes that stand for other vectors only.
        checked: what `Graph.to_check` was when the last check of all ended.
        shells: shells that have graphs of their own.
    """

    dead: Labels = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    members: dict[int, list[int]] = field(default_factory=dict)
    outside: dict[int, list[int]] = field(default_factory=dict)
    ghosts: list[int] = field(default_factory=list)
    checked: int = 0
    shells: Shells | None = None


@dataclass(frozen=True)
class Saving:
    """A graph as it stood when its writing began.

    Attributes:
        size: bytes of its file.
        live: number of labels that the snapshot has.
        contents: what the file does not say.
        newest: the greatest label or node, 0 for none.
        wait: waits until the file is written.
    """

    size: int
    live: int
    contents: Contents
    newest: int
    #: To be called once, by the thread that began it; raises OSError if the file was not written.
    wait: Callable[[], None]


class Graph(GroupedVectors):
    """Grouped vectors that are written to a file and read again; `GroupedVectors` says what its arguments are."""

    def save(self, path: Path) -> Saving:
        """Begin to write the graph as it stands; what changes it later does not change the file.

        Raises:
            OSError: it cannot be begun.
        """
        every = self._hnsw.every()
        alive = np.array([*self._node_vectors(), *self._ghosts], dtype=np.int64)
        outside: dict[int, list[int]] = {}
        for name, leader in self._leader_of.items():
            if leader == STRAY or len(self._groups[leader]) <= _MOST_SAVED:
                outside.setdefault(leader, []).extend(self._members.get(name, (name,)))
        # A leader that waits to be read is as one that is there.
        for label, leader in self._awaited.items():
            outside.setdefault(leader, []).append(label)
        members = {name: list(its) for name, its in self._members.items() if name not in self._leader_of}
        contents = Contents(
            np.setdiff1d(every, alive), members, outside, sorted(self._ghosts), self._checked, self._shells
        )
        nodes = sum(len(members.get(name, (name,))) for name in self._node_vectors())
        live = nodes + sum(len(labels) for labels in outside.values())
        newest = max(int(every.max(initial=0)), max(self._vector_of, default=0))
        # hnswlib holds the GIL meanwhile, and every call would stand still.
        wait = in_child(lambda: self._hnsw.write(path))
        return Saving(self._hnsw.size, live, contents, newest, wait)

    @classmethod
    def load(cls, spec: CollectionSpec, path: Path, contents: Contents) -> Graph:
        """Read what `save` wrote; the caller has checked that the file is unchanged and of this spec.

        Vectors that are no nodes are not in the file: `awaited` and `restore` bring them.

        Raises:
            GraphError: hnswlib does not take it.
        """
        graph = cls(spec, shells=contents.shells)
        graph._hnsw = Hnsw.read(spec, path, len(contents.dead))
        graph._ghosts = set(contents.ghosts)
        graph._checked = contents.checked
        graph._awaited = {label: leader for leader, labels in contents.outside.items() for label in labels}
        graph._members = {name: dict.fromkeys(labels) for name, labels in contents.members.items()}
        nodes = sorted(set(graph._hnsw.every().tolist()) - set(contents.dead.tolist()) - graph._ghosts)
        for start in range(0, len(nodes), _READ_BATCH):
            part = nodes[start : start + _READ_BATCH]
            for node, key in zip(part, hashes_of(graph._hnsw.vectors(part)), strict=True):
                graph._by_hash[key] = node
                for label in graph._members.get(node, (node,)):
                    graph._vector_of[label] = node
        return graph

    @property
    def awaited(self) -> set[int]:
        """Labels that the loaded snapshot has outside its file."""
        return set(self._awaited)

    def restore(self, labels: Labels, vectors: Matrix) -> None:
        """Bring vectors, float32 (n, dimensions), of labels that are awaited, int64 (n,)."""
        names, row_of, hashes = self._known(labels, vectors)
        rows = np.array(list(row_of.values()), dtype=np.int64)
        leaders = np.array([self._awaited[label] for label in labels[rows].tolist()], dtype=np.int64)
        strays = rows[leaders == STRAY]
        self._put_aside(labels[strays], vectors[strays])
        others = leaders != STRAY
        self._join(leaders[others], labels[rows[others]], vectors[rows[others]])
        self._name(labels, names, hashes)

    def restored(self) -> None:
        """Drop what is awaited still, and what only stood for that."""
        self._awaited = {}
        self._searched_always = {leader for leader in self._groups if not self._is_node(leader)}
        for node in [node for node in self._ghosts if node not in self._groups]:
            self._drop_if_ghost(node)
        self._added = max(0, self.to_check - self._checked)
