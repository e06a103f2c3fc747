"""Foreign folders that emberpc cannot serve: the error says what the folder contains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emberpc.bundle import BundleError
from emberpc.bundle.foreign import Stated, read_foreign
from emberpc.bundle.interface import Graph, Tensor
from emberpc.bundle.paths import is_inside

INPUTS = tuple(Tensor(name, "tensor(int64)", ("batch", "tokens")) for name in ("input_ids", "attention_mask"))


def folder_of(tmp_path: Path, config: dict[str, object]) -> Path:
    for name, content in {"model.onnx": "\x08\x09", "tokenizer.json": "{}", "config.json": json.dumps(config)}.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("width", "labels"), [(1, {"0": "LABEL_0"}), (1, {"0": "LABEL_0", "1": "LABEL_1"}), ("labels", {"0": "LABEL_0"})]
)
def test_a_model_with_one_score_is_refused_as_a_classifier(
    tmp_path: Path, width: int | str, labels: dict[str, str]
) -> None:
    folder = folder_of(tmp_path, {"id2label": labels, "max_position_embeddings": 32})
    graph = Graph(INPUTS, (Tensor("logits", "tensor(float)", ("batch", width)),))
    with pytest.raises(BundleError, match=r"one score for a text \(logits\), as rerankers .* at least two labels"):
        read_foreign(folder, Stated(), lambda _: graph)


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BundleError, match="is an adapter .* and no whole model; merge it with its base model"):
        read_foreign(tmp_path, Stated(), lambda _: Graph((), ()))


def test_a_file_name_with_a_nul_is_refused_with_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has a NUL character"):
        read_foreign(tmp_path, Stated(file="a\0.onnx"), lambda _: Graph((), ()))
    assert not is_inside(tmp_path, "a\0")
