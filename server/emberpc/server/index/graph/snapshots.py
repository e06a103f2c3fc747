"""Snapshots of a graph, which are used only if they are complete and their checksums are right.

A graph can always be rebuilt from the store; a snapshot saves the time. Each snapshot is a file of hnswlib and a JSON
file beside it, the sidecar, with the SHA-256 of the first file and the other contents of the graph. The sidecar is
written last, so a file of hnswlib without a sidecar is not a complete snapshot.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.bundle.atomic_files import atomic_path, write_text_atomically
from emberpc.server.collections.types import CollectionSpec
from emberpc.server.index.graph.hnsw import GraphError
from emberpc.server.index.graph.persistent_graph import GraphContents, PendingSave, PersistentGraph
from emberpc.server.index.graph.shells import Shells
from emberpc.server.index.storage.files import sha256_of

log = logging.getLogger(__name__)

#: Format of snapshots; a snapshot of another format is not used. Since format 3 equal vectors are one node. Since
#: format 4 nearly equal vectors are grouped under one node, and strays are no nodes.
FORMAT = 4
#: Number of the newest snapshots that are kept: if one is damaged, the other may be used.
_KEPT = 2


class AheadError(Exception):
    """A snapshot has labels that the database never assigned: the database is older than the snapshot."""


def save(begin: Callable[[Path], PendingSave], spec: CollectionSpec, identity: str, folder: Path) -> None:
    """Write a snapshot to disk, and delete all but the two newest snapshots of the folder.

    Args:
        begin: begins to write the graph to a path, such as `Neighbours.save`.
        spec: the spec of the collection.
        identity: the identity of the collection's database.
        folder: the folder of the collection's snapshots.

    Raises:
        OSError: the snapshot cannot be written; the two newest existing snapshots stay.
    """
    number = max((_number(path) for path in folder.glob("graph-*.json")), default=0) + 1
    path = folder / f"graph-{number:08}.bin"
    try:
        with atomic_path(path) as temporary:
            saving = begin(temporary)
            saving.wait()
            size = temporary.stat().st_size
            # The size is checked, since hnswlib reports success on a full disk too.
            if size != saving.size:
                raise OSError(f"{path.name} has {size} of {saving.size} bytes")
            facts = {
                **_facts(spec, identity),
                "size": size,
                "sha256": sha256_of(temporary),
                "count": saving.live,
                **_contents_to_json(saving.contents),
                "newest": saving.newest,
            }
        document = json.dumps({"facts": facts, "facts_sha256": _digest(facts)})
        write_text_atomically(path.with_suffix(".json"), document)
    finally:
        _clean(folder)


def load(spec: CollectionSpec, identity: str, newest: int, folder: Path) -> PersistentGraph | None:
    """Return the graph of the newest snapshot that is undamaged and belongs to a collection's database, or None.

    Each newer snapshot that cannot be used is logged and left in the folder. The caller must restore the `awaited`
    vectors of the graph, and add those that the snapshot leaves out.

    Args:
        spec: the spec of the collection.
        identity: the identity of the collection's database.
        newest: the greatest label that the database ever assigned.
        folder: the folder of the collection's snapshots.

    Raises:
        AheadError: a snapshot of the database that was tried has labels greater than `newest`. The database will assign
            these labels to other vectors, so the database must take a new identity: then no snapshot belongs to it.
    """
    for sidecar in sorted(folder.glob("graph-*.json"), reverse=True):
        try:
            return _load(spec, identity, newest, sidecar)
        except (OSError, ValueError, KeyError, TypeError, GraphError) as error:
            log.warning("collection %s: %s is left aside: %s", spec.name, sidecar.name, error or type(error).__name__)
    return None


def _load(spec: CollectionSpec, identity: str, newest: int, sidecar: Path) -> PersistentGraph:
    """Read the snapshot with the given sidecar; the other arguments are those of `load`.

    Raises:
        AheadError: the snapshot is of the database, and has labels greater than `newest`.
        OSError, ValueError, KeyError, TypeError, GraphError: the snapshot is damaged, cannot be read, or is of another
            database or format.
    """
    path = sidecar.with_suffix(".bin")
    document = json.loads(sidecar.read_text(encoding="utf-8"))
    facts = document["facts"]
    if document["facts_sha256"] != _digest(facts):
        raise ValueError("its facts are not what was written")
    own = _facts(spec, identity)
    if facts.get("format") != FORMAT:
        raise ValueError(f"it has the format {facts.get('format')}, and this emberpc uses the format {FORMAT} only")
    if {key: facts.get(key) for key in own} != own:
        raise ValueError("it is of another collection")
    if facts["newest"] > newest:
        raise AheadError
    if facts["size"] != path.stat().st_size or facts["sha256"] != sha256_of(path):
        raise ValueError("its graph is not what was written")
    graph = PersistentGraph.load(spec, path, _contents_from_json(facts))
    count = graph.live + len(graph.awaited)
    if count != facts["count"]:
        raise ValueError(f"it holds {count} vectors, not {facts['count']}")
    return graph


def _facts(spec: CollectionSpec, identity: str) -> dict[str, object]:
    """Return the values, by name, that the sidecar of a snapshot must have to be usable for a collection's database."""
    return {
        "format": FORMAT,
        "identity": identity,
        "dimensions": spec.dimensions,
        "distance": spec.distance.value,
        "m": spec.m,
        "ef_construction": spec.ef_construction,
    }


def _contents_to_json(contents: GraphContents) -> dict[str, object]:
    return {
        "dead": contents.dead.tolist(),
        "members": [[node, labels] for node, labels in contents.members.items()],
        "outside": [[leader, labels] for leader, labels in contents.outside.items()],
        "ghosts": contents.retained,  # the key in the format of snapshots
        "checked": contents.checked,
        "shells": [contents.shells.centre.tolist(), contents.shells.radius] if contents.shells else None,
    }


def _contents_from_json(facts: dict[str, Any]) -> GraphContents:
    """Decode the values that `_contents_to_json` encoded; other values in `facts` are ignored.

    Raises KeyError, TypeError or ValueError if a value is missing or malformed.
    """
    return GraphContents(
        np.array(facts["dead"], dtype=np.int64),
        {int(node): [int(label) for label in labels] for node, labels in facts["members"]},
        {int(leader): [int(label) for label in labels] for leader, labels in facts["outside"]},
        [int(node) for node in facts["ghosts"]],
        int(facts["checked"]),
        _shells_from_json(facts.get("shells")),  # older snapshots have none
    )


def _shells_from_json(facts: list[Any] | None) -> Shells | None:
    if facts is None:
        return None
    centre, radius = facts
    return Shells(np.array(centre, dtype=np.float32), float(radius))


def _digest(facts: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _clean(folder: Path) -> None:
    """Delete the files of unfinished snapshots, and those of finished snapshots except the newest `_KEPT`."""
    kept = {path.stem for path in sorted(folder.glob("graph-*.json"))[-_KEPT:]}
    for path in folder.glob("graph-*"):
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("graph-")
    return int(digits) if digits.isdigit() else 0
