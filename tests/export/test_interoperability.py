"""Foreign folders are served by the settings in their files, or with the model option that the error names."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from emberpc.client import Client
from emberpc.export.convert import onnx_export
from emberpc.export.verify import verify_bundle
from emberpc.server.engine import Model, ModelLoadError
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of
from examples.server_process import ServerProcess
from fixtures_bundles import MakeSource, modules_json, pooling_json, tiny_tokenizer

TEXTS = ["a kitten", "interest rates rose again", "x", "the rain in spain stays mainly"]

Edit = Callable[[onnx.ModelProto], None]


Vectors = npt.NDArray[np.float32]


@contextmanager
def their_warnings() -> Iterator[None]:
    """Ignore warnings of other libraries, also those about temporary folders that they do not delete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


def with_onnx_file(source: Path, folder: Path) -> None:
    """Write an encoder in the layout in which sentence-transformers writes ONNX files, without the vectors' pooling."""
    from sentence_transformers import SentenceTransformer

    with their_warnings():
        model = SentenceTransformer(str(source), device="cpu")
        model.save_pretrained(str(folder))
        del model
    (folder / "model.safetensors").unlink()
    onnx_export.convert(source, folder / "onnx", 32)


def export_logits(model: torch.nn.Module, path: Path) -> None:
    """Write the graph of a classifier of transformers, whose output is `logits`."""
    names = ["input_ids", "attention_mask", "token_type_ids"]
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0  # without padding, the graph would ignore the mask
    free = {0: "batch_size", 1: "sequence_length"}
    with their_warnings():
        torch.onnx.export(
            model,
            kwargs={name: mask.clone() for name in names},  # the exporter would join equal objects
            f=str(path),
            dynamo=True,
            dynamic_shapes=dict.fromkeys(names, free),
            input_names=names,
            output_names=["logits"],
            verbose=False,
            external_data=False,
        )


def encoded(source: Path) -> Vectors:
    """Return the vectors that sentence-transformers gives the texts with PyTorch and without a prompt."""
    from sentence_transformers import SentenceTransformer

    found = SentenceTransformer(str(source), device="cpu").encode(TEXTS, prompt="", convert_to_numpy=True)
    return np.asarray(found, dtype=np.float32)


def served(folder: Path, options: Mapping[str, str] | None = None) -> Vectors:
    """Return the vectors that the engine of the server gives the texts in one batch, which has padding."""
    model = Model.load("m", folder, options=options)
    tokens = model.tokenizer.tokenize(TEXTS, "", Truncation.END, items_of("texts"))
    return model.encoder.run([text.ids for text in tokens])


def refused(folder: Path, options: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ModelLoadError) as error:
        Model.load("m", folder, options=options)
    return str(error.value)


@pytest.fixture(scope="session")
def foreign_folder(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder as sentence-transformers lays it out: the graph gives token vectors, JSON files the pooling."""
    folder = tmp_path_factory.mktemp("foreign") / "sentence-transformers"
    with_onnx_file(tiny_source, folder)
    return folder


@pytest.fixture(scope="session")
def expected(tiny_source: Path) -> Vectors:
    return encoded(tiny_source)


@pytest.fixture
def edited(foreign_folder: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """Return a function that copies the foreign folder without the JSON of the pooling, and edits the graph."""

    def edit(change: Edit) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(foreign_folder, folder)
        model = onnx.load(str(folder / "onnx" / "model.onnx"))
        change(model)
        onnx.checker.check_model(model)
        onnx.save(model, str(folder / "onnx" / "model.onnx"))
        return folder

    return edit


def rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give inputs and outputs other names."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def test_a_folder_written_by_sentence_transformers_is_served(foreign_folder: Path, expected: Vectors) -> None:
    assert not (foreign_folder / "emberpc.json").exists()
    np.testing.assert_allclose(served(foreign_folder), expected, atol=1e-5)
    report = verify_bundle(foreign_folder)
    assert report.ok, report.checks


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_pooling_and_normalization_of_a_foreign_folder_are_applied(
    make_source: MakeSource, tmp_path: Path, pooling: str
) -> None:
    source = make_source(
        {
            "modules.json": modules_json("Transformer", "Pooling", "Normalize"),
            "1_Pooling/config.json": pooling_json(pooling),
            "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}},
        }
    )
    folder = tmp_path / "foreign"
    with_onnx_file(source, folder)
    np.testing.assert_allclose(served(folder), encoded(source), atol=1e-5)
    prompts = Model.load("m", folder).manifest.prompts
    assert (prompts.query, prompts.passage) == ("q: ", "d: ")


def test_a_folder_without_modules_needs_a_pooling(tiny_source: Path, expected: Vectors, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    onnx_export.convert(tiny_source, plain, 32)
    shutil.copy(tiny_source / "config.json", plain)
    said = refused(plain)
    assert "does not say how the vectors of the tokens (last_hidden_state) become one of the text" in said
    assert said.endswith("state it with --model-option m.pooling=mean|cls|max|lasttoken")
    np.testing.assert_allclose(served(plain, {"pooling": "mean"}), expected, atol=1e-5)


def two_inputs(model: onnx.ModelProto) -> None:
    """Remove the input for token types; the graph computes zeros instead."""
    model.graph.input.remove(next(each for each in model.graph.input if each.name == "token_type_ids"))
    model.graph.node.insert(0, helper.make_node("Sub", ["input_ids", "input_ids"], ["token_type_ids"]))


def int32_inputs(model: onnx.ModelProto) -> None:
    names = {value.name: f"wide_{value.name}" for value in model.graph.input}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for i, value in enumerate(model.graph.input):
        value.type.tensor_type.elem_type = TensorProto.INT32
        model.graph.node.insert(i, helper.make_node("Cast", [value.name], [names[value.name]], to=TensorProto.INT64))


def a_second_output(model: onnx.ModelProto) -> None:
    """Add an output like that of BERT's pooler, which is no vector of the text."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    model.graph.node.append(helper.make_node("Gather", ["last_hidden_state", "zero"], ["pooler_output"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("pooler_output", TensorProto.FLOAT, ["batch_size", 32]))


@pytest.mark.parametrize("change", [two_inputs, int32_inputs, a_second_output])
def test_graphs_with_other_inputs_and_outputs_are_served(
    edited: Callable[[Edit], Path], expected: Vectors, change: Edit
) -> None:
    np.testing.assert_allclose(served(edited(change)), expected, atol=1e-5)


def test_inputs_are_found_by_name_or_by_a_model_option(edited: Callable[[Edit], Path], expected: Vectors) -> None:
    known = {"input_ids": "tokens", "attention_mask": "padding_mask", "token_type_ids": "segments"}
    folder = edited(lambda model: rename(model, known))
    np.testing.assert_allclose(served(folder), expected, atol=1e-5)
    shutil.rmtree(folder)

    unknown = {"input_ids": "first", "attention_mask": "second", "token_type_ids": "third"}
    folder = edited(lambda model: rename(model, unknown))
    said = refused(folder)
    assert "are unknown; the server can give input_ids, attention_mask, token_type_ids, position_ids" in said
    assert said.endswith("--model-option m.inputs=input_ids=NAME:attention_mask=NAME:token_type_ids=NAME")
    stated = "attention_mask=second:token_type_ids=third:input_ids=first"
    np.testing.assert_allclose(served(folder, {"inputs": stated}), expected, atol=1e-5)
    np.testing.assert_allclose(served(folder, {"inputs": "first:second:third"}), expected, atol=1e-5)
    assert "the option inputs names first; the inputs are" in refused(folder, {"inputs": "first"})


def position_inputs(model: onnx.ModelProto) -> None:
    """Add an input for positions, and remove the input for token types."""
    two_inputs(model)
    lookup = next(node for node in model.graph.node if node.op_type == "Gather" and "position_emb" in node.input[0])
    lookup.input[1] = "position_ids"
    shape = ["batch_size", "sequence_length"]
    model.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, shape))


def test_position_inputs_are_computed(edited: Callable[[Edit], Path], expected: Vectors) -> None:
    folder = edited(position_inputs)
    np.testing.assert_allclose(served(folder), expected, atol=1e-5)
    assert verify_bundle(folder).ok
    # An earlier error advised this option, with which the positions were zeros.
    said = refused(folder, {"inputs": "input_ids:attention_mask:position_ids"})
    right = "input_ids=input_ids:attention_mask=attention_mask:position_ids=position_ids"
    assert f"state the role of each input: inputs={right}" in said
    np.testing.assert_allclose(served(folder, {"inputs": right}), expected, atol=1e-5)
    assert not Model.load("m", folder).legacy_fingerprint
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "takes positions, and config.json states no model_type" in refused(folder)


def test_outputs_are_found_by_shape_or_by_a_model_option(edited: Callable[[Edit], Path], expected: Vectors) -> None:
    folder = edited(lambda model: rename(model, {"last_hidden_state": "out"}))
    np.testing.assert_allclose(served(folder), expected, atol=1e-5)
    shutil.rmtree(folder)

    def several(model: onnx.ModelProto) -> None:
        rename(model, {"last_hidden_state": "a"})
        model.graph.node.append(helper.make_node("Neg", ["a"], ["b"]))
        model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch_size", "seq", 32]))

    folder = edited(several)
    said = refused(folder)
    assert "it is unknown which of the outputs a, b holds the vectors" in said
    assert said.endswith("state it with --model-option m.output=NAME")
    np.testing.assert_allclose(served(folder, {"output": "a"}), expected, atol=1e-5)
    assert "the option output is c; the outputs are a, b" in refused(folder, {"output": "c"})


def test_a_pooled_output_of_another_name_is_found(edited: Callable[[Edit], Path]) -> None:
    def pooled(model: onnx.ModelProto) -> None:
        a_second_output(model)
        rename(model, {"pooler_output": "vector"})
        del model.graph.output[0]

    folder = edited(pooled)
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
    found = served(folder)
    assert found.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(np.linalg.norm(served(folder, {"normalize": "yes"}), axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(
        served(folder, {"normalize": "yes"}), found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-5
    )


def test_an_onnx_file_of_another_name_is_found_and_several_need_a_model_option(
    foreign_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(foreign_folder, folder)
    (folder / "onnx" / "model.onnx").rename(folder / "encoder_O3.onnx")
    assert served(folder).shape == (len(TEXTS), 32)
    shutil.copy(folder / "encoder_O3.onnx", folder / "encoder_O4.onnx")
    said = refused(folder)
    assert "encoder_O3.onnx, encoder_O4.onnx; state it with --model-option m.file=encoder_O3.onnx" in said
    assert served(folder, {"file": "encoder_O4.onnx"}).shape == (len(TEXTS), 32)


def test_the_fingerprint_covers_all_options_that_change_vectors(foreign_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(foreign_folder, folder)
    first = Model.load("m", foreign_folder)
    assert Model.load("other", folder).fingerprint == first.fingerprint
    assert Model.load("m", foreign_folder, options={"pooling": "cls"}).fingerprint != first.fingerprint
    assert Model.load("m", foreign_folder, options={"normalize": "yes"}).fingerprint != first.fingerprint
    assert Model.load("m", foreign_folder, options={"query_prompt": "q: "}).fingerprint != first.fingerprint


@pytest.fixture(scope="session")
def foreign_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with random weights, laid out as by optimum; its PyTorch form is in `torch` beside it."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("foreign") / "classifier"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        id2label={0: "good", 1: "bad", 2: "ugly"},
    )
    model = BertForSequenceClassification(config).eval()
    model.set_attn_implementation("eager")
    for place in (folder, folder / "torch"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    (folder / "model.safetensors").unlink()
    export_logits(model, folder / "model.onnx")
    return folder


def test_a_classifier_is_served_with_its_labels(foreign_classifier: Path) -> None:
    model = Model.load("m", foreign_classifier)
    assert model.manifest.labels == ("good", "bad", "ugly")
    assert served(foreign_classifier).shape == (len(TEXTS), 3)
    report = verify_bundle(foreign_classifier, against=foreign_classifier / "torch")
    assert report.ok, report.checks
    assert "logits on 64 texts" in report.checks[-1].detail


@pytest.fixture
def foreign_server(foreign_folder: Path, foreign_classifier: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    plain = tmp_path / "plain.v1"
    shutil.copytree(foreign_folder, plain)
    (plain / "modules.json").unlink()
    models = {"plain.v1": plain, "mood": foreign_classifier}
    with ServerProcess(models, tmp_path / "data", "--model-option", "plain.v1.pooling=mean") as server:
        yield server


def test_a_server_serves_foreign_folders_and_binds_collections_to_them(
    foreign_server: ServerProcess, expected: Vectors
) -> None:
    with Client(foreign_server.address) as client:
        np.testing.assert_allclose(client.embed(TEXTS, model="plain.v1", normalize=False), expected, atol=1e-5)
        assert client.classify(TEXTS, "mood")[0].label in ("good", "bad", "ugly")
        client.create_collection("notes", model="plain.v1")
        client.upsert("notes", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
        assert client.search("notes", TEXTS[2], top_k=1)[0].record.id == "2"


def test_verify_against_the_source_finds_a_wrong_variant(
    tiny_bundle: Path, tiny_source: Path, foreign_folder: Path
) -> None:
    report = verify_bundle(tiny_bundle, against=tiny_source)
    assert report.ok
    assert report.checks[-1].name == "fp32 against PyTorch"
    assert "100.0% of the 10 nearest" in report.checks[-1].detail
    assert verify_bundle(foreign_folder, against=tiny_source).ok
    wrong = verify_bundle(foreign_folder, options={"pooling": "max"}, against=tiny_source)
    assert [check.name for check in wrong.checks if not check.ok] == ["onnx against PyTorch"]
    assert not verify_bundle(tiny_bundle, against="./nothing").ok


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({"tokenizer.json": None}, {}, "has no tokenizer.json; save the model's tokenizer there"),
        ({"onnx/model.onnx": None}, {}, "has neither emberpc.json nor an ONNX file"),
        ({"onnx/model.onnx": "no graph"}, {}, "cannot be read as an ONNX file"),
        ({"modules.json": "{"}, {}, "modules.json is not JSON"),
        (
            {"1_Pooling/config.json": {"pooling_mode": "weightedmean"}},
            {},
            "the pooling weightedmean is not supported",
        ),
        ({"modules.json": modules_json("Transformer", "Pooling", "Dense")}, {}, "the module Dense is not run"),
        ({}, {"file": "other.onnx"}, "has no other.onnx, which the model option file names"),
        ({}, {"file": "../edited/onnx/model.onnx"}, "leads out of the model's folder"),
        ({}, {"colour": "red"}, "there is no model option 'colour'; there are: file, inputs"),
        ({}, {"pooling": "middle"}, "the model option pooling is 'middle'; it is one of mean, cls"),
        ({}, {"max_tokens": "many"}, "the model option max_tokens is 'many'; it must be a whole number"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(
    foreign_folder: Path, tmp_path: Path, files: Mapping[str, object], options: Mapping[str, str], said: str
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign_folder, folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert said in refused(folder, options)
    report = verify_bundle(folder, options=options)
    assert not report.ok
    assert said in report.checks[-1].detail


def test_a_link_to_a_file_outside_the_folder_is_refused(foreign_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    shutil.copytree(foreign_folder, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(foreign_folder / "tokenizer.json")
    assert "leads out of the model's folder; copy the files there" in refused(folder)


def test_model_options_for_a_bundle_are_refused(tiny_bundle: Path) -> None:
    assert "whose manifest has all settings; leave out the model options" in refused(tiny_bundle, {"pooling": "mean"})
