"""Loading a model: what is not a model, or not the one that was exported, is refused with its reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from emberpc.bundle import Manifest, Reference, finish_bundle, read_bundle
from emberpc.server.cores import usable_cores
from emberpc.server.engine import Model, ModelLoadError


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle, to be spoilt."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return folder


def resign(folder: Path) -> None:
    """Make the manifest fit the files as they are now, as somebody who means harm would."""
    manifest = Manifest.from_json((folder / "emberpc.json").read_text(encoding="utf-8"))
    finish_bundle(folder, manifest)


def refused(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as error:
        Model.load("m", folder)
    assert str(error.value).startswith("model 'm': ")
    return str(error.value)


def test_a_good_bundle_loads(bundle: Path) -> None:
    model = Model.load("m", bundle)
    assert model.manifest.dimensions == 32
    assert model.size_bytes == (bundle / "onnx" / "model.onnx").stat().st_size


def test_an_unknown_variant_is_refused_with_those_there_are(bundle: Path) -> None:
    with pytest.raises(ModelLoadError, match="the bundle has: fp32"):
        Model.load("m", bundle, "int8")


def test_other_weights_under_a_right_manifest_are_found_out(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    embeddings = next(each for each in graph.graph.initializer if "word_embeddings" in each.name)
    values = np.frombuffer(embeddings.raw_data, dtype=np.float32)
    embeddings.raw_data = values[::-1].tobytes()
    onnx.save(graph, str(path))
    resign(bundle)
    assert "does not give the outputs that it gave at export" in refused(bundle)


def test_a_graph_without_the_output_is_refused(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    kept = [output for output in graph.graph.output if output.name != "sentence_embedding"]
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
    onnx.save(graph, str(path))
    resign(bundle)
    assert "it must have 'sentence_embedding'" in refused(bundle)


def test_a_graph_with_other_inputs_is_refused(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    graph.graph.input[0].name = "pixels"
    for node in graph.graph.node:
        node.input[:] = ["pixels" if name == "input_ids" else name for name in node.input]
    onnx.save(graph, str(path))
    resign(bundle)
    assert "what the inputs pixels, attention_mask, token_type_ids take cannot be told; copy" in refused(bundle)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json", "reference.npz"])
def test_a_file_of_rubbish_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"rubbish")
    resign(bundle)
    message = refused(bundle)
    assert Path(name).name in message


def test_a_reference_of_another_shape_is_found_out(bundle: Path) -> None:
    reference = read_bundle(bundle).reference()
    Reference(reference.texts, reference.embeddings[:, :-1]).write(bundle)
    resign(bundle)
    assert "does not give the outputs" in refused(bundle)


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1
