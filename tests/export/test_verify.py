"""Verification of bundles finds damage, names the failed check, and raises no exception."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from emberpc.bundle import Manifest, Reference, finish_bundle, read_bundle
from emberpc.export.verify import VerifyReport, verify_bundle


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def failed(report: VerifyReport) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def test_verify_passes_every_check_of_a_whole_bundle(tiny_bundle: Path) -> None:
    report = verify_bundle(tiny_bundle)
    assert report.ok
    assert [check.name for check in report.checks] == [
        "files",
        "tokenizer",
        "reference",
        "fp32 loads",
        "fp32 one by one",
        "fp32 in one batch",
    ]
    assert report.figures["fp32.size_bytes"] == (tiny_bundle / "onnx" / "model.onnx").stat().st_size
    assert report.figures["fp32.load_seconds"] > 0
    assert report.figures["fp32.texts_per_second"] > 0


def test_verify_loads_no_pytorch(tiny_bundle: Path) -> None:
    code = (
        "import sys; from emberpc.export.verify import verify_bundle; report = verify_bundle(sys.argv[1]); "
        "print(report.ok, {'torch', 'transformers', 'optimum', 'onnx', 'sklearn', 'grpc'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], check=True, capture_output=True, text=True)
    assert run.stdout == "True set()\n"
    assert run.stderr == ""


def test_a_missing_bundle_is_a_failed_check_and_not_an_exception(tmp_path: Path) -> None:
    assert failed(verify_bundle(tmp_path / "nothing")) == ["files"]
    assert failed(verify_bundle(tmp_path)) == ["files"]


def test_verify_finds_a_flipped_bit_by_the_file_hash(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = verify_bundle(bundle)
    assert failed(report) == ["files"]
    assert "SHA-256" in report.checks[0].detail


def change_a_weight(folder: Path) -> None:
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if "word_embeddings" in tensor.name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    onnx.save(model, path)


def make_weights_nan(folder: Path) -> None:
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if "word_embeddings" in tensor.name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))
    onnx.save(model, path)


def swap_outputs(folder: Path) -> None:
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    outputs = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, path)


def want_an_unknown_input(folder: Path) -> None:
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["batch"]))
    model.graph.node.append(onnx.helper.make_node("Identity", ["pixels"], ["unused"]))
    onnx.save(model, path)


def write_no_graph(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(b"no graph")


def change_the_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (folder / "tokenizer.json").write_text(json.dumps(data))


def write_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def bake_in_truncation(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def remove_the_reference(folder: Path) -> None:
    (folder / "reference.npz").unlink()


def widen_the_reference(folder: Path) -> None:
    reference = Reference.read(folder)
    wider = np.hstack([reference.vectors, reference.vectors])
    Reference(reference.texts, wider).write(folder)


@pytest.mark.parametrize(
    ("damage", "checks"),
    [
        (change_a_weight, ["fp32 one by one", "fp32 in one batch"]),
        (make_weights_nan, ["fp32 one by one", "fp32 in one batch"]),
        (swap_outputs, ["fp32 loads"]),
        (want_an_unknown_input, ["fp32 loads"]),
        (write_no_graph, ["fp32 loads"]),
        (change_the_tokenizer, ["fp32 one by one", "fp32 in one batch"]),
        (write_no_tokenizer, ["tokenizer"]),
        (bake_in_truncation, ["tokenizer"]),
        (remove_the_reference, ["reference"]),
        (widen_the_reference, ["reference"]),
    ],
)
def test_verify_finds_damage_with_matching_hashes(
    bundle: Path, damage: Callable[[Path], None], checks: list[str]
) -> None:
    manifest = read_bundle(bundle).manifest
    damage(bundle)
    finish_bundle(bundle, manifest)
    report = verify_bundle(bundle)
    assert failed(report) == checks
    assert not report.ok
    assert all("\n" not in check.detail for check in report.checks)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"dimensions": 16}, "reference"),
        ({"max_tokens": 2}, "tokenizer"),
        ({"max_tokens": 8}, "fp32 one by one"),
        ({"pad_token_id": 10**6}, "fp32 in one batch"),
    ],
)
def test_verify_finds_a_manifest_that_differs_from_its_model(bundle: Path, change: dict[str, int], check: str) -> None:
    manifest: Manifest = dataclasses.replace(read_bundle(bundle).manifest, **change)  # type: ignore[arg-type]  # ints all
    finish_bundle(bundle, manifest)
    assert check in failed(verify_bundle(bundle))


def test_verify_checks_the_logits_of_a_classifier(tiny_classifier_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_classifier_bundle, tmp_path / "bundle"))
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    gemm = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == gemm.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    onnx.save(model, path)
    finish_bundle(folder, read_bundle(tiny_classifier_bundle).manifest)
    report = verify_bundle(folder)
    assert failed(report) == ["fp32 one by one", "fp32 in one batch"]
    assert "logits" in report.checks[-1].detail
