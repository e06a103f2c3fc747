"""A served classifier rejects by the score of its bundle, and returns the score."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from emberpc.bundle import RejectionScore, ScopeVectors, finish_bundle, read_bundle, rejection_scores, unit
from emberpc.client import Client
from emberpc.server.engine import Engine, Inference, InferenceRequest, Model, ModelLoadError, Truncation
from emberpc.server.pipelines import classification
from emberpc.server.pipelines.limits import Limits
from emberpc.v1 import classification_pb2 as pb
from emberpc.v1 import classification_pb2_grpc
from examples.server_process import ServerProcess

TEXTS = ["a b c", "p q", "a", "z z z z", "m n o", "b p"]
COSINES = (RejectionScore.CLASS_COSINE, RejectionScore.NEAREST_PROTOTYPE)


def with_rejection(source: Path, folder: Path, score: RejectionScore, threshold: float, vectors: np.ndarray) -> Path:
    """Copy a classifier's bundle, with another rejection score and threshold, and with the vectors of the score."""
    shutil.copytree(source, folder)
    if score.needs_vectors:
        ScopeVectors(unit(vectors)).write(folder)
    manifest = read_bundle(source).manifest
    rule = replace(manifest.decision_rule, rejection_score=score, rejection_threshold=threshold)
    finish_bundle(folder, replace(manifest, **rule.manifest_fields()))
    return folder


@pytest.fixture(scope="module")
def vectors(tiny_server: ServerProcess) -> np.ndarray:
    """The vectors of TEXTS by the encoder that the classifiers share."""
    with Client(tiny_server.address) as client:
        return client.embed(TEXTS, model="tiny")


@pytest.fixture(scope="module")
def expected(tiny_classifier_bundle: Path, vectors: np.ndarray) -> dict[RejectionScore, np.ndarray]:
    head = read_bundle(tiny_classifier_bundle).head()
    assert head is not None
    scope = ScopeVectors(unit(vectors[:2]))
    return {score: rejection_scores(score, head.logits(vectors), vectors, scope) for score in RejectionScore}


@pytest.fixture(scope="module")
def folders(
    tiny_classifier_bundle: Path,
    vectors: np.ndarray,
    expected: dict[RejectionScore, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A bundle for each score, with a threshold between the scores of TEXTS, and one that rejects nothing."""
    parent = tmp_path_factory.mktemp("rejecting")
    found = {"none": parent / "none"}
    shutil.copytree(tiny_classifier_bundle, found["none"])
    finish_bundle(found["none"], replace(read_bundle(found["none"]).manifest, rejection_logit=None))
    for score in RejectionScore:
        ordered = np.sort(expected[score])
        threshold = float(ordered[2] + ordered[3]) / 2
        folder = parent / score.value
        found[score.value] = with_rejection(tiny_classifier_bundle, folder, score, threshold, vectors[:2])
    return found


@pytest.fixture(scope="module")
def rejecting(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(folders, tmp_path_factory.mktemp("data"))
    yield process
    assert process.stop() == 0, process.output


@pytest.mark.parametrize("score", RejectionScore)
def test_a_text_is_rejected_by_the_returned_rejection_score(
    rejecting: ServerProcess, expected: dict[RejectionScore, np.ndarray], score: RejectionScore
) -> None:
    with Client(rejecting.address) as client:
        classifier = client.get_classifier(score.value)
        found = client.classify(TEXTS, score.value)
    assert classifier.rejection_score == score.value
    threshold = classifier.rejection_threshold
    assert threshold is not None
    scores = [each.rejection_score for each in found]
    np.testing.assert_allclose(np.array(scores, dtype=float), expected[score], atol=1e-4)
    rejected = np.array([each.rejected for each in found])
    assert np.array_equal(rejected, expected[score] < threshold)
    assert 0 < rejected.sum() < len(TEXTS)
    assert all(not each.labels for each in found if each.rejected)


def test_a_classifier_that_rejects_nothing_returns_no_score(rejecting: ServerProcess) -> None:
    with grpc.insecure_channel(rejecting.address) as channel:
        stub = classification_pb2_grpc.ClassificationServiceStub(channel)
        described = stub.GetClassifier(pb.GetClassifierRequest(name="none")).classifier
        assert (described.rejects, described.rejection_score) == (False, pb.REJECTION_SCORE_UNSPECIFIED)
        (found,) = stub.Classify(pb.ClassifyRequest(classifier="none", texts=["a b"])).classifications
        assert not found.HasField("rejection_score")
        (found,) = stub.Classify(pb.ClassifyRequest(classifier="max_logit", texts=["a b"])).classifications
        assert found.HasField("rejection_score")


def test_every_rejection_score_of_bundles_is_in_the_api() -> None:
    names = [name.removeprefix("REJECTION_SCORE_").lower() for name in list(pb.RejectionScore.keys())]
    assert names == ["unspecified", *(score.value for score in RejectionScore)]


@pytest.mark.parametrize("score", COSINES)
def test_a_bundle_without_the_vectors_of_its_rejection_score_is_refused(
    tiny_classifier_bundle: Path, vectors: np.ndarray, tmp_path: Path, score: RejectionScore
) -> None:
    short = with_rejection(tiny_classifier_bundle, tmp_path / "short", score, 0.5, vectors[:2, :5])
    with pytest.raises(ModelLoadError, match=r"scope\.npz has the shape \(2, 5\)"):
        Model.load("m", short)
    manifest = read_bundle(short).manifest
    (short / "scope.npz").unlink()
    finish_bundle(short, manifest)
    with pytest.raises(ModelLoadError, match=r"scope\.npz is not among its files"):
        Model.load("m", short)


def test_rejection_scores_of_many_texts_are_computed_on_a_thread(
    folders: dict[str, Path],
    vectors: np.ndarray,
    expected: dict[RejectionScore, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model.load("m", folders["class_cosine"])
    threads: list[str] = []

    def nearest(scope: ScopeVectors, rows: np.ndarray) -> np.ndarray:
        threads.append(threading.current_thread().name)
        return original(scope, rows)

    original = ScopeVectors.nearest_cosines
    monkeypatch.setattr(ScopeVectors, "nearest_cosines", nearest)

    class Served:
        inferrer: Any

        def model(self, *_: object) -> Model:
            return model

        async def infer(self, request: InferenceRequest) -> Inference:
            return Inference(model.finish(vectors), vectors, [1] * len(vectors), [False] * len(vectors), 0, 0, 0)

    served = Served()
    served.inferrer = served
    limits = Limits(10, 1000, 2**20, 2**20, 1000)
    request = classification.ClassificationRequest("m", TEXTS, 0, 0, Truncation.REFUSE)
    for maximum in (2**26, 0):
        monkeypatch.setattr(classification, "_LOOP_PRODUCTS", maximum)
        classifier = classification.TextClassifier(cast("Engine", served), limits)
        found = asyncio.run(classifier.classify(request, cast("Any", None))).decisions
        assert found.rejection_scores is not None
        np.testing.assert_allclose(found.rejection_scores, expected[RejectionScore.CLASS_COSINE], atol=1e-6)
    assert threads[0] == threading.main_thread().name != threads[1]
