"""Snapshots of a graph: whole and checked, or as good as not there.

A graph can always be rebuilt from the store; a snapshot saves the time. Each is
a file of hnswlib's and a sidecar with its hash and what it holds. The sidecar is
written last, so a graph without one was never finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np

from emberpc.server.index.graph import Graph
from emberpc.server.index.types import CollectionSpec

log = logging.getLogger(__name__)

_KEPT = 2


def save(graph: Graph, spec: CollectionSpec, folder: Path) -> None:
    """Write a snapshot, and drop the oldest ones.

    Raises:
        OSError: it cannot be written; those that were there still are.
    """
    number = max((_number(path) for path in folder.glob("graph-*.json")), default=0) + 1
    path, sidecar = folder / f"graph-{number:08}.bin", folder / f"graph-{number:08}.json"
    dead = graph.save(path)
    _sync(path)
    facts = {**_facts(spec), "size": path.stat().st_size, "sha256": _sha256(path), "dead": dead.tolist()}
    temporary = sidecar.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    _sync(temporary)
    temporary.rename(sidecar)
    _sync(folder)
    _clean(folder)


def load(spec: CollectionSpec, folder: Path) -> Graph | None:
    """Return the newest snapshot that is whole and fits the collection, or None."""
    for sidecar in sorted(folder.glob("graph-*.json"), reverse=True):
        path = sidecar.with_suffix(".bin")
        try:
            facts = json.loads(sidecar.read_text(encoding="utf-8"))
            expected = {**_facts(spec), "size": path.stat().st_size, "sha256": _sha256(path)}
            if {key: facts[key] for key in expected} == expected:
                return Graph.load(spec, path, np.array(facts["dead"], dtype=np.int64))
            why = "it is not what was written, or of another kind of collection"
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            why = type(error).__name__
        log.warning("collection %s: snapshot %s is left aside: %s", spec.name, sidecar.name, why)
    return None


def _facts(spec: CollectionSpec) -> dict[str, object]:
    """What must be the same for a graph to be this collection's."""
    return {
        "format": 1,
        "dimensions": spec.dimensions,
        "distance": spec.distance.value,
        "m": spec.m,
        "ef_construction": spec.ef_construction,
    }


def _clean(folder: Path) -> None:
    """Drop all but the newest snapshots, and what never became one."""
    kept = {path.stem for path in sorted(folder.glob("graph-*.json"))[-_KEPT:]}
    for path in folder.glob("graph-*"):
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("graph-")
    return int(digits) if digits.isdigit() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
