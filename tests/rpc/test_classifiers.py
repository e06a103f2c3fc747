"""ListClassifiers and GetClassifier describe the fine-tuned bundles that are served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from emberpc.bundle import Task, read_bundle
from emberpc.client import ClassifierLabel, Client, FailedPrecondition, NotFound, ResponseDetails
from emberpc.server.engine import Engine, Model, Registry
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services.classification import ClassificationService
from emberpc.v1 import classification_pb2 as pb
from emberpc.v1 import classification_pb2_grpc
from examples.server_process import ServerProcess

NO_CONTEXT = cast("Any", None)


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[classification_pb2_grpc.ClassificationServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield classification_pb2_grpc.ClassificationServiceStub(channel)


@pytest.fixture
def model(tiny_bundle: Path) -> Iterator[Model]:
    """A served model with the manifest of a multi-label classifier."""
    with ThreadPoolExecutor(1) as pool:
        engine = Engine(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=4096)
        loaded = engine.registry.load("embedder", tiny_bundle)
        manifest = replace(
            loaded.manifest,
            task=Task.CLASSIFICATION,
            labels=("a", "b"),
            multi_label=True,
            thresholds=(0.25, 0.75),
            temperature=2.0,
            strategy="linear",
            quality={"accuracy": 0.5},
            created="2026-01-02T03:04:05+00:00",
        )
        yield replace(loaded, name="tags", manifest=manifest)
        engine.close()


def service_of(*models: Model, max_response_bytes: int = 2**24) -> ClassificationService:
    class Served:
        def models(self) -> list[Model]:
            return sorted(models, key=lambda model: model.name)

        def model(self, name: str, task: Task | None = None, field: str = "model") -> Model:
            return next(model for model in models if model.name == name)

    limits = Limits(10, 1000, 2**20, max_response_bytes, 1000)
    return ClassificationService(cast("Engine", Served()), limits)


def listed(service: ClassificationService, **fields: Any) -> pb.ListClassifiersResponse:
    return asyncio.run(service.ListClassifiers(pb.ListClassifiersRequest(**fields), NO_CONTEXT))


def test_a_classifier_is_described_by_its_manifest(
    stub: classification_pb2_grpc.ClassificationServiceStub, classifier_bundle: Path
) -> None:
    manifest = read_bundle(classifier_bundle).manifest
    found = stub.GetClassifier(pb.GetClassifierRequest(name="modules")).classifier
    assert (found.name, found.kind, found.multi_label) == ("modules", pb.CLASSIFIER_KIND_FINE_TUNED, False)
    assert tuple(label.name for label in found.labels) == manifest.labels
    assert list(found.thresholds) == []
    assert found.temperature == manifest.temperature
    assert found.rejects == (manifest.rejection_logit is not None)
    assert found.rejection_threshold == (manifest.rejection_logit or 0.0)
    assert dict(found.quality) == manifest.quality
    assert found.base_model == manifest.base_model
    assert found.fine_tuning_strategy == manifest.strategy
    assert found.max_tokens == manifest.max_tokens
    assert found.model.name == "modules"
    assert found.model.revision == manifest.revision
    assert len(found.model.fingerprint) == 64
    assert found.fit_time.ToJsonString().removesuffix("Z") == manifest.created.removesuffix("+00:00")
    # An empty name stands for the only classifier.
    assert stub.GetClassifier(pb.GetClassifierRequest()).classifier == found


def test_only_classifiers_are_listed(stub: classification_pb2_grpc.ClassificationServiceStub) -> None:
    found = stub.ListClassifiers(pb.ListClassifiersRequest())
    assert [classifier.name for classifier in found.classifiers] == ["modules"]
    assert found.next_page_token == ""
    assert found.classifiers[0] == stub.GetClassifier(pb.GetClassifierRequest(name="modules")).classifier


@pytest.mark.parametrize(
    ("name", "code"), [("none", grpc.StatusCode.NOT_FOUND), ("minilm", grpc.StatusCode.FAILED_PRECONDITION)]
)
def test_getting_a_missing_classifier_or_another_model_is_refused(
    stub: classification_pb2_grpc.ClassificationServiceStub, name: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetClassifier(pb.GetClassifierRequest(name=name))
    assert caught.value.code() is code
    assert name in (caught.value.details() or "")


@pytest.mark.parametrize("fields", [{"page_size": -1}, {"page_size": 1001}, {"page_token": "?"}])
def test_an_invalid_page_size_or_token_is_refused(
    stub: classification_pb2_grpc.ClassificationServiceStub, fields: dict[str, Any]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListClassifiers(pb.ListClassifiersRequest(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert next(iter(fields)) in (caught.value.details() or "")


def test_a_multi_label_classifier_states_the_threshold_of_each_label(model: Model) -> None:
    (found,) = listed(service_of(model)).classifiers
    assert (found.multi_label, list(found.thresholds), found.rejects) == (True, [0.25, 0.75], False)
    assert found.fit_time.ToJsonString() == "2026-01-02T03:04:05Z"
    plain = replace(model, manifest=replace(model.manifest, thresholds=(), created="yesterday"))
    (found,) = listed(service_of(plain)).classifiers
    assert list(found.thresholds) == [0.5, 0.5]
    assert not found.HasField("fit_time")


def test_pages_of_classifiers_are_in_order_of_names(model: Model) -> None:
    service = service_of(*[replace(model, name=name) for name in "dbeca"])
    first = listed(service, page_size=2)
    second = listed(service, page_size=2, page_token=first.next_page_token)
    third = listed(service, page_size=2, page_token=second.next_page_token)
    names = [[each.name for each in page.classifiers] for page in (first, second, third)]
    assert names == [["a", "b"], ["c", "d"], ["e"]]
    assert third.next_page_token == ""


def test_a_page_of_classifiers_ends_before_its_limit_of_bytes(model: Model) -> None:
    labels = tuple(f"{i}{'x' * 900}" for i in range(600))
    long = replace(model, manifest=replace(model.manifest, labels=labels, thresholds=()))
    models = [replace(long, name=name) for name in "abc"]
    first = listed(service_of(*models))
    assert [each.name for each in first.classifiers] == ["a"]
    assert first.ByteSize() < 2**20
    assert [each.name for each in listed(service_of(*models), page_token=first.next_page_token).classifiers] == ["b"]


def test_the_error_for_a_classifier_beyond_the_response_limit_names_the_remedy(model: Model) -> None:
    long = replace(model, manifest=replace(model.manifest, labels=("a" * 1000, "b" * 1000)))
    service = service_of(long, max_response_bytes=2500)
    with pytest.raises(ServiceError, match="'tags' are too long; start the server with a higher --max-response") as hit:
        listed(service)
    assert hit.value.code is Code.RESOURCE_EXHAUSTED
    with pytest.raises(ServiceError, match="--max-response-bytes"):
        asyncio.run(service.GetClassifier(pb.GetClassifierRequest(name="tags"), NO_CONTEXT))


def test_the_client_returns_all_fields_of_a_classifier(tiny_server: ServerProcess) -> None:
    with Client(tiny_server.address, timeout=300) as client:
        (listed,) = client.classifiers()
        assert client.get_classifier("letters") == client.get_classifier() == listed
        assert (listed.name, listed.kind, listed.strategy) == ("letters", "fine_tuned", "")
        assert listed.labels == (ClassifierLabel("x", ""), ClassifierLabel("y", ""))
        assert listed.model.fingerprint == client.get_model("letters").fingerprint
        details: list[ResponseDetails] = []
        client.classify(["a text"], "letters", details=details.append)
        assert [each.model for each in details] == [listed.model]
        assert listed.model.classifier_fingerprint == client.get_model("letters").classifier_fingerprint != ""
        assert client.get_model("tiny").classifier_fingerprint == ""
        assert listed.rejection_threshold is not None
        with pytest.raises(FailedPrecondition, match="not for classification"):
            client.get_classifier("tiny")
        with pytest.raises(NotFound):
            client.get_classifier("none")
