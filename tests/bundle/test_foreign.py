"""Foreign folders: numbers and texts in their files are checked against limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from emberpc.bundle import Bundle, BundleError, Graph, Manifest, Stated, Tensor, open_bundle

BIG = 10**12


def foreign(
    folder: Path,
    files: Mapping[str, object],
    options: Mapping[str, str] | None = None,
    *,
    width: int | str = 8,
    output: str = "last_hidden_state",
    model: bytes = b"\x08\x09",
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> Bundle:
    """Read a folder with these JSON files and an ONNX file, which counts as a graph with this output."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    shape: list[str | int] = ["batch", "tokens", width] if output == "last_hidden_state" else ["batch", width]
    graph = Graph(
        [Tensor(name, "tensor(int64)", ["batch", "tokens"]) for name in inputs],
        [Tensor(output, "tensor(float)", shape)],
    )
    return open_bundle(folder, {"pooling": "mean", **(options or {})} if shape[2:] else options or {}, lambda _: graph)


CONFIG: dict[str, Any] = {"hidden_size": 8, "max_position_embeddings": 32, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"pad_token_id": BIG}, {}, "config.json: pad_token_id is 1000000000000; it must be a whole number from 0"),
        ({"pad_token_id": [1]}, {}, "config.json: pad_token_id is"),
        ({"pad_token_id": "x", "model_type": "roberta"}, {}, "config.json: pad_token_id is 'x'"),
        ({"hidden_size": BIG}, {}, "config.json: hidden_size is 1000000000000; it must be a whole number from 1"),
        ({"max_position_embeddings": BIG}, {}, "does not say how many tokens"),
        ({"max_position_embeddings": True}, {}, "does not say how many tokens"),
        ({"_name_or_path": "x" * 1025}, {}, "_name_or_path has 1025 characters"),
        ({"_name_or_path": "\ud800"}, {}, "no valid Unicode"),
        ({"_name_or_path": ["x"]}, {}, "_name_or_path must be a text"),
        ({}, {"max_tokens": str(BIG)}, "the model option max_tokens is '1000000000000'; it must be a whole number"),
        ({}, {"max_tokens": "9" * 5000}, "the model option max_tokens is"),
        ({}, {"dimensions": "65537"}, "the model option dimensions is '65537'"),
        ({}, {"query_prompt": "x" * 16_385}, "the model option query_prompt has 16385 characters"),
        ({}, {"query_prompt": "\ud800"}, "no valid Unicode"),
    ],
)
def test_a_value_beyond_a_limit_is_named_in_the_error(
    tmp_path: Path, change: dict[str, Any], options: Mapping[str, str], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        foreign(tmp_path, {"config.json": CONFIG | change}, options, width="hidden")


def test_the_width_of_the_output_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the width of the output last_hidden_state is 1000000000000"):
        foreign(tmp_path, {"config.json": CONFIG}, width=BIG)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"0": "x" * 1025, "1": "b"}, "id2label.* has 1025 characters"),
        ({"9" * 5000: "a", "1": "b"}, "an id of id2label is"),
        ({"0": ["a"], "1": "b"}, "must give a text for each id"),
        ({"0": "\ud800", "1": "b"}, "no valid Unicode"),
        ({"0": "a", "00": "b"}, "has an id twice"),
    ],
)
def test_labels_beyond_the_limits_are_refused(tmp_path: Path, labels: Mapping[str, object], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        foreign(tmp_path, {"config.json": CONFIG | {"id2label": labels}}, width=2, output="logits")


def test_invalid_prompts_and_poolings_are_refused_with_a_bundle_error(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "\ud800"}}
    with pytest.raises(BundleError, match="no valid Unicode"):
        foreign(tmp_path, {"config.json": CONFIG, "config_sentence_transformers.json": prompts})
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": place}
        for kind, place in (("Transformer", ""), ("Pooling", "."))
    ]
    with pytest.raises(BundleError, match="the pooling 7 is not supported"):
        foreign(tmp_path, {"config.json": CONFIG | {"pooling_mode": 7}, "modules.json": modules})


@pytest.mark.parametrize("name", [["query"], {"a": 1}, 7])
def test_a_default_prompt_name_that_is_no_string_is_ignored(tmp_path: Path, name: object) -> None:
    prompts = {"prompts": {"other": "p"}, "default_prompt_name": name}
    bundle = foreign(tmp_path, {"config.json": CONFIG, "config_sentence_transformers.json": prompts})
    assert bundle.manifest.prompts.query == ""


def test_the_problem_type_makes_only_classifiers_multi_label(tmp_path: Path) -> None:
    config = CONFIG | {"problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}
    assert not foreign(tmp_path / "embeds", {"config.json": config}).manifest.multi_label
    assert foreign(tmp_path / "classifies", {"config.json": config}, width=2, output="logits").manifest.multi_label


def test_a_folder_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    assert foreign(folder, {"config.json": CONFIG}).manifest.base_model == "caf?"


JSON = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([BIG]), st.just({}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["pad_token_id", "hidden_size", "max_position_embeddings", "_name_or_path", "id2label"]),
    JSON,
    st.sampled_from(["bert", "roberta"]),
)
def test_any_json_in_config_json_is_read_or_refused_with_a_bundle_error(
    tmp_path: Path, key: str, value: object, kind: str
) -> None:
    try:
        bundle = foreign(tmp_path, {"config.json": CONFIG | {"model_type": kind, key: value}}, width="hidden")
    except BundleError as error:
        assert str(error)
    else:
        assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest


def test_the_option_file_refuses_an_absolute_path_inside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is an absolute path; give its path in the folder"):
        foreign(tmp_path, {"config.json": CONFIG}, {"file": str(tmp_path / "model.onnx")}, width="hidden")


def test_options_within_the_limits_are_accepted() -> None:
    assert Stated.parse({"max_tokens": "512", "dimensions": "8"}) == Stated(max_tokens="512", dimensions="8")


def test_legacy_fingerprint_equals_the_one_computed_by_the_old_scheme(tmp_path: Path) -> None:
    """The expected values were computed by emberpc before the present scheme."""
    tmp_path.joinpath("model.onnx_data").write_bytes(b"weights")
    bundle = foreign(tmp_path, {"config.json": CONFIG}, {"query_prompt": "q'"})
    assert bundle.manifest.revision == "bbac6fd647f8"
    assert bundle.legacy_fingerprint() == "fa85bb57d77610cdeda4e1681fb824337773f785fd4c4230aa10b6a46ff660d5"
    assert bundle.legacy_fingerprint() != bundle.fingerprint()


def test_legacy_fingerprint_is_empty_if_the_old_scheme_did_not_hash_all_weights(tmp_path: Path) -> None:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [2], np.ones(2, dtype=np.float32).tobytes(), raw=True)
    graph = helper.make_graph([], "g", [], [], [weights])
    for name, covered in (("model.onnx_data", True), ("model.onnx.data", False)):
        folder = tmp_path / name
        folder.mkdir()
        model = helper.make_model(graph)
        onnx.save(model, str(folder / "model.onnx"), save_as_external_data=True, location=name, size_threshold=0)
        bundle = foreign(folder, {"config.json": CONFIG}, model=(folder / "model.onnx").read_bytes())
        assert name in bundle.manifest.files
        assert bool(bundle.legacy_fingerprint()) is covered


MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        (None, "keeps the case"),
        ({"type": "BertNormalizer", "lowercase": False}, "keeps the case"),
        ({"type": "BertNormalizer", "lowercase": True}, ""),
        ({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, ""),
        ([], "is no tokenizer"),
        ("x", "is no tokenizer"),
    ],
)
def test_a_tokenizer_must_lower_case_if_the_model_needs_lower_case(
    tmp_path: Path, normalizer: object, words: str
) -> None:
    files = {
        "config.json": CONFIG,
        "modules.json": MODULES,
        "sentence_roberta_config.json": {"do_lower_case": True, "max_seq_length": 16},
        "tokenizer.json": {"normalizer": normalizer},
    }
    if words:
        with pytest.raises(BundleError, match=words):
            foreign(tmp_path, files)
    else:
        assert foreign(tmp_path, files).manifest.max_tokens == 16


def test_the_manifest_says_whether_the_token_limit_was_stated(tmp_path: Path) -> None:
    assert foreign(tmp_path, {"config.json": CONFIG}, {"max_tokens": "8"}).manifest.max_tokens_stated
    assert not foreign(tmp_path, {"config.json": CONFIG}).manifest.max_tokens_stated


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder", 7])
@pytest.mark.parametrize("output", ["logits", "last_hidden_state"])
def test_models_that_return_no_vector_for_a_single_text_are_refused(tmp_path: Path, kind: object, output: str) -> None:
    files = {
        "config.json": CONFIG | {"id2label": {"0": "contradiction", "1": "entailment"}},
        "config_sentence_transformers.json": {"model_type": kind},
    }
    name = kind if isinstance(kind, str) else "model of unknown kind"
    with pytest.raises(BundleError, match=f"is a {name}, which does not return one vector for a text"):
        foreign(tmp_path, files, width=2, output=output)


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{kind}", "path": "."} for kind in kinds]


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Normalize", "Pooling"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Pooling", "Normalize", "Normalize"),
    ],
)
def test_modules_in_an_unsupported_order_are_refused(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match=f"lists {', '.join(kinds)}; the server runs"):
        foreign(tmp_path, {"config.json": CONFIG, "modules.json": modules(*kinds)})


@pytest.mark.parametrize("kinds", [(), ("Pooling",), ("Pooling", "Transformer"), ("Normalize",)])
def test_a_model_that_does_not_begin_with_a_transformer_is_refused(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match="modules.json lists .*; the first module must be Transformer"):
        foreign(tmp_path, {"config.json": CONFIG, "modules.json": modules(*kinds)})


@pytest.mark.parametrize(
    "kind", ["LayerNorm", "LSTM", "WordEmbeddings", "CNN", "WeightedLayerPooling", "Router", "own.Module"]
)
@pytest.mark.parametrize("dense", [(), ("Dense",)])
def test_the_error_for_an_unsupported_module_names_no_export(tmp_path: Path, kind: str, dense: Sequence[str]) -> None:
    """An earlier error advised an export, which refuses these modules."""
    listed = [*modules("Transformer", "Pooling", *dense, kind)]
    if "." in kind:
        listed[-1]["type"] = kind
    with pytest.raises(BundleError, match=f"the module {kind} is not run by the server; choose") as refused:
        foreign(tmp_path, {"config.json": CONFIG, "modules.json": listed})
    assert "export" not in str(refused.value)


def test_the_error_for_a_module_that_only_the_export_runs_names_the_export(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "modules.json": modules("Transformer", "Pooling", "Dense")}
    with pytest.raises(BundleError, match="the module Dense is not run by the server; .*`emberpc export embedding`"):
        foreign(tmp_path, files)


@pytest.mark.parametrize("config", [{}, {"include_prompt": True}, {"pooling_mode_cls_token": False}])
def test_a_pooling_config_that_states_no_pooling_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    """An earlier version assumed mean pooling; sentence-transformers does not load the model."""
    (tmp_path / "1_Pooling").mkdir()
    listed = [*MODULES, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    files = {"config.json": CONFIG, "modules.json": listed, "1_Pooling/config.json": config}
    with pytest.raises(BundleError, match=r"1_Pooling/config\.json states no pooling"):
        foreign(tmp_path, files)


def test_the_mean_is_the_default_of_a_pooling_with_its_dimension(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    listed = [*MODULES, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    pooling = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False}
    files = {"config.json": CONFIG, "modules.json": listed, "1_Pooling/config.json": pooling}
    assert foreign(tmp_path, files, output="sentence_embedding").manifest.pooling == "mean"


@pytest.mark.parametrize("place", ["..", "/etc", "a\0b"])
def test_a_module_outside_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    listed = [*modules("Transformer"), {"type": "sentence_transformers.models.Pooling", "path": place}]
    with pytest.raises(BundleError, match="which leads out of the folder"):
        foreign(tmp_path, {"config.json": CONFIG, "modules.json": listed})


WORDPIECE = {"type": "BertNormalizer", "lowercase": True, "strip_accents": None, "handle_chinese_chars": True}
SPECIAL = {"content": "[CLS]", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def templated(first: str, last: str) -> dict[str, Any]:
    items = {"S": {"SpecialToken": {"id": "<s>", "type_id": 0}}, "A": {"Sequence": {"id": "A", "type_id": 0}}}
    return {"type": "TemplateProcessing", "single": [items[kind] for kind in first + "A" + last]}


@pytest.mark.parametrize(
    ("tokenizer", "config", "words"),
    [
        ({"normalizer": WORDPIECE}, {"do_lower_case": False}, "do_lower_case is false.*json has true"),
        ({"normalizer": WORDPIECE}, {"strip_accents": False}, "strip_accents is false"),
        ({"normalizer": WORDPIECE}, {"tokenize_chinese_chars": False}, "tokenize_chinese_chars is false"),
        (
            {"normalizer": WORDPIECE | {"lowercase": False}},
            {"tokenizer_class": "BertTokenizer"},
            "do_lower_case is true.*json has false",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}, {"add_prefix_space": True}, "prefix"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, {}, "add_prefix_space is false"),
        (
            {"post_processor": templated("S", "")},
            {"tokenizer_class": "GemmaTokenizerFast", "add_eos_token": True},
            "add_eos_token is true",
        ),
        (
            {"post_processor": {"type": "Sequence", "processors": [templated("S", "S")]}},
            {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
            "add_bos_token is false",
        ),
        ({}, {"split_special_tokens": True}, "split_special_tokens is not supported"),
        ({}, {"truncation_side": "left"}, "truncation_side left"),
        ({"truncation": {"direction": "Left", "max_length": 8}}, {}, "truncation_side left"),
        ({"added_tokens": [SPECIAL]}, {"cls_token": "[MASK]"}, r"cls_token has '\[MASK\]', and the added_tokens"),
        ({}, {"additional_special_tokens": ["cat"]}, "additional_special_tokens has 'cat'"),
        ({}, {"extra_special_tokens": {"image": {"content": "<i>"}}}, "extra_special_tokens has '<i>'"),
        ({}, {"added_tokens_decoder": {"7": SPECIAL}}, "tokenizer.json does not list in added_tokens"),
        ({}, {"added_tokens_decoder": {"7": "[X]"}}, "tokenizer.json does not list in added_tokens"),
        ({}, {"additional_special_tokens": "[X]"}, r"has '\[X\]', and the added_tokens"),
        ({}, {"additional_special_tokens": 7}, "has '7', and the added_tokens"),
        (
            {"added_tokens": [SPECIAL]},
            {"added_tokens_decoder": {"7": SPECIAL | {"lstrip": True}}},
            "tokenizer.json lists with other flags",
        ),
    ],
)
def test_settings_that_change_the_tokenizer_are_refused(
    tmp_path: Path, tokenizer: object, config: object, words: str
) -> None:
    files = {"config.json": CONFIG, "tokenizer.json": tokenizer, "tokenizer_config.json": config}
    with pytest.raises(BundleError, match=words):
        foreign(tmp_path, files)


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        ({"normalizer": WORDPIECE}, {"do_lower_case": True, "strip_accents": None, "tokenizer_class": "BertTokenizer"}),
        # This class ignores the settings of BERT's tokenizers.
        ({"normalizer": WORDPIECE}, {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"normalizer": {"type": "Precompiled"}}, {"do_lower_case": True}),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, {"add_prefix_space": True}),
        ({"post_processor": templated("S", "S")}, {"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}),
        ({"post_processor": templated("S", "")}, {"tokenizer_class": "BertTokenizer", "add_eos_token": True}),
        ({"added_tokens": [SPECIAL]}, {"cls_token": SPECIAL, "added_tokens_decoder": {"7": SPECIAL}}),
        ({"added_tokens": [SPECIAL]}, {"added_tokens_decoder": {"7": SPECIAL["content"]}}),
        ({"truncation": {"direction": "Left"}}, {"truncation_side": "right"}),
    ],
)
def test_settings_that_agree_with_the_tokenizer_are_accepted(tmp_path: Path, tokenizer: object, config: object) -> None:
    foreign(tmp_path, {"config.json": CONFIG, "tokenizer.json": tokenizer, "tokenizer_config.json": config})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer_args": {"do_lower_case": False}}, "do_lower_case is false"),
        ({"processor_kwargs": {"truncation_side": "left"}}, "truncation_side left"),
        ({"processor_kwargs": {"dropout": 0.1}}, "the tokenizer's keyword dropout, which is not supported"),
        ({"processing_kwargs": {"text": {"max_length": 16}}}, "processing_kwargs, which is not supported"),
    ],
)
def test_keywords_of_the_transformer_module_are_refused_if_they_change_tokens(
    tmp_path: Path, settings: Mapping[str, object], words: str
) -> None:
    files = {
        "config.json": CONFIG,
        "modules.json": MODULES,
        "tokenizer.json": {"normalizer": WORDPIECE},
        "sentence_bert_config.json": settings,
    }
    with pytest.raises(BundleError, match=words):
        foreign(tmp_path, files)


def test_special_tokens_of_older_folders_must_be_in_the_tokenizer(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "special_tokens_map.json": {"additional_special_tokens": ["cat"]}}
    with pytest.raises(BundleError, match=r"special_tokens_map.json: additional_special_tokens has 'cat'"):
        foreign(tmp_path, files)
    # transformers does not read the file beside this key.
    foreign(tmp_path, files | {"tokenizer_config.json": {"added_tokens_decoder": {}}})


def test_token_types_that_the_server_does_not_feed_are_refused(tmp_path: Path) -> None:
    processor = json.loads(json.dumps(templated("S", "")).replace('"type_id": 0', '"type_id": 1'))
    files = {"config.json": CONFIG, "tokenizer.json": {"post_processor": processor}}
    foreign(tmp_path, files)  # the graph has no input for token types
    with pytest.raises(BundleError, match="sets a type_id other than 0"):
        foreign(tmp_path, files, inputs=("input_ids", "attention_mask", "token_type_ids"))


def test_the_tokenizer_may_state_its_limit_under_the_old_key(tmp_path: Path) -> None:
    bundle = foreign(tmp_path, {"config.json": CONFIG, "tokenizer_config.json": {"max_len": 16}})
    assert bundle.manifest.max_tokens == 16


def test_a_missing_pooling_folder_is_named_in_the_error(tmp_path: Path) -> None:
    listed = [*MODULES, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    with pytest.raises(BundleError, match=r"1_Pooling/config.json is missing, and modules.json lists it"):
        foreign(tmp_path, {"config.json": CONFIG, "modules.json": listed})


def test_a_truncated_dimension_is_refused(tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "config_sentence_transformers.json": {"truncate_dim": 4}}
    with pytest.raises(BundleError, match="truncate_dim is not supported; remove it"):
        foreign(tmp_path, files)
