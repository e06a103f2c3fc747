"""Arguments and files are checked before a command loads PyTorch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Emberpc = Any
pytestmark = pytest.mark.export
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "sklearn"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of labelled texts, right and wrong ones."""
    (tmp_path / "train.csv").write_text("text,label\n" + "a text,x\nb text,y\n" * 4)
    (tmp_path / "rare.csv").write_text("text,label\na text,x\nb text,x\nc text,y\n")
    (tmp_path / "blank.csv").write_text("text,label\na text,x\n ,y\n")
    (tmp_path / "french.csv").write_text("texte,lbl\na text,x\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "labels.csv").write_text("label,description\nx,all of x\n")
    (tmp_path / "other.csv").write_text("text,label\na text,z\n")
    (tmp_path / "pairs.csv").write_text("query,passage\nq,p\n")
    (tmp_path / "many.csv").write_text("query,passage\n" + "".join(f"q {i},p {i}\n" for i in range(30)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 8}')
    (tmp_path / "short" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path


CASES = [
    ("export classifier --train train.csv --strategy none", "'none' is not one of 'zero-shot', 'centroids', 'linear'"),
    ("export classifier --train train.csv --variants int4", "there is no variant 'int4'; there are: fp32, int8"),
    ("export classifier --train train.csv --rejection-rate 1", "the rejection rate is 1.0; it must be at least 0"),
    ("export classifier --train train.csv --strategy zero-shot --no-label-texts", "leave out --no-label-texts"),
    ("export classifier --train train.csv --descriptions labels.csv", "does not describe 1 label, such as 'y'"),
    ("export classifier --train rare.csv", "1 label has fewer than 2"),
    ("export classifier --train blank.csv", "blank.csv, line 3: text is empty; fill it in or remove the row"),
    ("export classifier --train french.csv", "rename one, or name the column of the texts with --text-column"),
    (
        "export classifier --train french.csv --text-column texte",
        "rename one, or name the column of the labels with --label-column",
    ),
    ("export classifier --train empty.csv", "has no rows; give it the names of the columns, and at least one row"),
    ("export classifier --train missing.csv", "cannot be read: No such file or directory; check path and permissions"),
    ("compare --train train.csv --test train.csv --strategy none", "there is no strategy 'none'; there are: tf-idf"),
    ("compare --train train.csv --test train.csv --budget 0", "--budget has '0'; give numbers from 1"),
    (
        "compare --train train.csv --test train.csv --budget 9999999999",
        "--budget has '9999999999'; give numbers from 1",
    ),
    ("compare --train train.csv --test train.csv --budget ٣", "--budget has '٣'; give numbers from 1"),
    ("compare --train train.csv --test other.csv", "other.csv, line 2: no training text has the label 'z'"),
    ("compare --train train.csv --test blank.csv", "blank.csv, line 3: text is empty"),
    ("compare --train train.csv --test train.csv --descriptions labels.csv", "does not describe 1 label, such as 'y'"),
    ("export finetune-embedding --train pairs.csv", "pairs.csv has 1 queries; give at least 10"),
    ("export finetune-embedding --train train.csv --variants int4", "there is no variant 'int4'"),
    ("export embedding source --validation empty.csv", "has no rows"),
    ("export embedding source --corpus train.csv", "is a corpus to search, but there are no queries"),
    ("export embedding ./source", "there is no folder './source'"),
    ("export embedding python:nothing", "there is no installed package 'nothing' that holds a model"),
    ("export embedding empty --max-tokens 8", "has no config.json, so it is no Hugging Face encoder"),
    ("export classifier --train train.csv --base ./source", "there is no folder './source'"),
    ("export classifier --train train.csv --base short --max-tokens 99", "short allows 1 to 8 tokens"),
    ("export finetune-embedding --train many.csv --base empty", "has no config.json"),
    ("compare --train train.csv --test train.csv --base empty", "has no config.json"),
    ("export embedding source --variants int4", "there is no variant 'int4'"),
]


@pytest.mark.parametrize(("line", "message"), CASES)
def test_a_wrong_argument_is_refused_before_pytorch_is_loaded(
    emberpc: Emberpc, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    for module in HEAVY:
        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
    # An import of a module that is None in `sys.modules` fails. `find_spec` needs the module's specification.
    monkeypatch.setattr("emberpc.cli.export.require", lambda *_: None)
    monkeypatch.setattr("emberpc.cli.compare.require", lambda *_: None)
    for module in HEAVY:
        monkeypatch.setitem(sys.modules, module, None)
    outcome = emberpc(*line.split(), "-o", "out")
    assert outcome.code == 2
    assert message in outcome.err
    assert "loading PyTorch" not in outcome.err
    assert not (folder / "out").exists()


def test_the_checks_load_no_heavy_package(folder: Path) -> None:
    code = (
        "import sys; from emberpc.cli.main import main; code = main(sys.argv[1:]); "
        "print(*(name for name, module in sys.modules.items() if module)); sys.exit(code)"
    )
    arguments = ["export", "classifier", "--train", str(folder / "rare.csv"), "-o", str(folder / "out")]
    outcome = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 2
    assert "1 label has fewer than 2" in outcome.stderr
    assert not HEAVY & set(outcome.stdout.split())


def test_the_names_are_those_of_the_strategies_and_variants() -> None:
    from emberpc.export.classify.strategies import STRATEGIES
    from emberpc.export.names import CANDIDATE_NAMES, EXPORTABLE, STRATEGY_NAMES
    from emberpc.export.variants import CANDIDATES

    assert tuple(STRATEGIES) == STRATEGY_NAMES
    assert tuple(name for name, strategy in STRATEGIES.items() if strategy.exportable) == EXPORTABLE
    assert tuple(candidate.name for candidate in CANDIDATES) == CANDIDATE_NAMES
