"""Binding a collection of the old scheme of fingerprints again under the present scheme."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.errors import Code
from emberpc.server.index import Index
from emberpc.server.index.graph import snapshots
from index.support import numbered, refused
from index_helpers import DIMENSIONS, vectors

OLD, NEW = "0" * 64, "1" * 64
SPEC = CollectionSpec("c", DIMENSIONS, model="m", model_fingerprint=OLD)


def test_a_changed_binding_survives_a_restart(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.create(SPEC)
    assert index.update_fingerprint("c", OLD, NEW).spec.model_fingerprint == NEW
    index.close()
    index = Index(tmp_path)
    assert index.get("c").spec.model_fingerprint == NEW
    assert index.page(10, "")[0][0].model_fingerprint == NEW
    index.close()


def test_a_collection_of_another_model_is_not_bound_again(index: Index) -> None:
    index.create(SPEC)
    assert index.update_fingerprint("c", "2" * 64, NEW).spec.model_fingerprint == OLD
    with refused(Code.NOT_FOUND, "'d'"):
        index.update_fingerprint("d", OLD, NEW)


def test_binding_a_collection_again_keeps_its_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = Index(tmp_path, buffer_limit=8, snapshot_every=8)
    collection = index.create(SPEC)
    collection.upsert(numbered(40), vectors(40))
    collection.maintain()
    index.close()
    sidecars = list(tmp_path.rglob("graph-*.json"))
    assert sidecars
    for path in sidecars:  # the old form had the fingerprint
        facts = {**json.loads(path.read_text())["facts"], "model_fingerprint": OLD}
        path.write_text(json.dumps({"facts": facts, "facts_sha256": snapshots._digest(facts)}))
    caplog.set_level(logging.INFO)
    index = Index(tmp_path, buffer_limit=8, snapshot_every=8)
    index.update_fingerprint("c", OLD, NEW)
    index.close()
    index = Index(tmp_path, buffer_limit=8, snapshot_every=8)
    assert index.get("c").spec.model_fingerprint == NEW
    index.close()
    assert not [record for record in caplog.records if "left aside" in record.message]
