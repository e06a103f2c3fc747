"""Classify: labels, probabilities and rejections in responses."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import Reference, probabilities, read_bundle
from emberpc.client import Client
from emberpc.server.services.classification import classify_row
from examples.server_process import ServerProcess


def test_classify_returns_the_labels_of_texts(client: Client, training_file: Path) -> None:
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


def test_top_k_limits_the_returned_labels(client: Client) -> None:
    (prediction,) = client.classify(["write a log record"], top_k=2)
    assert len(prediction.scores) == 2


def test_served_probabilities_equal_those_of_pytorch(client: Client, classifier_bundle: Path) -> None:
    bundle = read_bundle(classifier_bundle)
    reference: Reference = bundle.reference()
    assert reference.logits is not None
    expected = probabilities(reference.logits, bundle.manifest.temperature)
    for row, prediction in zip(expected, client.classify(reference.texts, "modules", truncation="end"), strict=True):
        scores = {each.label: each.score for each in prediction.scores}
        assert np.allclose([scores[label] for label in bundle.manifest.labels], row, atol=1e-3)


def test_list_models_describes_the_served_models(client: Client) -> None:
    embedder, classifier = client.models()
    assert (embedder.name, embedder.task, embedder.dimensions) == ("minilm", "embedding", 384)
    assert (classifier.name, classifier.task) == ("modules", "classification")
    assert "logging" in classifier.labels
    assert embedder.fingerprint != classifier.fingerprint


def test_a_classifier_has_the_fingerprint_of_the_model_with_its_encoder(tiny_server: ServerProcess) -> None:
    """Vectors of models with equal fingerprints may be in one collection."""
    with Client(tiny_server.address) as client:
        fingerprints = {model.name: model.fingerprint for model in client.models()}
    assert fingerprints["letters"] == fingerprints["tiny"]
    assert fingerprints["other"] != fingerprints["tiny"]


def test_served_labels_and_probabilities_equal_those_of_the_export(client: Client, classifier_bundle: Path) -> None:
    bundle = read_bundle(classifier_bundle)
    reference = bundle.reference()
    assert reference.logits is not None
    decided = bundle.manifest.decision_rule.decide(reference.logits)
    found = client.classify(reference.texts, "modules", truncation="end")
    labels = np.array(bundle.manifest.labels)
    # Texts whose two best labels, or whose rejection, are closer than the served model is to PyTorch may differ.
    best_two = -np.sort(-reference.logits, axis=1)[:, :2]
    clear = best_two[:, 0] - best_two[:, 1] > 0.01
    if bundle.manifest.rejection_logit is not None:
        clear &= np.abs(best_two[:, 0] - bundle.manifest.rejection_logit) > 0.01
    assert clear.any()
    for row in np.flatnonzero(clear):
        assert list(found[row].labels) == list(labels[decided.labels[row]])
        assert found[row].rejected == decided.rejected[row]


def test_the_response_lists_the_best_labels_and_no_label_of_a_rejected_text(classifier_bundle: Path) -> None:
    manifest = replace(
        read_bundle(classifier_bundle).manifest,
        labels=("a", "b", "c"),
        multi_label=True,
        temperature=1.0,
        thresholds=(0.2, 0.9, 0.6),
        rejection_logit=0.0,
    )
    logits = np.array([[-0.8, 1.4, 0.9], [-1.0, -2.0, -0.5]], dtype=np.float32)
    decisions = manifest.decision_rule.decide(logits)
    kept = classify_row(decisions, 0, manifest, 0)
    assert [each.label for each in kept.scores] == ["b", "c", "a"]
    assert (list(kept.labels), kept.rejected) == (["c", "a"], False)
    rejected = classify_row(decisions, 1, manifest, 2)
    assert [each.label for each in rejected.scores] == ["c", "a"]
    assert (list(rejected.labels), rejected.rejected) == ([], True)
