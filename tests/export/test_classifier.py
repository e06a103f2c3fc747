"""Fine-tuning a classifier: figures that can be trusted, a graph that others load, errors that name the row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.bundle import Task, read_bundle
from emberpc.export.calibration import expected_calibration_error, fit_temperature, softmax
from emberpc.export.classifier import export_classifier, fit_head
from emberpc.export.datasets import read_labelled
from emberpc.export.errors import ExportError
from emberpc.export.verify import verify_bundle


def test_the_manifest_says_what_was_learnt_and_how_well(classifier_bundle: Path) -> None:
    manifest = read_bundle(classifier_bundle).manifest
    assert manifest.task is Task.CLASSIFICATION
    assert manifest.labels == ("asyncio", "email", "logging", "tkinter", "unittest")
    assert manifest.variants[0].parity.label_agreement == 1
    assert manifest.quality["train_texts"] == 120
    assert manifest.quality["held_out_texts"] == 20
    assert 0.5 < manifest.quality["accuracy"] <= 1
    assert manifest.temperature > 0
    assert verify_bundle(classifier_bundle).ok


def test_optimum_loads_it_and_gives_the_same_logits(classifier_bundle: Path) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    reference = read_bundle(classifier_bundle).reference()
    model = ORTModelForSequenceClassification.from_pretrained(
        classifier_bundle, subfolder="onnx", file_name="model.onnx"
    )
    tokenizer = AutoTokenizer.from_pretrained(classifier_bundle)
    inputs = tokenizer(list(reference.texts), padding=True, truncation=True, return_tensors="pt")
    logits = model(**inputs).logits.numpy()
    assert reference.logits is not None
    assert np.abs(logits - reference.logits).max() < 1e-3
    assert model.config.id2label[0] == "asyncio"


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def test_a_validation_file_is_measured_on(tiny_source: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("aaa", "x"), ("aab", "x"), ("zzz", "y"), ("zzy", "y")])
    validation = write(tmp_path / "validation.csv", [("aaa", "x"), ("zzz", "y"), ("aab", "x")])
    manifest = export_classifier(train, str(tiny_source), tmp_path / "bundle", validation=validation)
    assert manifest.quality["held_out_texts"] == 3
    assert manifest.labels == ("x", "y")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a", "x"), ("", "y")], "line 3: text is empty"),
        ([("a", "x"), ("b", " ")], "line 3: label is empty"),
        ([("a", "x"), ("b", "x")], "at least two"),
        ([], "no rows"),
    ],
)
def test_training_data_that_cannot_be_used_is_refused_by_row(
    tiny_source: Path, tmp_path: Path, rows: list[tuple[str, str]], words: str
) -> None:
    path = write(tmp_path / "train.csv", rows)
    with pytest.raises(ExportError, match=words) as refused:
        export_classifier(path, str(tiny_source), tmp_path / "bundle")
    assert str(path) in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_a_validation_label_that_was_never_learnt_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("a", "x"), ("b", "y")])
    validation = write(tmp_path / "validation.csv", [("a", "z")])
    with pytest.raises(ExportError, match="has labels that the training file has not: z"):
        export_classifier(train, str(tiny_source), tmp_path / "bundle", validation=validation)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"text,label\na,b,c\n", "line 2: it does not have 2 columns"),
        ("t.csv", b'text,label\n"a,b\n', "quotes"),
        ("t.csv", b"words,label\na,b\n", "no column 'text'; there are: words, label"),
        ("t.csv", b"text,label\n\xff\xfe,b\n", "not UTF-8"),
        ("t.tsv", b"text\tlabel\na\n", "line 2"),
        ("t.jsonl", b'{"text": "a", "label": "b"}\nnot json\n', "line 2: it is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1: it is not a JSON object"),
        ("t.xlsx", b"", r"must end in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ExportError, match=words) as refused:
        read_labelled(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read_labelled(tmp_path / "none.csv")


text = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\x00"), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(text, text), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps({"text": one, "label": other}) + "\n" for one, other in rows)
    (folder / "t.jsonl").write_text(lines, encoding="utf-8")
    for path in (write(folder / "t.csv", rows), folder / "t.jsonl"):
        data = read_labelled(path)
        assert list(zip(data.texts, data.labels, strict=True)) == rows


def test_a_text_with_two_labels_is_a_conflict(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path / "t.csv", [("a", "x"), ("a", "y"), ("b", "x"), ("b", "x")]))
    assert data.conflicts() == {"a": {"x", "y"}}


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_learns_what_can_be_learnt(labels: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(labels, 16))
    numbers = rng.integers(0, labels, 200)
    vectors = (centres[numbers] + 0.3 * rng.normal(size=(200, 16))).astype(np.float32)
    head = fit_head(vectors, numbers, seed=0)
    assert head.weights.shape == (16, labels)
    assert (head.logits(vectors).argmax(axis=1) == numbers).mean() > 0.95


def test_a_label_with_one_example_is_learnt_too() -> None:
    vectors = np.eye(4, dtype=np.float32)
    head = fit_head(vectors, np.array([0, 0, 1, 2]), seed=0)
    assert list(head.logits(vectors).argmax(axis=1)) == [0, 0, 1, 2]


def test_temperature_makes_overconfident_logits_honest() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(5000, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(true)])
    temperature = fit_temperature(true * 5, labels)
    assert temperature == pytest.approx(5, rel=0.1)
    assert expected_calibration_error(softmax(true * 5, temperature), labels) < 0.03
    assert expected_calibration_error(softmax(true * 5), labels) > 0.1
