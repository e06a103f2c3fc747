"""Fine-tuning an embedding model on labelled texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from emberpc.export.retrieval.mining import mine
from emberpc.export.retrieval.queries import Files, read_data


@pytest.mark.parametrize("files", ["split", "given"])
def test_held_out_texts_of_a_label_are_not_mined_as_its_negatives(tmp_path: Path, files: str) -> None:
    """Held-out and test texts are among the passages, but are not listed as answers of training queries."""

    def write(name: str, numbers: range) -> Path:
        path = tmp_path / name
        rows = [{"text": f"text {i} of {label}", "label": label} for label in ("a", "b") for i in numbers]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    train = write("train.jsonl", range(40))
    others = {"validation": write("v.jsonl", range(40, 50)), "test": write("t.jsonl", range(50, 60))}
    data = read_data(Files(train, **(others if files == "given" else {})), 0)
    generator = np.random.default_rng(0)
    labels = [passage[-1] for passage in data.passages]
    centres = {label: generator.normal(size=8) for label in "ab"}
    found = np.array([centres[label] + generator.normal(size=8) for label in labels], dtype=np.float32)
    vectors = dict(zip(data.passages, found, strict=True))
    asked = np.array([vectors[text] for text in data.train.texts])

    def of_their_label(minable: Sequence[int] | None) -> list[bool]:
        mined = mine(asked, found, data.train, 4, minable)
        return [labels[i] == text[-1] for text, found in zip(data.train.texts, mined, strict=True) for i in found]

    assert of_their_label(data.minable)
    assert not any(of_their_label(data.minable))
    assert any(of_their_label(None))
