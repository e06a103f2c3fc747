"""The export of encoders: sentence-transformers must read every bundle and give equal vectors."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from bundle_cache import PARITY_TEXTS
from emberpc.bundle import BundleError, Manifest, Prompts, Reference, Task, read_bundle
from emberpc.client import Client
from emberpc.export.convert import graph
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.embedding import export_embedding
from emberpc.export.errors import ExportError
from emberpc.export.verify import verify_bundle
from examples.server_process import ServerProcess
from fixtures_bundles import MakeSource, minilm_source, modules_json, pooling_json

FILES = {
    "README.md",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "onnx/model.onnx",
    "reference.npz",
}


def sentence_transformers_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: np.ndarray = model.encode(texts, batch_size=4, show_progress_bar=False)
    return vectors


def our_vectors(folder: Path, texts: list[str]) -> np.ndarray:
    manifest = read_bundle(folder).manifest
    runner = OnnxRunner(
        folder / "onnx" / "model.onnx", folder / "tokenizer.json", manifest.max_tokens, manifest.pad_token_id
    )
    return runner.run(texts, "sentence_embedding", batch_size=4)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


class Interrupt:
    """A progress function that raises KeyboardInterrupt at its call number `at`, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def leftovers(folder: Path) -> set[str]:
    """Return the names of files and folders in the target folder of an export, except for the source."""
    return {path.name for path in folder.iterdir()} - {"source"}


def test_exported_minilm_gives_the_vectors_of_pytorch(minilm_bundle: Path) -> None:
    manifest = read_bundle(minilm_bundle).manifest
    assert manifest.task is Task.EMBEDDING
    assert (manifest.dimensions, manifest.pooling, manifest.normalize) == (384, "mean", True)
    assert (manifest.max_tokens, manifest.prompts) == (256, Prompts())
    assert (manifest.weights_sha256[:8], manifest.weights_sha256[-4:]) == ("53aa5117", "d9db")
    assert manifest.revision == manifest.weights_sha256[:12]
    parity = manifest.variant().parity
    assert parity.texts == PARITY_TEXTS
    assert parity.cosine_min >= 0.9999
    assert parity.max_abs_diff <= 1e-4


def test_served_vectors_equal_those_of_sentence_transformers(minilm_bundle: Path, tmp_path: Path) -> None:
    texts = [*sample_texts(30), *(" ".join(sample_texts(12)[i:]) for i in range(4)), "x", "a few words"]
    theirs = sentence_transformers_vectors(minilm_source(), texts)
    with ServerProcess({"minilm": minilm_bundle}, tmp_path) as server, Client(server.address) as client:
        ours = client.embed(texts, truncation="end")
    assert ours.shape == (len(texts), 384)
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= 0.9999
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_the_bundle_has_all_files_and_settings_that_other_libraries_read(minilm_bundle: Path) -> None:
    assert set(read_bundle(minilm_bundle).manifest.files) == FILES
    tokenizer = Tokenizer.from_file(str(minilm_bundle / "tokenizer.json"))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    config = json.loads((minilm_bundle / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 256
    # tokenizer.json of MiniLM truncates at 128 tokens, and so would libraries that read this key.
    assert "max_length" not in config
    assert json.loads((minilm_bundle / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    card = (minilm_bundle / "README.md").read_text()
    assert "all-MiniLM-L6-v2" in card
    assert "53aa5117" in card


def test_the_settings_of_a_tokenizer_are_those_that_transformers_4_knows(tiny_source: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_source, tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    path.write_text(json.dumps(settings | {"extra_special_tokens": ["[MASK]"]}))
    export_embedding(tmp_path / "source", tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["[MASK]"]
    assert not written.keys() & {"extra_special_tokens", "is_local", "local_files_only"}


def test_the_graph_has_named_dynamic_axes_and_its_outputs_in_order(minilm_bundle: Path) -> None:
    model = onnx.load(minilm_bundle / "onnx" / "model.onnx")
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert [value.name for value in model.graph.output] == ["last_hidden_state", "sentence_embedding"]
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch_size", "sequence_length"]
    assert shapes["last_hidden_state"] == ["batch_size", "sequence_length", 384]
    assert shapes["sentence_embedding"] == ["batch_size", 384]


def test_the_reference_has_the_vectors_of_pytorch(minilm_bundle: Path) -> None:
    reference = Reference.read(minilm_bundle)
    theirs = sentence_transformers_vectors(minilm_source(), list(reference.texts))
    np.testing.assert_allclose(reference.vectors, theirs, atol=1e-5)
    assert len(reference.texts) >= 8


@pytest.mark.parametrize(
    ("mode", "normalize"),
    [
        ("mean", False),
        ("mean", True),
        ("cls", True),
        ("max", False),
        # Normalization comes after every pooling.
        pytest.param("cls", False, marks=pytest.mark.slow),
        pytest.param("max", True, marks=pytest.mark.slow),
    ],
)
def test_every_pooling_gives_the_vectors_of_sentence_transformers(
    make_source: MakeSource, tmp_path: Path, mode: str, normalize: bool
) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    source = make_source({"modules.json": modules_json(*kinds), "1_Pooling/config.json": pooling_json(mode)})
    manifest = export_embedding(source, tmp_path / "bundle")
    assert (manifest.pooling, manifest.normalize) == (mode, normalize)
    texts = sample_texts(16)
    expected = sentence_transformers_vectors(source, texts)
    np.testing.assert_allclose(our_vectors(tmp_path / "bundle", texts), expected, atol=1e-4)


def test_a_plain_encoder_gets_mean_pooling_like_in_sentence_transformers(tiny_source: Path, tiny_bundle: Path) -> None:
    manifest = read_bundle(tiny_bundle).manifest
    assert (manifest.pooling, manifest.normalize, manifest.max_tokens) == ("mean", False, 32)
    texts = sample_texts(16)
    np.testing.assert_allclose(
        our_vectors(tiny_bundle, texts), sentence_transformers_vectors(tiny_source, texts), atol=1e-4
    )


def test_distilbert_with_another_size_key_and_two_inputs_is_exported(make_source: MakeSource, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    source = make_source()
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    (source / "config.json").unlink()
    config = DistilBertConfig(
        vocab_size=vocabulary, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32
    )
    DistilBertModel(config).save_pretrained(source)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "model_input_names": ["input_ids", "attention_mask"]})
    )
    manifest = export_embedding(source, tmp_path / "bundle")
    assert manifest.dimensions == 32
    session = ort.InferenceSession(tmp_path / "bundle" / "onnx" / "model.onnx")
    assert [node.name for node in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert verify_bundle(tmp_path / "bundle").ok


@pytest.mark.whole_exports
def test_options_are_written_to_the_manifest_and_the_folder(tiny_source: Path, tmp_path: Path) -> None:
    prompts = Prompts(query="query: ", passage="passage: ")
    target = tmp_path / "bundle"
    manifest = export_embedding(str(tiny_source), target, name="me/mine", max_tokens=12, prompts=prompts)
    assert read_bundle(target).manifest == manifest
    assert (manifest.base_model, manifest.max_tokens, manifest.prompts) == ("me/mine", 12, prompts)
    parity = manifest.variant().parity
    assert parity is not None
    assert parity.texts == 64
    assert json.loads((target / "sentence_bert_config.json").read_text())["max_seq_length"] == 12
    stated = json.loads((target / "config_sentence_transformers.json").read_text())
    assert stated["prompts"] == {"query": "query: ", "passage": "passage: "}


@pytest.mark.whole_exports
def test_two_exports_of_one_model_have_equal_fingerprints(tiny_source: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_embedding(str(tiny_source), tmp_path / name)
    assert read_bundle(tmp_path / "first").fingerprint() == read_bundle(tmp_path / "second").fingerprint()


def test_weights_above_the_limit_of_an_onnx_file_are_written_to_another_file(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_MAX_BYTES", 1000)
    manifest = export_embedding(str(tiny_source), tmp_path / "bundle")
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= set(manifest.files)
    assert verify_bundle(tmp_path / "bundle").ok


def test_an_export_reports_progress_in_stages(tiny_source: Path, tmp_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    export_embedding(str(tiny_source), tmp_path / "bundle", progress=lambda *args: reported.append(args))
    assert len({stage for stage, *_ in reported}) >= 2
    assert all(0 <= done <= total and total >= 1 for _, done, total, *_ in reported)


def test_a_bundle_is_replaced_only_with_overwrite(tiny_source: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = export_embedding(str(tiny_source), target)
    with pytest.raises(BundleError, match="--overwrite"):
        export_embedding(str(tiny_source), target, max_tokens=16)
    assert read_bundle(target).manifest == first
    second = export_embedding(str(tiny_source), target, max_tokens=16, overwrite=True)
    assert read_bundle(target).manifest == second
    assert second.max_tokens == 16
    assert leftovers(tmp_path) == {"bundle"}


def test_ctrl_c_at_any_stage_leaves_no_files(tiny_source: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    export_embedding(str(tiny_source), tmp_path / "whole", progress=lambda stage, *_: stages.append(stage))
    for i in range(len(stages)):
        with pytest.raises(KeyboardInterrupt):
            export_embedding(str(tiny_source), tmp_path / "deep" / "bundle", progress=Interrupt(i))
        assert leftovers(tmp_path) == {"whole"}


def test_a_graph_with_other_vectors_than_pytorch_is_not_written(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_mean(self: graph.GraphEditor) -> str:
        """Count padding in the mean: an error that the parity check must find."""
        return self._node("ReduceMean", ["last_hidden_state", "axis_1"], keepdims=0)

    monkeypatch.setattr(graph.GraphEditor, "_mean", wrong_mean)
    with pytest.raises(ExportError, match=r"does not give what PyTorch gives.*nothing was written"):
        export_embedding(str(tiny_source), tmp_path / "bundle")
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize("change", ["output", "name"])
def test_outputs_of_another_shape_than_those_of_pytorch_are_refused(
    make_source: MakeSource, tmp_path: Path, change: str
) -> None:
    """sentence-transformers ignores the dense layer here; numpy could not broadcast the two shapes to compare them."""
    from safetensors.numpy import save_file

    modules = modules_json("Transformer", "Pooling", "Dense", "Normalize")
    dense = {"in_features": 32, "out_features": 16, "bias": False, "activation_function": "torch.nn.Tanh"}
    if change == "output":
        dense["module_output_name"] = "other"
    else:
        modules[3]["name"] = modules[2]["name"]
    files = {"modules.json": modules, "1_Pooling/config.json": pooling_json("mean"), "2_Dense/config.json": dense}
    source = make_source(files)
    save_file({"linear.weight": np.ones((16, 32), np.float32)}, source / "2_Dense" / "model.safetensors")
    with pytest.raises(ExportError, match=r"PyTorch gives outputs of the shape \(\d+, 32\), .* \(\d+, 16\); check"):
        export_embedding(source, tmp_path / "bundle")
    assert leftovers(tmp_path) == set()


def test_weights_without_a_needed_tensor_are_refused(make_source: MakeSource, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_source()
    tensors = load_file(source / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lack 1 tensors, such as encoder\.layer\.1\.output\.dense\.weight"):
        export_embedding(source, tmp_path / "bundle")
    assert leftovers(tmp_path) == set()


def test_an_unsupported_encoder_is_refused_with_the_reason(make_source: MakeSource, tmp_path: Path) -> None:
    config = json.loads((make_source(name="original") / "config.json").read_text())
    source = make_source({"config.json": {**config, "model_type": "never-heard-of", "architectures": ["NeverModel"]}})
    with pytest.raises(ExportError, match=r"cannot be converted to ONNX \(ValueError\)") as caught:
        export_embedding(source, tmp_path / "bundle")
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == {"original"}


def test_a_model_with_its_own_code_is_refused_and_the_code_is_not_run(make_source: MakeSource, tmp_path: Path) -> None:
    config = json.loads((make_source(name="original") / "config.json").read_text())
    trap = tmp_path / "trap"
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    source = make_source({"config.json": {**config, "model_type": "own", "auto_map": auto_map}})
    (source / "code.py").write_text(f"open({str(trap)!r}, 'w')\n")
    with pytest.raises(ExportError, match="needs trust_remote_code"):
        export_embedding(source, tmp_path / "bundle")
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0, 5, -100])
def test_damaged_weights_are_refused(make_source: MakeSource, tmp_path: Path, kept: int) -> None:
    source = make_source()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged .*; get it again"):
        export_embedding(source, tmp_path / "bundle")
    assert leftovers(tmp_path) == set()


@pytest.mark.whole_exports
def test_an_export_of_a_local_folder_does_not_use_the_network(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    export_embedding(str(tiny_source), tmp_path / "bundle")
    assert isinstance(read_bundle(tmp_path / "bundle").manifest, Manifest)
    assert capfd.readouterr() == ("", "")


_WITHOUT_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from emberpc.export.embedding import export_embedding
export_embedding(sys.argv[1], sys.argv[2])
"""


# The same as the test above, but including the imports of all libraries, which take 8 s of CPU time.
@pytest.mark.slow
def test_an_export_in_a_new_process_prints_nothing_and_uses_no_network(tiny_source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WITHOUT_NETWORK, str(tiny_source), str(tmp_path / "bundle")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == ""
    assert isinstance(read_bundle(tmp_path / "bundle").manifest, Manifest)
