"""Classification over the wire, and what the server does with logits."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.bundle import Manifest, Parity, Reference, Task, Variant, read_bundle
from emberpc.client import Client
from emberpc.server.services.classification import classify_row, outside, probabilities

MANIFEST = Manifest(
    task=Task.CLASSIFICATION,
    base_model="m",
    revision="r",
    weights_sha256="0",
    dimensions=2,
    pooling="mean",
    normalize=True,
    max_tokens=8,
    pad_token_id=0,
    variants=(Variant("fp32", "onnx/model.onnx", Parity(1, 0.0, 1.0)),),
    labels=("a", "b", "c"),
)
logits = arrays(np.float32, (4, 3), elements=st.floats(-1e4, 1e4, width=32))


def test_texts_get_their_labels(client: Client, training_file: Path) -> None:
    with training_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::3]
    found = client.classify([row["text"] for row in rows], "modules", truncation="end")
    right = [prediction.label == row["label"] for prediction, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) >= 0.9
    for prediction in found:
        scores = [each.score for each in prediction.scores]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-4)
        assert prediction.label == prediction.scores[0].label
        assert not prediction.rejected


def test_top_k_cuts_the_list_of_labels(client: Client) -> None:
    (prediction,) = client.classify(["write a log record"], top_k=2)
    assert len(prediction.scores) == 2


def test_the_served_logits_are_those_of_pytorch(client: Client, classifier_bundle: Path) -> None:
    bundle = read_bundle(classifier_bundle)
    reference: Reference = bundle.reference()
    assert reference.logits is not None
    expected = probabilities(reference.logits, bundle.manifest)
    for row, prediction in zip(expected, client.classify(reference.texts, "modules", truncation="end"), strict=True):
        scores = {each.label: each.score for each in prediction.scores}
        assert np.allclose([scores[label] for label in bundle.manifest.labels], row, atol=1e-3)


def test_the_models_describe_themselves(client: Client) -> None:
    embedder, classifier = client.models()
    assert (embedder.name, embedder.task, embedder.dimensions) == ("minilm", "embedding", 384)
    assert (classifier.name, classifier.task) == ("modules", "classification")
    assert "logging" in classifier.labels
    # One encoder, so one fingerprint: their vectors may stand in one index.
    assert embedder.fingerprint == classifier.fingerprint


@given(logits=logits, temperature=st.floats(0.05, 20))
def test_probabilities_are_probabilities_whatever_the_logits(logits: np.ndarray, temperature: float) -> None:
    single = probabilities(logits, replace(MANIFEST, temperature=temperature))
    assert np.isfinite(single).all()
    assert np.allclose(single.sum(axis=1), 1, atol=1e-4)
    multi = probabilities(logits, replace(MANIFEST, temperature=temperature, multi_label=True))
    assert ((multi >= 0) & (multi <= 1)).all()


def test_a_text_whose_best_logit_is_below_the_threshold_is_rejected() -> None:
    logits = np.array([[1.0, 4.0, 1.0], [1.0, 3.0, -9.0]], dtype=np.float32)
    assert outside(logits, replace(MANIFEST, rejection_logit=3.5)).tolist() == [False, True]
    assert outside(logits, MANIFEST).tolist() == [False, False]
    scores = np.array([0.3, 0.4, 0.3], dtype=np.float32)
    kept = classify_row(scores, MANIFEST, 0, rejected=False)
    assert (list(kept.labels), kept.rejected) == (["b"], False)
    rejected = classify_row(scores, MANIFEST, 0, rejected=True)
    assert (list(rejected.labels), rejected.rejected) == ([], True)
    assert [each.label for each in rejected.scores] == ["b", "a", "c"]


def test_a_multi_label_classifier_gives_every_label_above_its_threshold() -> None:
    scores = np.array([0.3, 0.8, 0.7], dtype=np.float32)
    manifest = replace(MANIFEST, multi_label=True, thresholds=(0.2, 0.9, 0.6))
    assert list(classify_row(scores, manifest, 0, rejected=False).labels) == ["c", "a"]
    assert list(classify_row(scores, replace(manifest, thresholds=()), 1, rejected=False).labels) == ["b", "c"]
