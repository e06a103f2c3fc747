"""The server binds a collection of the old scheme of fingerprints again if the legacy fingerprint proves its model."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.engine import Engine, Model, Registry, Truncation
from emberpc.server.errors import Code, items_of
from emberpc.server.index import Index
from emberpc.server.pipelines.collection_model import collection_model
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.services.index import IndexService
from emberpc.v1 import index_pb2 as pb
from fixtures_bundles import save_with_external_weights
from index.support import refused


class Service:
    """An index and an engine behind an IndexService, without a network."""

    def __init__(self, data: Path, pool: ThreadPoolExecutor) -> None:
        self.engine = Engine(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=4096)
        self.index = Index(data)
        limits = Limits(100, 10_000, 2**24, 2**25, 4096)
        index_pool = IndexPool(pool, heavy=1)
        self._reembedder = ReembeddingJobs(self.engine, self.index, index_pool, limits)
        self._service = IndexService(self.engine, self.index, index_pool, limits, self._reembedder)

    def create(self, model: Model, fingerprint: str) -> None:
        self.index.create(CollectionSpec("c", 32, model=model.name, model_fingerprint=fingerprint))

    def bound_by(self) -> str:
        request = pb.GetCollectionRequest(name="c")
        response = asyncio.run(self._service.GetCollection(request, cast("Any", None)))
        return response.collection.model_fingerprint

    def search(self, text: str) -> bytes:
        request = pb.SearchRequest(collection="c", queries=[pb.SearchQuery(text=text)])
        return asyncio.run(self._service.Search(request, cast("Any", Context())))

    def resume(self, problem: str = "") -> None:
        """Continue the reembedding of `c` until its end, or until it has a problem, which must contain `problem`."""

        async def run() -> None:
            await self._reembedder.resume()
            while True:  # a job has no event for its problem
                status = await self._reembedder.status("c")
                if status is None or status.problem:
                    assert bool(status) == bool(problem), status
                    assert status is None or problem in status.problem
                    break
            await self._reembedder.close()

        asyncio.run(run())

    def close(self) -> None:
        self.index.close()
        self.engine.close()


class Context:
    """A context of a call with the methods that handlers use."""

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
    """Write the tiny encoder without a manifest, and with its weights in a file of this name."""
    shutil.copytree(tiny_bundle, folder)
    (folder / "emberpc.json").unlink()
    save_with_external_weights(folder / "onnx" / "model.onnx", location)
    return folder


@pytest.mark.parametrize("location", ["", "model.onnx_data"])
def test_a_collection_with_a_matching_legacy_fingerprint_is_bound_again(
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


def test_a_search_binds_a_collection_of_the_old_scheme(service: Service, tiny_bundle: Path) -> None:
    model = service.engine.registry.load("m", tiny_bundle)
    service.create(model, model.legacy_fingerprint)
    assert service.search("a b c")
    assert service.index.get("c").spec.model_fingerprint == model.fingerprint


def test_a_collection_without_a_matching_legacy_fingerprint_is_not_bound_again(
    service: Service, tiny_bundle: Path, tmp_path: Path
) -> None:
    model = service.engine.registry.load("m", foreign(tiny_bundle, tmp_path / "foreign", "model.onnx.data"))
    old = model.manifest.legacy_fingerprint(model.variant.name)
    service.create(model, old)
    assert service.bound_by() == old
    with refused(Code.FAILED_PRECONDITION, "were made by another 'm'"):
        collection_model(service.engine, service.index.get("c"))


def test_a_collection_of_the_old_scheme_is_usable_on_a_full_disk(
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


TEXTS = {"a": "the dog runs over green hills", "b": "rain at night"}


@pytest.fixture
def begun(tmp_path: Path, tiny_bundle: Path) -> Model:
    """Begin a reembedding to model `m` with one finished record, as a server of the old scheme left it."""
    model = Model.load("m", tiny_bundle)
    index = Index(tmp_path / "data")
    index.create(CollectionSpec("c", 4)).upsert(
        [NewRecord(key, text) for key, text in TEXTS.items()], np.eye(4, dtype=np.float32)[:2]
    )
    reembedding = index.reembed(index.get("c"), model="m", fingerprint=model.legacy_fingerprint, dimensions=32)
    reembedding.take(reembedding.next(1), embedded(model, [TEXTS["a"]]))
    index.close()
    return model


def embedded(model: Model, texts: list[str]) -> np.ndarray:
    prompt = model.manifest.prompts.passage
    tokens = [each.ids for each in model.tokenizer.tokenize(texts, prompt, Truncation.REFUSE, items_of("texts"))]
    return model.finish(model.encoder.run(tokens))


def test_a_reembedding_of_the_old_scheme_continues(begun: Model, service: Service, tiny_bundle: Path) -> None:
    model = service.engine.registry.load("m", tiny_bundle)
    service.resume()
    assert service.bound_by() == model.fingerprint
    collection = service.index.get("c")
    assert (collection.spec.model, collection.spec.dimensions) == ("m", 32)
    found = {record.id: record for record in collection.page(10, "", with_vectors=True)[0]}
    assert {key: record.text for key, record in found.items()} == TEXTS
    vectors = np.stack([record.vector for key in TEXTS if (record := found[key]).vector is not None])
    assert np.allclose(vectors, embedded(begun, list(TEXTS.values())), atol=1e-5)


def test_a_reembedding_of_the_old_scheme_does_not_continue_with_another_model(
    begun: Model, service: Service, other_tiny_bundle: Path
) -> None:
    service.engine.registry.load("m", other_tiny_bundle)
    service.resume(problem="'m' is another one than when this began")
    assert service.index.get("c").spec.model == ""
    (reembedding,) = service.index.reembeddings()
    assert reembedding.counts() == (1, 2)
    assert reembedding.spec.model_fingerprint == begun.legacy_fingerprint
