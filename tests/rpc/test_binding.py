"""A collection bound under the old scheme of fingerprints is bound again by itself, if that scheme proves its model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import onnx
import pytest

from emberpc.server.engine import Engine, Model, Registry
from emberpc.server.errors import Code
from emberpc.server.index import CollectionSpec, Index
from emberpc.server.services.binding import collection_model
from emberpc.server.services.index import IndexService
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.reembedding import Reembedder
from emberpc.server.services.requests import Limits
from emberpc.v1 import index_pb2 as pb
from index.support import refused


class Service:
    """An index and an engine behind an IndexService, without a network."""

    def __init__(self, data: Path, pool: ThreadPoolExecutor) -> None:
        self.engine = Engine(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=4096)
        self.index = Index(data)
        limits = Limits(100, 10_000, 2**24, 2**25, 4096)
        index_pool = IndexPool(pool, heavy=1)
        reembedder = Reembedder(self.engine, self.index, index_pool, limits)
        self._service = IndexService(self.engine, self.index, index_pool, limits, reembedder)

    def create(self, model: Model, fingerprint: str) -> None:
        self.index.create(CollectionSpec("c", 32, model=model.name, model_fingerprint=fingerprint))

    def bound_by(self) -> str:
        request = pb.GetCollectionRequest(name="c")
        response = asyncio.run(self._service.GetCollection(request, cast("Any", None)))
        return response.collection.model_fingerprint

    def search(self, text: str) -> bytes:
        request = pb.SearchRequest(collection="c", queries=[pb.SearchQuery(text=text)])
        return asyncio.run(self._service.Search(request, cast("Any", Context())))

    def close(self) -> None:
        self.index.close()
        self.engine.close()


class Context:
    """What a handler asks of a call."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float | None:
        return None

    def peer(self) -> str:
        return "test"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with ThreadPoolExecutor(2) as pool:
        made = Service(tmp_path / "data", pool)
        yield made
        made.close()


def foreign(tiny_bundle: Path, folder: Path, location: str) -> Path:
    """Write the tiny encoder without a manifest, its weights in a file of this name."""
    shutil.copytree(tiny_bundle, folder)
    (folder / "emberpc.json").unlink()
    path = folder / "onnx" / "model.onnx"
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location=location)
    return folder


@pytest.mark.parametrize("location", ["", "model.onnx_data"])
def test_a_collection_whose_model_the_old_scheme_proves_is_bound_again(
    service: Service, tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path, location: str
) -> None:
    folder = foreign(tiny_bundle, tmp_path / "foreign", location) if location else tiny_bundle
    model = service.engine.registry.load("m", folder)
    assert model.legacy_fingerprint == model.manifest.legacy_fingerprint(model.variant.name)
    service.create(model, model.legacy_fingerprint)
    assert service.bound_by() == model.fingerprint
    assert service.index.page(10, "")[0][0].model_fingerprint == model.fingerprint
    assert collection_model(service.engine, service.index.get("c")) is model

    service.engine.registry.load("m", other_tiny_bundle)
    with refused(Code.FAILED_PRECONDITION, "were made by another 'm'"):
        collection_model(service.engine, service.index.get("c"))
    assert service.bound_by() == model.fingerprint


def test_a_search_binds_it_too(service: Service, tiny_bundle: Path) -> None:
    model = service.engine.registry.load("m", tiny_bundle)
    service.create(model, model.legacy_fingerprint)
    assert service.search("a b c")
    assert service.index.get("c").spec.model_fingerprint == model.fingerprint


def test_a_collection_whose_model_the_old_scheme_does_not_prove_stays_as_it_is(
    service: Service, tiny_bundle: Path, tmp_path: Path
) -> None:
    model = service.engine.registry.load("m", foreign(tiny_bundle, tmp_path / "foreign", "model.onnx.data"))
    old = model.manifest.legacy_fingerprint(model.variant.name)
    service.create(model, old)
    assert service.bound_by() == old
    with refused(Code.FAILED_PRECONDITION, "were made by another 'm'"):
        collection_model(service.engine, service.index.get("c"))


def test_on_a_full_disk_the_collection_stays_usable(
    service: Service, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = service.engine.registry.load("m", tiny_bundle)
    service.create(model, model.legacy_fingerprint)

    def full(*_: object) -> CollectionSpec:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service.index._directory, "update", full)
    assert service.bound_by() == model.legacy_fingerprint
    assert collection_model(service.engine, service.index.get("c")) is model
    monkeypatch.undo()
    assert service.bound_by() == model.fingerprint
