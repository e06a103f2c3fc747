"""The export of classifiers: training, figures of quality, and refused data."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from bundle_cache import PARITY_TEXTS
from emberpc.bundle import BundleError, Manifest, Reference, Task, probabilities, read_bundle
from emberpc.export import classifier
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.data.stdlib_texts import read_stdlib, sample_texts
from emberpc.export.errors import ExportError
from emberpc.export.verify import verify_bundle
from fixtures_bundles import MODULES, MakeSource


def write_csv(path: Path, rows: Iterable[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def classify(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the logits of texts, run one at a time with ONNX Runtime and tokenizers only."""
    session = ort.InferenceSession(folder / "onnx" / "model.onnx")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(read_bundle(folder).manifest.max_tokens)
    names = [node.name for node in session.get_inputs()]
    rows = []
    for text in texts:
        encoding = tokenizer.encode(text)
        values = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        feeds = {name: np.array([values[name]], dtype=np.int64) for name in names}
        rows.append(session.run(["logits"], feeds)[0][0])
    return np.stack(rows)


def few_texts() -> list[str]:
    """Return a text with other scripts, one with white space in it, one that is truncated, and a docstring."""
    texts = sample_texts(8)
    return [texts[i] for i in (2, 3, 6, 7)]


def head_of(folder: Path) -> bytes:
    """Return the weights of the head in a bundle's graph."""
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    weights = next(tensor for tensor in graph.initializer if tensor.name == "head_weights")
    return bytes(onnx.numpy_helper.to_array(weights).tobytes())


def test_a_classifier_is_trained_and_its_quality_is_measured(classifier_bundle: Path) -> None:
    manifest = read_bundle(classifier_bundle).manifest
    assert manifest.task is Task.CLASSIFICATION
    assert manifest.labels == tuple(sorted(MODULES))
    quality = manifest.quality
    assert quality["train_texts"] == 24 * len(MODULES)
    assert quality["held_out_texts"] == 24 * len(MODULES)  # by cross-validation
    assert quality["accuracy"] > 2 / len(MODULES)
    assert quality["macro_f1"] > 2 / len(MODULES)
    assert quality["conflicting_texts"] == 0
    assert 0 <= quality["ece"] <= 1
    assert manifest.temperature != 1


def test_the_onnx_classifier_gives_the_labels_of_pytorch(classifier_bundle: Path) -> None:
    parity = read_bundle(classifier_bundle).manifest.variant().parity
    assert parity.texts == PARITY_TEXTS
    assert parity.cosine_min >= 0.9999
    assert parity.label_agreement == 1
    assert verify_bundle(classifier_bundle).ok


def test_logits_are_vectors_of_pytorch_times_the_head_of_the_graph(
    classifier_bundle: Path, short_minilm_source: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = few_texts()
    encoder = SentenceTransformer(str(short_minilm_source), device="cpu", local_files_only=True)
    embeddings = encoder.encode(texts, show_progress_bar=False)
    graph = onnx.load(classifier_bundle / "onnx" / "model.onnx").graph
    gemm = next(node for node in reversed(graph.node) if node.op_type == "Gemm")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    expected = embeddings @ constants[gemm.input[1]] + constants[gemm.input[2]]
    np.testing.assert_allclose(classify(classifier_bundle, texts), expected, atol=1e-3)
    assert [output.name for output in graph.output] == ["logits", "sentence_embedding", "probabilities"]


def test_training_texts_are_not_in_the_bundle(classifier_bundle: Path, training_file: Path) -> None:
    with training_file.open(newline="", encoding="utf-8") as file:
        trained = {row["text"] for row in csv.DictReader(file)}
    # The reference has docstrings of this Python, too, so a few of them may be training texts by chance, but not most.
    kept = Reference.read(classifier_bundle).texts
    assert sum(text in trained for text in kept) < len(kept) / 2


@pytest.mark.slow
def test_equal_seeds_give_equal_classifiers(training_file: Path, tiny_source: Path, tmp_path: Path) -> None:
    def exported(name: str, seed: int) -> Manifest:
        return export_classifier(ClassifierData(training_file), str(tiny_source), tmp_path / name, seed=seed)

    first, again, other = exported("first", 0), exported("again", 0), exported("other", 1)
    assert first.temperature == again.temperature
    assert first.files["onnx/model.onnx"] == again.files["onnx/model.onnx"]
    assert first.temperature != other.temperature


def test_a_validation_file_is_used_to_measure_and_not_to_train(
    few_labelled: Path, tiny_source: Path, tmp_path: Path
) -> None:
    docs = [(doc.text, doc.module) for doc in read_stdlib() if doc.module in MODULES]
    validation = write_csv(tmp_path / "validation.csv", docs[-50:])
    alone = export_classifier(ClassifierData(few_labelled), str(tiny_source), tmp_path / "alone")
    measured = export_classifier(ClassifierData(few_labelled, validation), str(tiny_source), tmp_path / "measured")
    assert measured.quality["held_out_texts"] == 50
    assert measured.quality["train_texts"] == alone.quality["train_texts"]
    assert head_of(tmp_path / "measured") == head_of(tmp_path / "alone")


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [
        ({"a": 1, "b": 1}, 0),
        ({"a": 2, "b": 1}, 2),
        ({"a": 2, "b": 2}, 4),
        ({"a": 10, "b": 1}, 10),
        ({"a": 9, "b": 6, "c": 1}, 15),
    ],
)
def test_labels_with_few_texts_are_trained(
    tiny_source: Path, tmp_path: Path, counts: dict[str, int], held_out: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(f"{label * 3} text number {i}", label) for label, count in counts.items() for i in range(count)]
    manifest = export_classifier(
        ClassifierData(write_csv(tmp_path / "train.csv", rows), min_examples=1),
        str(tiny_source),
        tmp_path / "bundle",
        label_texts=False,
    )
    assert manifest.labels == tuple(sorted(counts))
    assert manifest.quality.get("held_out_texts", 0) == held_out
    assert ("accuracy" in manifest.quality) == (held_out > 0)
    # With few texts, no probability is near 1, and the model card states the reason.
    assert ("the calibration of probabilities is rough: " in caplog.text) == (held_out > 0)
    assert ("| Calibration | rough: " in (tmp_path / "bundle" / "README.md").read_text("utf-8")) == (held_out > 0)
    logits = Reference.read(tmp_path / "bundle").logits
    assert logits is not None
    # Two held-out texts of one label do not show how far apart the labels are.
    assert held_out <= 2 or probabilities(logits, manifest.temperature).max() < 0.999
    assert verify_bundle(tmp_path / "bundle").ok


def test_texts_with_conflicting_labels_are_counted_and_give_a_warning(
    tiny_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_csv(tmp_path / "train.csv", [("same", "a"), ("same", "b"), ("one", "a"), ("two", "b")])
    with caplog.at_level(logging.WARNING):
        manifest = export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "bundle")
    assert manifest.quality["conflicting_texts"] == 1
    assert "1 text occurs with different labels, such as 'same' (line 2: a, line 3: b)" in caplog.text


def test_config_json_of_a_plain_encoder_gets_the_labels(tiny_source: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", [("one", "ä|b"), ("two", "a, b")])
    export_classifier(ClassifierData(train, min_examples=1), str(tiny_source), tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "a, b", "1": "ä|b"}
    assert config["label2id"] == {"a, b": 0, "ä|b": 1}
    assert config["problem_type"] == "single_label_classification"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("one", "a"), ("two", "a")], "has the label 'a' only; a classifier needs at least two"),
        ([("one", "a"), ("", "b")], "line 3: text is empty"),
        (
            [("one", "a"), ("two", "a"), ("three", "cansel")],
            r"fewer than 2 texts: 'cansel' \(line 4\); .*--min-examples",
        ),
    ],
)
def test_invalid_training_data_is_refused_and_leaves_no_files(
    tiny_source: Path, tmp_path: Path, rows: list[tuple[str, str]], words: str
) -> None:
    train = write_csv(tmp_path / "train.csv", rows)
    with pytest.raises(ExportError, match=words):
        export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "deep" / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_the_error_for_a_validation_label_without_training_texts_names_its_line(
    tiny_source: Path, tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", [("one", "a"), ("two", "b")])
    validation = write_csv(tmp_path / "validation.csv", [("one", "a"), ("three", "c")])
    with pytest.raises(ExportError, match=r"validation\.csv, line 3: no training text has the label 'c'"):
        export_classifier(ClassifierData(train, validation, min_examples=1), str(tiny_source), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_ctrl_c_during_an_export_leaves_no_files(training_file: Path, tiny_source: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "cross-validating":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_classifier(
            ClassifierData(training_file), str(tiny_source), tmp_path / "deep" / "bundle", progress=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_training_texts_get_the_passage_prompt(
    make_source: MakeSource, few_labelled: Path, tiny_source: Path, tmp_path: Path
) -> None:
    prompted = make_source({"config_sentence_transformers.json": {"prompts": {"passage": "zzzz "}}})
    manifest = export_classifier(ClassifierData(few_labelled), str(prompted), tmp_path / "prompted")
    assert manifest.prompts.passage == "zzzz "  # the server adds it before each text
    plain = export_classifier(ClassifierData(few_labelled), str(tiny_source), tmp_path / "plain")
    assert manifest.files["onnx/model.onnx"] != plain.files["onnx/model.onnx"]


def test_labels_with_nearly_equal_texts_give_a_valid_classifier(tiny_source: Path, tmp_path: Path) -> None:
    """The head is nearly zero, and so are the logits, so the cosine of logits is no measure of parity."""
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    manifest = export_classifier(ClassifierData(path), str(tiny_source), tmp_path / "bundle")
    assert manifest.variant().parity.cosine_min > 0.9999
    assert verify_bundle(tmp_path / "bundle").ok


def test_data_is_a_deprecated_name_of_classifier_data() -> None:
    with pytest.warns(DeprecationWarning, match="ClassifierData"):
        former = classifier.Data
    assert former is ClassifierData


def test_labels_beyond_the_limits_are_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "read_encoder", Mock(side_effect=AssertionError("the model is read")))
    rows = [(f"text {i}", label) for i in range(20) for label in ("x" * 1025, "short")]
    data = ClassifierData(write_csv(tmp_path / "train.csv", [(f"{text} {label[:2]}", label) for text, label in rows]))
    with pytest.raises(BundleError, match=r"train.csv: the labels\[\d\] has 1025 characters"):
        export_classifier(data, "base", tmp_path / "bundle")


def test_the_warning_about_few_texts_names_their_file(caplog: pytest.LogCaptureFixture) -> None:
    for validation, file, remedy in ((None, "train.csv", True), (Path("valid.csv"), "valid.csv", False)):
        for count in (0, 3):
            caplog.clear()
            classifier._warn_of_few(count, ClassifierData(Path("train.csv"), validation=validation))
            assert caplog.messages[0].startswith(f"{file}: ")
            assert caplog.messages[0].endswith("or a validation file") == remedy
