"""Settings that are read from a source, and sources that are refused since they cannot be exported yet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import Prompts, finish_bundle
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.convert.parity import torch_vectors
from emberpc.export.embedding import export_embedding
from emberpc.export.errors import ExportError
from emberpc.export.source.encoder import read_encoder
from emberpc.export.tuning.trainable_encoder import TrainableEncoder
from emberpc.export.verify import verify_bundle
from fixtures_bundles import MakeSource, modules_json, pooling_json

MEAN = pooling_json("mean")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (pooling_json("mean"), "mean"),
        (pooling_json("cls"), "cls"),
        (pooling_json("max"), "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"word_embedding_dimension": 32}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": ["max"], "include_prompt": True}, "max"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
    ],
)
def test_the_pooling_is_read_from_every_config_form(make_source: MakeSource, config: object, expected: str) -> None:
    source = make_source({"modules.json": modules_json("Transformer", "Pooling"), "1_Pooling/config.json": config})
    assert read_encoder(source).pooling == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": ["mean", "max"]}, r"mean \+ max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"cls \+ mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, "leaves the prompt out"),
        ({}, "states no pooling"),
        ("{", "is not JSON"),
        ([], "holds no JSON object"),
    ],
)
def test_the_error_for_an_unsupported_pooling_names_the_pooling(
    make_source: MakeSource, config: object, words: str
) -> None:
    source = make_source({"modules.json": modules_json("Transformer", "Pooling"), "1_Pooling/config.json": config})
    with pytest.raises(ExportError, match=words):
        read_encoder(source)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (modules_json("Transformer", "Pooling", "LSTM"), "the module LSTM in '2_LSTM' cannot be exported yet"),
        (modules_json("Transformer", "Pooling", "Dense"), "2_Dense/model.safetensors is missing"),
        (modules_json("Transformer", "Pooling", "Normalize", "Dense"), "the module Dense"),
        (modules_json("WordEmbeddings", "Pooling"), "the module WordEmbeddings"),
        (modules_json("Transformer", "Normalize", "Pooling"), "the module Normalize .* in this order"),
        (modules_json("Transformer"), "has no Pooling"),
        ([], "has no Pooling"),
        ({}, "is no list of modules"),
        (["Transformer"], "is no list of modules"),
        ([{"path": ""}], "the module"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_the_error_for_an_unsupported_module_names_the_module(
    make_source: MakeSource, modules: object, words: str
) -> None:
    source = make_source({"modules.json": modules, "1_Pooling/config.json": MEAN})
    with pytest.raises(ExportError, match=words):
        read_encoder(source)


def test_files_that_are_ignored_without_modules_json_are_reported(
    make_source: MakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"1_Pooling/config.json": pooling_json("cls"), "sentence_bert_config.json": {"max_seq_length": 20}}
    assert read_encoder(make_source(files)).pooling == "mean"
    assert "has 1_Pooling/config.json, sentence_bert_config.json but no modules.json" in caplog.text
    caplog.clear()
    assert read_encoder(make_source(name="plain")).pooling == "mean"
    assert read_encoder(make_source({**MODULES, **files}, name="whole")).pooling == "cls"
    assert not caplog.text


def test_a_refused_source_leaves_no_files(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source({"modules.json": modules_json("Transformer", "Pooling", "LSTM")})
    with pytest.raises(ExportError, match="LSTM"):
        export_embedding(source, tmp_path / "deep" / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder"])
def test_the_error_for_another_kind_of_model_names_the_kind(make_source: MakeSource, kind: str) -> None:
    source = make_source({"config_sentence_transformers.json": {"model_type": kind}})
    with pytest.raises(ExportError, match=kind):
        read_encoder(source)


def test_weights_that_are_not_safetensors_are_refused(make_source: MakeSource) -> None:
    source = make_source()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"has no .*safetensors"):
        read_encoder(source)


@pytest.mark.parametrize("name", ["config.json", "config_sentence_transformers.json", "sentence_bert_config.json"])
def test_a_file_that_is_not_json_is_named_in_the_error(make_source: MakeSource, name: str) -> None:
    with pytest.raises(ExportError, match=f"{name} is not JSON"):
        read_encoder(make_source({**MODULES, name: "{"}))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no config\.json"):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, Prompts()),
        ({"prompts": {"query": "q: ", "document": "d: "}}, Prompts("q: ", "d: ")),
        ({"prompts": {"query": "q: ", "passage": "p: ", "document": "d: "}}, Prompts("q: ", "d: ")),
        ({"prompts": {"query": "query: ", "passage": "passage: "}}, Prompts("query: ", "passage: ")),
        ({"prompts": {"query": "q: ", "document": None, "corpus": "c: "}}, Prompts("q: ", "c: ")),
        ({"prompts": {"query": "q: ", "document": "", "passage": "p: "}}, Prompts("q: ", "p: ")),
        ({"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}, Prompts("q: ", "")),
        ({"prompts": {"query": None, "document": None}}, Prompts()),
        ({"prompts": {"query": "q: "}, "default_prompt_name": "query"}, Prompts("q: ", "q: ")),
        ({"prompts": {"any": "a: "}, "default_prompt_name": "any"}, Prompts("a: ", "a: ")),
    ],
)
def test_prompts_are_read_under_every_known_name(make_source: MakeSource, stated: object, expected: Prompts) -> None:
    assert read_encoder(make_source({"config_sentence_transformers.json": stated})).prompts == expected


MODULES = {"modules.json": modules_json("Transformer", "Pooling"), "1_Pooling/config.json": MEAN}
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_read_by_each_name_that_sentence_transformers_reads(make_source: MakeSource, kind: str) -> None:
    settings = {"max_seq_length": 20, "do_lower_case": True}
    source = make_source({**MODULES, f"sentence_{kind}_config.json": settings})
    encoder = read_encoder(source)
    assert (encoder.max_tokens, encoder.lower_case, encoder.max_tokens_stated) == (20, True, False)
    assert read_encoder(source, max_tokens=24).max_tokens == 24
    assert read_encoder(source, max_tokens=24).max_tokens_stated


#: The least tokenizer_config.json with which sentence-transformers runs a model.
PADDED = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 32),
        ({"sentence_bert_config.json": {"max_seq_length": 20}}, 32),  # not read without modules.json
        ({**MODULES, "sentence_xlnet_config.json": {"max_seq_length": 20}}, 20),
        ({**MODULES, "sentence_bert_config.json": {}, "sentence_albert_config.json": {"max_seq_length": 20}}, 20),
        (
            {
                **MODULES,
                "sentence_bert_config.json": {"max_seq_length": 24},
                "sentence_roberta_config.json": {"max_seq_length": 20},
            },
            24,
        ),
        (
            {
                **MODULES,
                "sentence_bert_config.json": {"max_seq_length": 24},
                "tokenizer_config.json": PADDED | {"model_max_length": 16},
            },
            24,
        ),
        (
            {
                **MODULES,
                "sentence_bert_config.json": {"max_seq_length": 24, "processor_kwargs": {"model_max_length": 12}},
            },
            12,
        ),
        ({**MODULES, "sentence_bert_config.json": {"max_seq_length": None}}, 32),
    ],
)
def test_the_token_limit_equals_that_of_sentence_transformers(
    make_source: MakeSource, files: dict[str, object], limit: int
) -> None:
    source = make_source(files)
    assert read_encoder(source).max_tokens == limit
    torch_vectors(str(source), ["a"], limit)  # compares the limits


def test_the_parity_check_finds_another_token_limit(make_source: MakeSource) -> None:
    source = make_source({**MODULES, "sentence_roberta_config.json": {"max_seq_length": 12}})
    long = "a b c d e f g h i j k l m n o p"
    with pytest.raises(ExportError, match="truncated at 32 tokens, but sentence-transformers truncates them at 12"):
        torch_vectors(str(source), [long], 32)
    own = torch_vectors(str(source), [long], 12)
    assert not np.allclose(torch_vectors(str(source), [long], 32, stated=True), own, atol=1e-3)


def test_verify_compares_the_token_limit_with_that_of_the_source(
    make_source: MakeSource, tiny_source: Path, tmp_path: Path
) -> None:
    manifest = export_embedding(tiny_source, tmp_path / "stated", max_tokens=12)
    assert manifest.max_tokens_stated
    assert verify_bundle(tmp_path / "stated", against=tiny_source).ok
    finish_bundle(tmp_path / "stated", replace(manifest, max_tokens_stated=False))
    report = verify_bundle(tmp_path / "stated", against=tiny_source)
    assert not report.ok
    assert "truncated at 12 tokens, but sentence-transformers truncates them at 32" in report.checks[-1].detail
    assert "--max-tokens 12 if that limit is wanted" in report.checks[-1].detail


def old_form(source: Path) -> Path:
    """Change a source to the layout of sentence-transformers 0: the encoder in `0_Transformer`, with pooling `cls`."""
    inner = source.parent / "0_Transformer"
    source.rename(inner)
    source.mkdir()
    inner.rename(source / "0_Transformer")
    modules = modules_json("Transformer", "Pooling")
    modules[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling_json("cls")))
    (source / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    return source


def test_an_encoder_in_a_subfolder_is_exported_with_the_pooling_of_the_model(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = old_form(make_source())
    manifest = export_embedding(source, tmp_path / "bundle")
    assert (manifest.pooling, manifest.max_tokens) == ("cls", 20)
    assert verify_bundle(tmp_path / "bundle", against=source).ok


def test_the_transformer_folder_of_a_larger_model_is_refused(make_source: MakeSource) -> None:
    source = old_form(make_source())
    with pytest.raises(ExportError, match=f"is a part of the model in {source}, .* name {source}"):
        read_encoder(source / "0_Transformer")


@pytest.mark.parametrize("place", ["../elsewhere", "/etc"])
@pytest.mark.parametrize("module", [0, 1, 2])
def test_a_module_outside_the_folder_is_refused(make_source: MakeSource, place: str, module: int) -> None:
    modules = modules_json("Transformer", "Pooling", "Dense")
    modules[module]["path"] = place
    with pytest.raises(ExportError, match="leads out of the folder"):
        read_encoder(make_source({**MODULES, "modules.json": modules}))


@pytest.mark.parametrize("wanted", [-1, 0, 2, 33])
def test_a_token_limit_that_the_model_does_not_support_is_refused(
    make_source: MakeSource, tmp_path: Path, wanted: int
) -> None:
    with pytest.raises(ExportError, match=str(wanted)):
        export_embedding(make_source(), tmp_path / "bundle", max_tokens=wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_model_without_a_token_limit_needs_max_tokens(make_source: MakeSource) -> None:
    source = make_source()
    config = json.loads((source / "config.json").read_text())
    del config["max_position_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 10**30}))
    with pytest.raises(ExportError, match="--max-tokens"):
        read_encoder(source)
    assert read_encoder(source, max_tokens=8).max_tokens == 8


LEFT = {"truncation_side": "left"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"tokenizer_config.json": PLAIN | LEFT}, True),
        ({"tokenizer_config.json": PLAIN | {"truncation_side": "right"}}, False),
        ({**MODULES, "sentence_bert_config.json": {"max_seq_length": 24, "tokenizer_args": LEFT}}, True),
        ({**MODULES, "sentence_bert_config.json": {"max_seq_length": 24, "processor_kwargs": LEFT}}, True),
        ({"sentence_bert_config.json": {"max_seq_length": 24, "processor_kwargs": LEFT}}, False),  # it is not read
    ],
)
def test_a_model_that_truncates_texts_at_their_start_is_refused(
    make_source: MakeSource, files: dict[str, object], refused: bool
) -> None:
    source = make_source(files)
    if refused:
        with pytest.raises(ExportError, match="truncation_side left, which truncates texts at their start"):
            read_encoder(source)
    else:
        assert read_encoder(source)


@pytest.mark.parametrize(
    ("direction", "stated", "refused"),
    [("Left", {}, True), ("Right", {}, False), ("Left", {"truncation_side": "right"}, False)],
)
def test_the_truncation_side_of_tokenizer_json_applies(
    make_source: MakeSource, direction: str, stated: dict[str, object], refused: bool
) -> None:
    """As in transformers, the side in tokenizer_config.json overrides that of tokenizer.json."""
    source = make_source({"tokenizer_config.json": PLAIN | stated})
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": direction, "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    if refused:
        with pytest.raises(ExportError, match="truncation_side left"):
            read_encoder(source)
    else:
        assert read_encoder(source).max_tokens == 32


def test_without_a_tokenizer_limit_the_positions_limit_the_tokens(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source({"tokenizer_config.json": PADDED})
    manifest = export_embedding(source, tmp_path / "bundle")
    assert manifest.max_tokens == 32
    assert not manifest.max_tokens_stated
    assert verify_bundle(tmp_path / "bundle", against=source).ok


def test_the_first_two_positions_of_roberta_do_not_count(make_source: MakeSource) -> None:
    source = make_source({"tokenizer_config.json": {"model_max_length": 512}})
    config = json.loads((source / "config.json").read_text())
    changed = {**config, "model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    (source / "config.json").write_text(json.dumps(changed))
    assert read_encoder(source).max_tokens == 512


def test_the_weights_hash_covers_only_the_weights(make_source: MakeSource, tiny_source: Path) -> None:
    with_prompt = make_source({"config_sentence_transformers.json": {"prompts": {"query": "q"}}}, name="a")
    assert read_encoder(with_prompt).weights_sha256 == read_encoder(tiny_source).weights_sha256
    other = make_source(name="b")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert read_encoder(other).weights_sha256 != read_encoder(tiny_source).weights_sha256


def test_the_bundle_of_a_lower_casing_model_lower_cases_texts(make_source: MakeSource, tmp_path: Path) -> None:
    """sentence-transformers lower-cases texts before the tokenizer. The tokenizer of this source keeps the case."""
    source = make_source(
        {
            "modules.json": modules_json("Transformer", "Pooling"),
            "1_Pooling/config.json": pooling_json("mean"),
            "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": True},
        }
    )
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    export_embedding(str(source), tmp_path / "bundle")
    runner = OnnxRunner(tmp_path / "bundle/onnx/model.onnx", tmp_path / "bundle/tokenizer.json", 32, 0)
    small, large = runner.run(["a kitten", "A Kitten"], "sentence_embedding")
    np.testing.assert_allclose(small, large)
    expected = torch_vectors(str(source), ["A Kitten"], 32)
    np.testing.assert_allclose(large, expected[0], atol=1e-5)
    tokens = TrainableEncoder(read_encoder(source)).tokenize(["A Kitten", "a kitten"])
    assert tokens[0] == tokens[1]
