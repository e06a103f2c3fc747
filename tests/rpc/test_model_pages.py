"""ModelService in this process: limited pages of ListModels, bundles beyond the limits, and changes of models."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from emberpc.server.engine import Engine, Loader, Registry
from emberpc.server.errors import ServiceError
from emberpc.server.services.models import ModelService
from emberpc.v1 import model_pb2 as pb


@pytest.fixture
def engine() -> Iterator[Engine]:
    with ThreadPoolExecutor(1) as pool:
        engine = Engine(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=4096)
        yield engine
        engine.close()


@pytest.fixture
def loader(engine: Engine, tmp_path: Path) -> Iterator[Loader]:
    loader = Loader(engine.registry, tmp_path)
    yield loader
    loader.close()


def listed(engine: Engine, loader: Loader, token: str = "") -> pb.ListModelsResponse:
    service = ModelService(engine, loader, admin=False)
    request = pb.ListModelsRequest(page_token=token)
    return asyncio.run(service.ListModels(request, cast("Any", None)))


def test_a_manifest_beyond_the_limits_is_not_served_and_the_others_are_listed(
    engine: Engine, loader: Loader, tiny_bundle: Path, tmp_path: Path
) -> None:
    engine.registry.load("good", tiny_bundle)
    shutil.copytree(tiny_bundle, tmp_path / "bad")
    path = tmp_path / "bad" / "emberpc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_tokens": 10**12}))
    with pytest.raises(ServiceError, match="max_tokens is 1000000000000; it must be a whole number from 1 to 1048576"):
        loader.load("bad", "bad")
    assert [model.name for model in listed(engine, loader).models] == ["good"]


def test_a_page_of_models_with_many_labels_ends_early_and_all_are_listed(
    engine: Engine, loader: Loader, tiny_bundle: Path
) -> None:
    model = engine.registry.load("a", tiny_bundle)
    labels = tuple(f"{i}{'x' * 900}" for i in range(600))
    for name in "abc":
        engine.registry.put(replace(model, name=name, manifest=replace(model.manifest, labels=labels)))
    token = ""
    pages: list[list[str]] = []
    while not pages or token:
        page = listed(engine, loader, token)
        assert page.ByteSize() < 2**21
        pages.append([model.name for model in page.models])
        token = page.next_page_token
    assert pages == [["a"], ["b"], ["c"]]


def test_a_model_change_that_outlives_the_event_loop_ends_without_errors(
    engine: Engine, loader: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    """In an earlier version, the next stage failed; the log had "exception calling callback … Event loop is closed"."""
    go_on, done = threading.Event(), threading.Event()

    def change(tell: Callable[[str], None]) -> Any:
        tell("first")
        assert go_on.wait(300)
        tell("second")
        done.set()

    async def begin() -> None:
        follow = ModelService(engine, loader, admin=True)._follow("m", cast("Any", change))
        assert (await anext(follow))[1] == "first"

    asyncio.run(begin())
    go_on.set()
    loader.close()
    assert done.is_set()
    assert "exception calling callback" not in caplog.text
