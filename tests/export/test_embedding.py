"""Exporting encoders: the bundle gives what PyTorch gives, others load it, and nothing is left of a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from emberpc.bundle import BundleError, Prompts, Task, read_bundle
from emberpc.export.embedding import export_embedding
from emberpc.export.encoder import read_encoder
from emberpc.export.errors import ExportError
from emberpc.export.stdlib_texts import read_stdlib, sample_texts
from emberpc.export.verify import verify_bundle


def test_the_bundle_gives_what_pytorch_gives(minilm_bundle: Path) -> None:
    manifest = read_bundle(minilm_bundle).manifest
    parity = manifest.variants[0].parity
    assert parity.texts == 64
    assert parity.cosine_min >= 0.9999
    assert parity.max_abs_diff <= 1e-4
    assert (manifest.task, manifest.dimensions, manifest.max_tokens) == (Task.EMBEDDING, 384, 256)
    assert (manifest.pooling, manifest.normalize) == ("mean", True)
    assert manifest.weights_sha256.startswith("53aa5117")
    assert manifest.weights_sha256.endswith("d9db")


def test_the_graph_has_its_outputs_in_order_and_dynamic_axes(minilm_bundle: Path) -> None:
    graph = onnx.load(str(minilm_bundle / "onnx" / "model.onnx")).graph
    assert [output.name for output in graph.output] == ["last_hidden_state", "sentence_embedding"]
    for node in graph.input:
        assert all(dimension.dim_param for dimension in node.type.tensor_type.shape.dim)


def test_sentence_transformers_loads_it_and_gives_the_same_vectors(minilm_bundle: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = sample_texts(24)
    loaded = SentenceTransformer(
        str(minilm_bundle), backend="onnx", device="cpu", model_kwargs={"provider": "CPUExecutionProvider"}
    )
    got = loaded.encode(texts, normalize_embeddings=True)
    expected = read_bundle(minilm_bundle).reference()
    shared = [texts.index(text) for text in expected.texts if text in texts]
    assert len(shared) >= 5
    kept = [i for i, text in enumerate(expected.texts) if text in texts]
    assert (got[shared] * expected.embeddings[kept]).sum(axis=1).min() >= 0.9999


def test_no_truncation_or_padding_is_left_in_the_tokenizer(minilm_bundle: Path) -> None:
    tokenizer = json.loads((minilm_bundle / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["truncation"] is None
    assert tokenizer["padding"] is None
    config = json.loads((minilm_bundle / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == 256


def sentence_transformers_folder(source: Path, folder: Path, pooling: Mapping[str, object], *others: str) -> Path:
    """Make a sentence-transformers folder of a plain encoder."""
    shutil.copytree(source, folder)
    kinds = ["Transformer", "Pooling", *others]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    for i, kind in enumerate(kinds[1:], 1):
        (folder / f"{i}_{kind}").mkdir()
    config = json.dumps({"word_embedding_dimension": 32, **pooling})
    (folder / "1_Pooling" / "config.json").write_text(config, encoding="utf-8")
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_pooling_gives_what_sentence_transformers_gives(
    tiny_source: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    key = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}[pooling]
    modes = {f"pooling_mode_{name}": name == key for name in ("mean_tokens", "cls_token", "max_tokens")}
    source = sentence_transformers_folder(
        tiny_source, tmp_path / "source", modes, *(["Normalize"] if normalize else [])
    )
    # The export compares with sentence-transformers itself, and raises if it differs.
    manifest = export_embedding(str(source), tmp_path / "bundle")
    assert (manifest.pooling, manifest.normalize) == (pooling, normalize)
    norms = np.linalg.norm(read_bundle(tmp_path / "bundle").reference().embeddings, axis=1)
    assert np.allclose(norms, 1, atol=1e-5) is normalize
    assert verify_bundle(tmp_path / "bundle").ok


def test_prompts_and_limits_are_read_or_given(tiny_source: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    config = {"prompts": {"query": "query: ", "document": "passage: "}, "matryoshka_dims": None}
    (source / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
    assert read_encoder(source).prompts == Prompts("query: ", "passage: ")
    assert read_encoder(source).max_tokens == 32
    manifest = export_embedding(
        str(source), tmp_path / "bundle", name="tiny", max_tokens=16, prompts=Prompts("q: ", "")
    )
    assert (manifest.base_model, manifest.max_tokens, manifest.prompts) == ("tiny", 16, Prompts("q: ", ""))
    with pytest.raises(ExportError, match="takes 1 to 32 tokens"):
        read_encoder(source, max_tokens=33)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "dragon"}), encoding="utf-8")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (without_weights, "safetensors"),
        (without_config, "config.json"),
        (broken_config, "not JSON"),
        (unknown_architecture, "cannot be converted"),
        (cut_weights, "cannot be converted"),
    ],
)
def test_a_source_that_cannot_be_exported_says_why_and_leaves_nothing(
    tiny_source: Path, tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "source")
    harm(source)
    with pytest.raises(ExportError, match=words):
        export_embedding(str(source), tmp_path / "out" / "bundle")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("pooling", "others", "words"),
    [
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "Dense"),
        ({"pooling_mode_lasttoken": True}, [], "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [], r"mean \+ cls"),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(
    tiny_source: Path, tmp_path: Path, pooling: dict[str, object], others: list[str], words: str
) -> None:
    source = sentence_transformers_folder(tiny_source, tmp_path / "source", pooling, *others)
    with pytest.raises(ExportError, match=words):
        export_embedding(str(source), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_ctrl_c_leaves_nothing(tiny_source: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if "comparing" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_embedding(str(tiny_source), tmp_path / "bundle", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_is_there_is_replaced_only_on_request(tiny_source: Path, tmp_path: Path) -> None:
    first = export_embedding(str(tiny_source), tmp_path / "bundle", name="first")
    with pytest.raises(BundleError, match="--overwrite"):
        export_embedding(str(tiny_source), tmp_path / "bundle", name="second")
    assert read_bundle(tmp_path / "bundle").manifest == first
    export_embedding(str(tiny_source), tmp_path / "bundle", name="second", overwrite=True)
    assert read_bundle(tmp_path / "bundle").manifest.base_model == "second"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match="not a bundle"):
        export_embedding(str(tiny_source), tmp_path / "other", overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_source_that_is_nowhere_says_where_it_was_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ExportError, match="no folder"):
        export_embedding("nobody/no-such-model", tmp_path / "bundle")


def test_the_standard_librarys_docstrings_are_many_and_public() -> None:
    docs = read_stdlib()
    assert len(docs) > 2000
    names = {doc.name for doc in docs}
    assert {"itertools.chain.from_iterable", "json.dumps", "pathlib.Path.exists"} <= names
    assert len(names) == len(docs)
    assert not any(part.startswith("_") for name in names for part in name.split("."))
    assert len(set(sample_texts(64))) == 64
