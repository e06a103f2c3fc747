"""Bundles run with the ONNX backends of sentence-transformers and optimum, and folders that these write are served.

These libraries need transformers below 4.58, so they are in an environment of their own: `make optimum-venv`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from emberpc.bundle import Prompts, read_bundle
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.embedding import export_embedding
from emberpc.server.engine import Model
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of
from fixtures_bundles import MODULES, MakeSource, modules_json, pooling_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
Vectors = npt.NDArray[np.float32]
Run = Callable[..., None]


@pytest.fixture
def run() -> Run:
    """Return a function that runs an action of `optimum_backend.py`."""
    python = ROOT / ".venv-optimum" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no environment with optimum-onnx; run: make optimum-venv")

    def start(*arguments: object) -> None:
        command = [str(python), str(ROOT / "tests" / "optimum_backend.py"), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return start


@pytest.fixture
def theirs(run: Run, tmp_path: Path) -> Callable[..., Vectors]:
    """Return a function that gives the outputs of another library for texts."""

    def outputs(action: str, folder: Path, texts: list[str], *more: str) -> Vectors:
        (given := tmp_path / "texts.json").write_text(json.dumps(texts))
        run(action, folder, given, tmp_path / "out.npy", *more)
        return np.asarray(np.load(tmp_path / "out.npy"), dtype=np.float32)

    return outputs


def ours(folder: Path, texts: list[str], output: str = "sentence_embedding", variant: str = "fp32") -> Vectors:
    manifest = read_bundle(folder).manifest
    path = folder / manifest.variant(variant).path
    runner = OnnxRunner(path, folder / "tokenizer.json", manifest.max_tokens, manifest.pad_token_id)
    return runner.run(texts, output, batch_size=4)


def served(folder: Path, texts: list[str], **options: str) -> Vectors:
    """Return the vectors that the engine of the server gives the texts in one batch, which has padding."""
    model = Model.load("m", folder, options=options)
    tokens = model.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))
    return model.encoder.run([text.ids for text in tokens])


def test_sentence_transformers_gives_the_vectors_of_a_bundle(
    theirs: Callable[..., Vectors], minilm_bundle: Path
) -> None:
    texts = sample_texts(8)
    np.testing.assert_allclose(theirs("encode", minilm_bundle, texts), ours(minilm_bundle, texts), atol=1e-4)


@pytest.mark.parametrize(("mode", "normalize"), [("mean", True), ("cls", False), ("max", True), ("lasttoken", False)])
def test_sentence_transformers_pools_and_normalizes_as_the_bundle_does(
    theirs: Callable[..., Vectors], make_source: MakeSource, tmp_path: Path, mode: str, normalize: bool
) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    source = make_source({"modules.json": modules_json(*kinds), "1_Pooling/config.json": pooling_json(mode)})
    export_embedding(source, tmp_path / "bundle")
    texts = ["a", "some words of a text", "others"]
    np.testing.assert_allclose(
        theirs("encode", tmp_path / "bundle", texts), ours(tmp_path / "bundle", texts), atol=1e-5
    )


def test_sentence_transformers_reads_prompts_special_tokens_and_the_limit(
    theirs: Callable[..., Vectors], tiny_source: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": ["[MASK]"]}))
    export_embedding(source, bundle, max_tokens=12, prompts=Prompts(query="query: "))
    text = "what is it that has more than twelve tokens"
    np.testing.assert_allclose(theirs("encode-queries", bundle, [text]), ours(bundle, [f"query: {text}"]), atol=1e-5)


def test_sentence_transformers_runs_a_variant_by_the_name_of_its_file(
    theirs: Callable[..., Vectors], tiny_source: Path, some_texts: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export_embedding(str(tiny_source), bundle, variants=["int8"], validation=some_texts)
    name = Path(read_bundle(bundle).manifest.variant("int8").path).name
    texts = ["a", "some words of a text"]
    found = np.concatenate([theirs("encode", bundle, [text], name) for text in texts])
    np.testing.assert_allclose(found, [ours(bundle, [text], variant="int8")[0] for text in texts], atol=1e-4)


def test_optimum_gives_the_logits_of_a_classifier(theirs: Callable[..., Vectors], classifier_bundle: Path) -> None:
    texts = sample_texts(8)
    found = theirs("classify", classifier_bundle, texts)
    assert found.shape == (8, len(MODULES))
    np.testing.assert_allclose(found, ours(classifier_bundle, texts, "logits"), atol=1e-3)


def for_transformers_4(source: Path) -> Path:
    """Give a source's tokenizer the name of its class in transformers 4."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return source


@pytest.mark.parametrize("pooled", [True, False])
def test_a_folder_that_optimum_writes_is_served(
    run: Run, make_source: MakeSource, tmp_path: Path, pooled: bool
) -> None:
    source = make_source(
        {"modules.json": modules_json("Transformer", "Pooling"), "1_Pooling/config.json": pooling_json("mean")}
    )
    export_embedding(source, tmp_path / "bundle")
    run("write", for_transformers_4(source), tmp_path / "theirs", "sentence_transformers" if pooled else "transformers")
    outputs = [output.name for output in onnx.load(str(tmp_path / "theirs" / "model.onnx")).graph.output]
    assert outputs == (["token_embeddings", "sentence_embedding"] if pooled else ["last_hidden_state"])
    texts = ["a", "some words of a text", "others"]
    found = served(tmp_path / "theirs", texts, **({} if pooled else {"pooling": "mean"}))
    np.testing.assert_allclose(found, ours(tmp_path / "bundle", texts), atol=1e-5)


def test_a_folder_that_sentence_transformers_writes_is_served(
    run: Run, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(
        {
            "modules.json": modules_json("Transformer", "Pooling", "Normalize"),
            "1_Pooling/config.json": pooling_json("cls"),
        }
    )
    export_embedding(source, tmp_path / "bundle")
    run("save", for_transformers_4(source), tmp_path / "theirs")
    texts = ["a", "some words of a text", "others"]
    np.testing.assert_allclose(served(tmp_path / "theirs", texts), ours(tmp_path / "bundle", texts), atol=1e-5)
