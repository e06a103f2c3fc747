"""Common kinds of embedding models, with small random weights, are exported or refused.

E5, BGE and GTE are BERT models that differ in pooling and prompts; Qwen3-Embedding is a decoder; gte v1.5, nomic and
jina have code of their own.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

from emberpc.bundle import Prompts
from emberpc.export.convert import onnx_export
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.embedding import export_embedding
from emberpc.export.errors import ExportError
from emberpc.export.source.encoder import read_encoder
from emberpc.export.verify import verify_bundle
from fixtures_bundles import MakeSource, modules_json, pooling_json, tiny_tokenizer

TEXTS = ["a", "some words of a text", "others, and more of them"]
DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 39,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
NORMALIZED = modules_json("Transformer", "Pooling", "Normalize")


def save(architecture: str, options: dict[str, Any], folder: Path, padding_side: str = "right") -> Path:
    """Save a model of random weights, with a tokenizer."""
    # Imported here: each test process imports this module, and transformers takes 1.5 CPU-seconds and 110 MB.
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated parts of PyTorch that transformers uses
        AutoModel.from_config(config).save_pretrained(folder)
    # For Qwen2, transformers makes all but the vocabulary itself, so another tokenizer would be refused.
    tokenizer = qwen2_tokenizer() if architecture == "qwen2" else tiny_tokenizer(token_types=False)
    tokenizer.padding_side = padding_side
    tokenizer.save_pretrained(folder)
    return folder


def qwen2_tokenizer() -> Any:
    """Return a tokenizer of Qwen2 whose tokens are single bytes."""
    from transformers import Qwen2Tokenizer

    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32)


def lay_out(folder: Path, files: dict[str, object]) -> Path:
    """Write JSON files into a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def served(bundle: Path, texts: list[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return OnnxRunner(bundle / "onnx/model.onnx", bundle / "tokenizer.json", 32, 0).run(texts, "sentence_embedding")


@pytest.mark.parametrize(
    ("pooling", "prompts"),
    [
        ("mean", {"query": "query: ", "passage": "passage: "}),  # E5
        ("cls", {"query": "find: "}),  # BGE
        pytest.param("mean", {}, marks=pytest.mark.slow),  # GTE, which is an E5 without prompts
    ],
)
def test_e5_bge_and_gte_agree_with_sentence_transformers_with_prompts(
    make_source: MakeSource, tmp_path: Path, pooling: str, prompts: dict[str, str]
) -> None:
    from sentence_transformers import SentenceTransformer

    source = make_source(
        {
            "modules.json": NORMALIZED,
            "1_Pooling/config.json": pooling_json(pooling),
            "config_sentence_transformers.json": {"prompts": prompts},
        }
    )
    manifest = export_embedding(source, tmp_path / "bundle")
    assert (manifest.pooling, manifest.normalize) == (pooling, True)
    assert manifest.prompts == Prompts(prompts.get("query", ""), prompts.get("passage", ""))
    theirs = SentenceTransformer(str(source), device="cpu", local_files_only=True)
    for prompt in (manifest.prompts.query, manifest.prompts.passage):
        ours = served(tmp_path / "bundle", [prompt + text for text in TEXTS])
        np.testing.assert_allclose(ours, theirs.encode(TEXTS, prompt=prompt), atol=1e-5)


def test_weights_stored_as_fp16_are_exported_as_fp32(make_source: MakeSource, tmp_path: Path) -> None:
    """The weights of GTE are stored as fp16, which config.json also states."""
    from transformers import BertModel

    source = make_source()
    BertModel.from_pretrained(source).half().save_pretrained(source)
    assert json.loads((source / "config.json").read_text())["dtype"] == "float16"
    assert export_embedding(source, tmp_path / "bundle").variant().parity.cosine_min >= 0.9999
    assert served(tmp_path / "bundle", TEXTS).dtype == np.float32


@pytest.mark.parametrize(
    ("architecture", "options", "padding_side"),
    [
        pytest.param("qwen3", {**DECODER, "head_dim": 16}, "left", id="qwen3-left"),
        pytest.param("qwen3", {**DECODER, "head_dim": 16}, "right", id="qwen3-right"),
        # The layers of Qwen2 are those of Qwen3 without the norms of queries and keys.
        pytest.param("qwen2", {**DECODER, "vocab_size": 257}, "left", id="qwen2-left", marks=pytest.mark.slow),
        # The padding side depends on the tokenizer and not on the architecture.
        pytest.param("qwen2", {**DECODER, "vocab_size": 257}, "right", id="qwen2-right", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_with_last_token_pooling_is_exported(
    architecture: str, options: dict[str, Any], padding_side: str, tmp_path: Path
) -> None:
    source = lay_out(
        save(architecture, options, tmp_path / "source", padding_side),
        {
            "modules.json": NORMALIZED,
            "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True},
        },
    )
    manifest = export_embedding(source, tmp_path / "bundle")
    assert manifest.pooling == "lasttoken"
    assert manifest.variant().parity.cosine_min >= 0.9999
    assert verify_bundle(tmp_path / "bundle").ok


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 39}
    source = save("t5", sizes, tmp_path / "source")
    with pytest.raises(ExportError, match="has a decoder, so it is not just a text encoder"):
        export_embedding(source, tmp_path / "bundle", max_tokens=32)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model_type", ["new", "nomic_bert", "bert"])
def test_custom_code_is_refused_even_if_the_model_type_is_bert(make_source: MakeSource, model_type: str) -> None:
    source = make_source()
    config = json.loads((source / "config.json").read_text())
    own = {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"}
    lay_out(source, {"config.json": {**config, "model_type": model_type, "auto_map": own}})
    with pytest.raises(ExportError, match=r"modeling\.NewModel, which needs trust_remote_code.*choose a model"):
        read_encoder(source)


def test_a_custom_module_is_not_mistaken_for_one_of_sentence_transformers(make_source: MakeSource) -> None:
    modules = modules_json("Transformer", "Pooling")
    modules[0]["type"] = "custom_st.Transformer"
    source = make_source({"modules.json": modules, "1_Pooling/config.json": pooling_json("mean")})
    with pytest.raises(ExportError, match=r"the module custom_st\.Transformer .* cannot be exported"):
        read_encoder(source)


def test_weights_in_several_files_are_exported(make_source: MakeSource, tmp_path: Path) -> None:
    from transformers import BertModel

    whole, source = make_source(name="whole"), make_source()
    (source / "model.safetensors").unlink()
    BertModel.from_pretrained(whole).save_pretrained(source, max_shard_size="50KB")
    pieces = sorted(source.glob("model-*.safetensors"))
    assert len(pieces) > 1
    export_embedding(source, tmp_path / "bundle")
    export_embedding(whole, tmp_path / "other")
    np.testing.assert_array_equal(served(tmp_path / "bundle", TEXTS), served(tmp_path / "other", TEXTS))
    pieces[-1].unlink()
    with pytest.raises(ExportError, match=rf"{pieces[-1].name} is missing, which .*index\.json names"):
        read_encoder(source)


def test_a_tokenizer_json_is_made_of_a_vocabulary(make_source: MakeSource, tmp_path: Path) -> None:
    whole, source = make_source(name="whole"), make_source()
    words = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (source / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)))
    export_embedding(source, tmp_path / "bundle")
    export_embedding(whole, tmp_path / "other")
    np.testing.assert_allclose(served(tmp_path / "bundle", TEXTS), served(tmp_path / "other", TEXTS), atol=1e-6)


def without_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


def with_slow_tokenizer(source: Path) -> None:
    """Set a tokenizer of bytes, which exists only as code in transformers."""
    without_tokenizer(source)
    lay_out(source, {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer", "model_max_length": 32}})


def with_split_special_tokens(source: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    lay_out(source, {"tokenizer_config.json": settings | {"split_special_tokens": True}})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_split_special_tokens, "states split_special_tokens, which tokenizer.json cannot; set it to false"),
        (without_tokenizer, r"no tokenizer that can be read; .*tokenizer\.json"),
        (with_slow_tokenizer, r"has no tokenizer\.json, and transformers cannot make one from its ByT5Tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_served_is_refused(
    make_source: MakeSource, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    source = make_source()
    spoil(source)
    with pytest.raises(ExportError, match=words):
        export_embedding(source, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CARD = """# A model
* Loss: `MatryoshkaLoss` with these parameters:
  ```json
  {
      "loss": "MultipleNegativesRankingLoss",
      "matryoshka_dims": [
          32,
          16
      ],
      "matryoshka_weights": [1, 1]
  }
  ```
"""


@pytest.mark.parametrize(
    ("in_config", "card", "expected"),
    [
        ({}, "", ()),
        ({}, "matryoshka_dims: of all kinds", ()),
        ({}, CARD, (32, 16)),
        ({"matryoshka_dimensions": [8, 16, 8]}, "", (16, 8)),
        ({"matryoshka_dimensions": [8]}, CARD, (8,)),
    ],
)
def test_matryoshka_dimensions_are_read_from_config_and_model_card(
    make_source: MakeSource, in_config: dict[str, object], card: str, expected: tuple[int, ...]
) -> None:
    source = make_source({"README.md": card})
    config = json.loads((source / "config.json").read_text())
    lay_out(source, {"config.json": {**config, **in_config}})
    assert read_encoder(source).matryoshka_dimensions == expected


def test_stated_matryoshka_dimensions_override_those_of_the_source(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source({"README.md": CARD})
    assert export_embedding(source, tmp_path / "bundle").matryoshka_dimensions == (32, 16)
    manifest = export_embedding(source, tmp_path / "bundle", matryoshka=[4, 8], overwrite=True)
    assert manifest.matryoshka_dimensions == (8, 4)
    with pytest.raises(ExportError, match=r"32 dimensions, which cannot be shortened to 64; .*--matryoshka"):
        export_embedding(source, tmp_path / "bundle", matryoshka=[64], overwrite=True)


@pytest.mark.parametrize("stated", ["16", [0], [1.5], [True], [10**12]])
def test_invalid_matryoshka_dimensions_are_refused(make_source: MakeSource, stated: object) -> None:
    source = make_source()
    config = json.loads((source / "config.json").read_text())
    lay_out(source, {"config.json": {**config, "matryoshka_dimensions": stated}})
    with pytest.raises(ExportError, match="must be a list of whole numbers from 1 to 65536"):
        read_encoder(source)


@pytest.mark.whole_exports
def test_a_graph_that_ignores_padding_is_refused(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter leaves the mask out if it traces inputs without padding, and reports nothing."""
    write = onnx_export._write

    def wrongly(model: Any, names: Sequence[str], path: Path, max_tokens: int) -> None:
        write(model, names, path, max_tokens)
        graph = onnx.load(str(path))
        for node in graph.graph.node:
            node.input[:] = ["ones" if name == "attention_mask" else name for name in node.input]
        graph.graph.node.insert(0, helper.make_node("Max", ["attention_mask", "one"], ["ones"]))
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
        onnx.save(graph, str(path))

    monkeypatch.setattr(onnx_export, "_write", wrongly)
    with pytest.raises(ExportError, match="the ONNX graph differs from PyTorch .* padded on the right"):
        export_embedding(tiny_source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("config", "max_tokens", "longest"),
    [
        ({"sliding_window": 512}, 4096, 640),
        ({"sliding_window": 4096}, 8192, 64),  # a text of 5,120 tokens takes too long
        ({"local_attention": 128}, 4096, 160),
        ({"local_attention": 128}, 100, 100),
        ({"sliding_window": None}, 512, 64),
        ({}, 16, 16),
    ],
)
def test_texts_longer_than_a_window_of_attention_are_compared(
    config: dict[str, Any], max_tokens: int, longest: int
) -> None:
    shapes = onnx_export._shapes(SimpleNamespace(**config), max_tokens)
    assert shapes[-1] == (2, longest)
    assert all(tokens <= max_tokens for _, tokens in shapes)


def test_a_model_with_few_positions_is_converted(tiny_source: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_source, max_position_embeddings=4)
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    BertModel(config).save_pretrained(source)
    manifest = export_embedding(source, tmp_path / "bundle", max_tokens=4)
    assert manifest.variant().parity.cosine_min >= 0.9999


@pytest.mark.slow
@pytest.mark.whole_exports
def test_constants_of_a_model_in_bf16_are_those_of_fp32(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by the square root of the hidden size, which bf16 would round."""
    from transformers import AutoModel

    sizes = {**DECODER, "hidden_size": 48, "head_dim": 16, "dtype": "bfloat16"}
    source = save("gemma3_text", sizes, tmp_path / "source")
    model = AutoModel.from_pretrained(source).to(torch.bfloat16)
    model.save_pretrained(source)
    assert export_embedding(source, tmp_path / "bundle", max_tokens=32).variant().parity.cosine_min >= 0.9999


def test_weights_of_the_encoder_that_transformers_does_not_use_are_refused(tiny_source: Path, tmp_path: Path) -> None:
    """transformers 4 used weights of relative positions in BERT; version 5 ignores them without a warning."""
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    weights = load_file(source / "model.safetensors")
    name = "encoder.layer.1.attention.self.distance_embedding.weight"
    for more in ("classifier.weight", "embeddings.position_ids", "cls.predictions.bias"):  # no weights of the encoder
        weights[more] = np.zeros(2, dtype=np.float32)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export_embedding(source, tmp_path / "bundle")
    save_file(
        {**weights, f"bert.{name}": np.zeros((3, 16), dtype=np.float32)},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ExportError, match=rf"does not use 1 tensors of the encoder .* such as bert\.{name}, so it would"
    ):
        export_embedding(source, tmp_path / "other")


def test_a_tokenizer_that_transformers_rebuilds_otherwise_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    """For its own classes, transformers 5 takes only the vocabulary of tokenizer.json, and makes a normalizer anew."""
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "z"}, "content": "a"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [replace, tokenizer["normalizer"]]}
    settings = json.loads((source / "tokenizer_config.json").read_text())
    lay_out(
        source, {"tokenizer.json": tokenizer, "tokenizer_config.json": settings | {"tokenizer_class": "BertTokenizer"}}
    )
    with pytest.raises(ExportError, match="does not read the tokenizer of .* as its tokenizer.json states.*gets other"):
        export_embedding(source, tmp_path / "bundle")
    lay_out(source, {"tokenizer_config.json": settings | {"tokenizer_class": "PreTrainedTokenizerFast"}})
    export_embedding(source, tmp_path / "bundle")
    written = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert written.encode("z").ids == written.encode("a").ids


def test_a_setting_that_contradicts_tokenizer_json_is_followed_as_before(tiny_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    lay_out(source, {"tokenizer.json": tokenizer, "tokenizer_config.json": settings})
    export_embedding(source, tmp_path / "bundle")
    written = Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert written.encode("A").ids == written.encode("a").ids


def test_the_error_for_an_invalid_configuration_names_file_and_key(tiny_source: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_source, source)
    config = json.loads((source / "config.json").read_text())
    lay_out(source, {"config.json": config | {"layer_norm_eps": "1e-12"}})
    with pytest.raises(ExportError, match="the key 'layer_norm_eps' of config.json has an invalid value"):
        export_embedding(source, tmp_path / "bundle")
