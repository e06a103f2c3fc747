"""The cache of exports: a test gets a copy of the export of its inputs, which no other test can change."""

from __future__ import annotations

from pathlib import Path

import pytest

import bundle_cache
from bundle_cache import shared_export

pytestmark = pytest.mark.export  # the cache changes a constant of the export


class Builder:
    """Writes a file, and counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def write(self, folder: Path) -> None:
        self.runs += 1
        folder.mkdir()
        (folder / "file").write_text("content")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle_cache, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_equal_inputs_are_built_once_and_each_caller_gets_a_copy(tmp_path_factory: pytest.TempPathFactory) -> None:
    build = Builder()
    first = shared_export("a", build.write, tmp_path_factory, "text", 1)
    (first / "file").write_text("spoilt")
    second = shared_export("a", build.write, tmp_path_factory, "text", 1)
    assert (second / "file").read_text() == "content"
    assert (first.name, second.name, build.runs) == ("a", "a", 1)


def test_other_inputs_and_another_toolchain_are_built_again(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder()
    shared_export("a-b", build.write, tmp_path_factory)
    shared_export("a", build.write, tmp_path_factory, 1)
    shared_export("a", build.write, tmp_path_factory, 2)
    assert build.runs == 3
    monkeypatch.setattr(bundle_cache, "toolchain", lambda: "another")
    shared_export("a", build.write, tmp_path_factory, 2)
    assert build.runs == 4
    assert [len(list((folder / name).iterdir())) for name in ("a", "a-b")] == [1, 1]
    shared_export("a", build.write, tmp_path_factory, 2)
    assert build.runs == 4


def test_the_toolchain_changes_with_a_source_and_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source := tmp_path / "export").mkdir()
    (source / "module.py").write_text("1")
    monkeypatch.setattr(bundle_cache, "ROOT", tmp_path)
    monkeypatch.setattr(bundle_cache, "SOURCES", ("export",))
    toolchain = bundle_cache.toolchain.__wrapped__
    found = [toolchain()]
    (source / "module.py").write_text("2")
    found.append(toolchain())
    monkeypatch.setattr(bundle_cache, "_version", lambda package: f"{package} 9")
    found.append(toolchain())
    assert len(set(found)) == 3


def test_a_failed_build_is_not_used_as_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared_export("a", fail, tmp_path_factory)
    build = Builder()
    assert (shared_export("a", build.write, tmp_path_factory) / "file").exists()
    assert build.runs == 1
