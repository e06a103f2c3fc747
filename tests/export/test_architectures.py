"""Encoders of other architectures than BERT are exported and tuned; each has few layers and random weights.

They differ in their inputs and in the encoding of positions: DistilBERT has no token types, RoBERTa and XLM-RoBERTa
count positions from one after the id of the padding token, MPNet has a relative bias, and ModernBERT has rotary
positions.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.embedding import export_embedding
from emberpc.export.source.encoder import read_encoder
from emberpc.export.tuning.trainable_encoder import TrainableEncoder
from emberpc.export.verify import verify_bundle
from fixtures_bundles import tiny_tokenizer

WORDS = 39
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PADDED: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 1, "max_position_embeddings": 34}
#: Options of the configuration of each architecture, by its name in transformers.
CONFIGS: dict[str, dict[str, Any]] = {
    "distilbert": {
        "vocab_size": WORDS,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
        "max_position_embeddings": 32,
    },
    "roberta": {**PADDED, **SIZES, "type_vocab_size": 1},
    "xlm-roberta": {**PADDED, **SIZES, "type_vocab_size": 1},
    "mpnet": {**PADDED, **SIZES},
    "modernbert": {
        **SIZES,
        "vocab_size": WORDS,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "reference_compile": False,
    },
}


# RoBERTa's layers are those of BERT, which other tests export and train, and so are DistilBERT's and XLM-RoBERTa's.
LIKE_BERT = ("distilbert", "roberta", "xlm-roberta")
FEW_QUICK = [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_BERT else []) for name in CONFIGS]


@pytest.fixture(params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An encoder of each architecture, of two small layers: of ModernBERT, one with each kind of attention."""
    # Imported here: each test process imports this module, and transformers takes 1.5 CPU-seconds and 110 MB.
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(request.param, **CONFIGS[request.param])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated parts of PyTorch that transformers uses
        model = AutoModel.from_config(config)
    folder = tmp_path / str(request.param)
    model.save_pretrained(folder)
    tiny_tokenizer(int(config.pad_token_id or 0), token_types=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", FEW_QUICK, indirect=True)
def test_an_encoder_of_each_architecture_is_exported_with_the_vectors_of_pytorch(source: Path, tmp_path: Path) -> None:
    manifest = export_embedding(str(source), tmp_path / "bundle")
    assert manifest.variant().parity.cosine_min >= 0.9999
    assert manifest.max_tokens == 32
    assert verify_bundle(tmp_path / "bundle").ok
    inputs = {node.name for node in onnx.load(tmp_path / "bundle" / "onnx" / "model.onnx").graph.input}
    assert inputs == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_last_token_pooling_and_dense_layers_are_in_the_graph(tiny_source: Path, tmp_path: Path, pooling: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    torch.manual_seed(0)
    layers = [Dense(32, 24), Dense(24, 16, bias=False, activation_function=torch.nn.Identity())]
    model = SentenceTransformer(
        modules=[Transformer(str(tiny_source)), Pooling(32, pooling_mode=pooling), *layers, Normalize()], device="cpu"
    )
    model.save_pretrained(str(tmp_path / "source"))
    manifest = export_embedding(str(tmp_path / "source"), tmp_path / "bundle")
    assert (manifest.pooling, manifest.dimensions, manifest.normalize) == (pooling, 16, True)
    texts = ["a", "some words of a text", "others"]
    runner = OnnxRunner(tmp_path / "bundle" / "onnx" / "model.onnx", tmp_path / "bundle" / "tokenizer.json", 32, 0)
    np.testing.assert_allclose(runner.run(texts, "sentence_embedding"), model.encode(texts), atol=1e-5)
    train = write(tmp_path / "train.csv")
    tuned = export_classifier(
        ClassifierData(train), str(tmp_path / "source"), tmp_path / "tuned", strategy="top-layers", epochs=1
    )
    assert tuned.dimensions == 16


def write(path: Path) -> Path:
    """Write a few texts of two labels."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *[("aaa a", "x"), ("bbb b", "y"), ("aa", "x"), ("bb", "y")] * 3])
    return path


def test_stored_states_of_lower_layers_give_equal_vectors(source: Path) -> None:
    encoder = TrainableEncoder(read_encoder(source))
    tokens = encoder.tokenize(["a", "some words of a text", "others"])
    whole = encoder.embed(tokens)
    states = encoder.lower_states(tokens, 1)
    encoder.train_top(1)
    assert abs(encoder.embed(tokens, states) - whole).max() < 5e-3


@pytest.mark.parametrize("source", FEW_QUICK, indirect=True)
def test_an_encoder_of_each_architecture_can_be_trained(source: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv")
    for strategy in ("top-layers", "full"):
        manifest = export_classifier(
            ClassifierData(train), str(source), tmp_path / strategy, strategy=strategy, epochs=1
        )
        assert manifest.variant().parity.label_agreement == 1
