"""A name of a class in product code has one meaning."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

#: Public classes that share a name, each with the reason.
SHARED = {
    "Cluster": "the client's and the server's type of a cluster of records",
    "Collection": "the client's description of a collection, and the embedded backend's collection",
    "DuplicatePair": "the client's and the server's type of a pair of duplicates",
    "FailedRecord": "the client's and the server's type of a record that was not written",
    "Model": "the client's description of a model, and the model that the server runs",
    "NewRecord": "the client's and the server's type of a record to write",
    "Reembedding": "the client's description of a reembedding, and the embedded backend's reembedding",
    "Violation": "the client's and the server's type of a wrong field of a request",
}


def classes() -> dict[str, list[str]]:
    """Return the modules that define each public class, without generated modules and the asynchronous client."""
    found: dict[str, list[str]] = {}
    for folder in ("protos/emberpc/wire", "client", "server", "export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "_aio" in path.parts:  # generated from `_sync`
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return found


def test_two_public_classes_share_a_name_only_for_a_listed_reason() -> None:
    found = classes()
    assert len(found) > 100
    assert {name: places for name, places in found.items() if len(places) > 1 and name not in SHARED} == {}


def test_every_listed_class_name_is_shared() -> None:
    found = classes()
    assert [name for name in SHARED if len(found.get(name, [])) < 2] == []
