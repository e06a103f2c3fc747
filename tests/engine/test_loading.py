"""Loading models by path, and from a models directory that is watched."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emberpc.server.deadlines import Deadline
from emberpc.server.engine import Loader, ModelsDirectory, Registry
from emberpc.server.engine.models import watching
from emberpc.server.errors import Code, ServiceError


@pytest.fixture
def registry() -> Iterator[Registry]:
    with ThreadPoolExecutor(1) as pool:
        yield Registry(pool)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def loader(registry: Registry, models: Path) -> Iterator[Loader]:
    made = Loader(registry, models)
    yield made
    made.close()


@pytest.fixture
def directory(models: Path, registry: Registry, loader: Loader) -> ModelsDirectory:
    return ModelsDirectory(models, registry, loader, {"reserved"})


def served(registry: Registry) -> dict[str, str]:
    return {model.name: model.fingerprint for model in registry.models()}


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../outside", "inside/../../outside", "/etc", "link", "link/onnx", "inside/onnx/out", ".hidden",
     "none", "file", "x" * 5000, "inside\0", "./.."],
)  # fmt: skip
def test_a_path_outside_the_models_directory_or_to_nothing_is_refused(
    tiny_bundle: Path, tmp_path: Path, models: Path, registry: Registry, loader: Loader, path: str
) -> None:
    for folder in (tmp_path / "outside", models / "inside", models / ".hidden"):
        shutil.copytree(tiny_bundle, folder)
    (models / "link").symlink_to(tmp_path / "outside")
    (models / "inside" / "onnx" / "out").symlink_to(tmp_path / "outside")
    (models / "file").write_text("")
    with pytest.raises(ServiceError) as error:
        loader.load("m", path)
    assert error.value.code is Code.INVALID_ARGUMENT
    assert [violation.field for violation in error.value.violations] == ["path"]
    assert served(registry) == {}
    loader.load("m", "inside")


def test_an_invalid_or_used_name_is_refused(tiny_bundle: Path, models: Path, loader: Loader) -> None:
    shutil.copytree(tiny_bundle, models / "a")
    for name in ("", "../a", "a b", "x" * 129):
        with pytest.raises(ServiceError) as error:
            loader.load(name, "a")
        assert error.value.code is Code.INVALID_ARGUMENT
    loader.load("a", "a")
    with pytest.raises(ServiceError, match="reload it") as error:
        loader.load("a", "a")
    assert error.value.code is Code.ALREADY_EXISTS


def test_a_reload_keeps_the_served_variant(
    tiny_bundle: Path, other_tiny_bundle: Path, models: Path, registry: Registry
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(tiny_bundle, models / folder)
    loader = Loader(registry, models, variants={"a": "int8"})
    with pytest.raises(ServiceError, match="no variant 'int8'; the bundle has: fp32") as error:
        loader.load("a", "a")
    assert error.value.code is Code.FAILED_PRECONDITION
    assert loader.load("a", "a", "fp32").variant.name == "fp32"
    stages: list[str] = []
    assert loader.reload("a", "b", on_stage=stages.append).folder == models / "b"
    assert stages == ["checking the files", "loading the weights", "warming up"]
    assert loader.reload("a").folder == models / "b"
    loader.close()


def test_a_models_directory_is_served_and_watched_for_changes(
    tiny_bundle: Path, other_tiny_bundle: Path, models: Path, registry: Registry, directory: ModelsDirectory
) -> None:
    (models / "nothing").mkdir()
    shutil.copytree(tiny_bundle, models / "a")
    directory.poll()
    first = registry.get("a")

    directory.poll()
    os.utime(models / "a" / "emberpc.json", (1, 1))
    directory.poll()
    assert registry.get("a") is first  # its files have not changed

    shutil.copytree(other_tiny_bundle, models / ".new")
    shutil.move(models / "a", models / ".old")
    directory.poll()
    assert registry.get("a") is first  # another folder may replace it soon, as here
    (models / ".new").rename(models / "a")
    directory.poll()
    assert registry.get("a").fingerprint != first.fingerprint

    shutil.rmtree(models / "a")
    directory.poll()
    directory.poll()
    assert served(registry) == {}
    (models / ".old").rename(models / "a")
    directory.poll()
    assert served(registry) == {"a": first.fingerprint}


def test_an_invalid_folder_is_logged_once_and_tried_again_after_changes_end(
    tiny_bundle: Path,
    other_tiny_bundle: Path,
    models: Path,
    registry: Registry,
    directory: ModelsDirectory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    shutil.copytree(tiny_bundle, models / "a")
    directory.poll()
    first = registry.get("a")

    weights = (other_tiny_bundle / "onnx" / "model.onnx").read_bytes()
    shutil.copytree(other_tiny_bundle, models / "a", dirs_exist_ok=True)
    (models / "a" / "onnx" / "model.onnx").write_bytes(weights[:1000])
    for _ in range(3):
        directory.poll()
    assert registry.get("a") is first
    (record,) = caplog.records
    assert "model.onnx has 1000 bytes" in record.message
    assert "the version that was served before stays" in record.message

    (models / "a" / "onnx" / "model.onnx").write_bytes(weights)
    directory.poll()
    assert registry.get("a") is first  # its files were changed just before
    directory.poll()
    assert registry.get("a").fingerprint != first.fingerprint
    assert len(caplog.records) == 1


def test_models_and_folders_that_the_directory_does_not_own_are_not_changed(
    tiny_bundle: Path,
    other_tiny_bundle: Path,
    models: Path,
    tmp_path: Path,
    registry: Registry,
    loader: Loader,
    directory: ModelsDirectory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(tiny_bundle, models / "b")
    directory.poll()
    loader.load("a", "b")  # a name that a folder gets later
    shutil.copytree(tiny_bundle, models / "reserved")
    shutil.copytree(other_tiny_bundle, models / "a")
    (models / "link").symlink_to(other_tiny_bundle)
    (models / "no name").mkdir()
    shutil.copy(tiny_bundle / "emberpc.json", models / "no name")
    directory.poll()
    directory.poll()
    assert sorted(served(registry)) == ["a", "b"]
    assert registry.get("a").folder == models / "b"
    assert len(caplog.records) == 4

    loader.unload("b")
    directory.poll()
    assert sorted(served(registry)) == ["a"]  # a call unloaded `b`, and its files have not changed since

    models.rename(tmp_path / "elsewhere")
    caplog.clear()
    directory.poll()
    directory.poll()
    assert sorted(served(registry)) == ["a"]
    assert len(caplog.records) == 1


def test_an_unreadable_folder_is_logged_once_and_does_not_block_others(
    tiny_bundle: Path,
    models: Path,
    registry: Registry,
    directory: ModelsDirectory,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_bundle, models / name)
    state_of = watching._state_of

    def denied(folder: Path) -> watching._State:
        if folder.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return state_of(folder)

    monkeypatch.setattr(watching, "_state_of", denied)
    directory.poll()
    directory.poll()
    assert sorted(served(registry)) == ["b"]
    (record,) = caplog.records
    assert record.message == f"{models / 'a'} is not served: it cannot be read (Permission denied)"
    monkeypatch.undo()
    directory.poll()
    directory.poll()
    assert sorted(served(registry)) == ["a", "b"]


def test_close_waits_for_running_loads_until_its_deadline(registry: Registry) -> None:
    loader, begun, go_on = Loader(registry), threading.Event(), threading.Event()

    def load() -> bool:
        begun.set()
        return go_on.wait(300)

    loading, waiting = loader.submit(load), loader.submit(load)
    assert begun.wait(300)
    assert not loader.close(Deadline(0))
    assert waiting.cancelled()
    go_on.set()
    assert loading.result(300)
    assert loader.close(Deadline(30))
