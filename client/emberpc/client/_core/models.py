"""Models, classifiers, health and server info: build requests, decode responses."""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from emberpc.client._core import checks
from emberpc.client._core.details import model_version
from emberpc.client._core.enums import CLASSIFIER_KINDS, EXAMPLE_STRATEGIES, REJECTION_SCORES, STATES, TASKS, word_of
from emberpc.client._core.json_values import to_datetime
from emberpc.client._core.rpc_call import Call, Method, Page, Step
from emberpc.client.classification import Classifier, ClassifierLabel
from emberpc.client.types import Health, Model, ServerInfo
from emberpc.v1 import classification_pb2, model_pb2, server_pb2

LIST_MODELS = Method("/emberpc.v1.ModelService/ListModels", model_pb2.ListModelsResponse)
GET_MODEL = Method("/emberpc.v1.ModelService/GetModel", model_pb2.GetModelResponse)
LIST_CLASSIFIERS = Method(
    "/emberpc.v1.ClassificationService/ListClassifiers", classification_pb2.ListClassifiersResponse
)
GET_CLASSIFIER = Method("/emberpc.v1.ClassificationService/GetClassifier", classification_pb2.GetClassifierResponse)
LOAD_MODEL = Method("/emberpc.v1.ModelService/LoadModel", model_pb2.LoadModelResponse)
RELOAD_MODEL = Method("/emberpc.v1.ModelService/ReloadModel", model_pb2.ReloadModelResponse)
GET_SERVER_INFO = Method("/emberpc.v1.ServerService/GetServerInfo", server_pb2.GetServerInfoResponse)
UNLOAD_MODEL = Method("/emberpc.v1.ModelService/UnloadModel", model_pb2.UnloadModelResponse)

# The messages of grpc.health.v1 are in the package grpcio-health-checking, which the client does not require.
# HealthCheckRequest has a string in field 1, and HealthCheckResponse an enum in field 1. protobuf's own messages
# StringValue and Int32Value are encoded in the same way.
HEALTH_CHECK = Method("/grpc.health.v1.Health/Check", Int32Value)


def list_models(page_token: str, page_size: int) -> Call[model_pb2.ListModelsResponse, Page[Model]]:
    """Return the call for one page of `Client.models`; the token of the first page is empty.

    A wrong `page_size` raises InputError or InputTypeError.
    """
    return Call(
        LIST_MODELS,
        model_pb2.ListModelsRequest(page_token=page_token, page_size=checks.count(page_size, "page_size")),
        lambda response: Page([_model(message) for message in response.models], response.next_page_token),
    )


def get_model(name: str) -> Call[model_pb2.GetModelResponse, Model]:
    """Return the call of `Client.get_model`. A name that cannot be sent raises InputError or InputTypeError."""
    request = model_pb2.GetModelRequest(name=checks.text(name, "name"))
    return Call(GET_MODEL, request, lambda response: _model(response.model))


def list_classifiers(
    page_token: str, page_size: int
) -> Call[classification_pb2.ListClassifiersResponse, Page[Classifier]]:
    """Return the call for one page of `Client.classifiers`; the token of the first page is empty.

    A wrong `page_size` raises InputError or InputTypeError.
    """
    size = checks.count(page_size, "page_size")
    return Call(
        LIST_CLASSIFIERS,
        classification_pb2.ListClassifiersRequest(page_token=page_token, page_size=size),
        lambda response: Page([_classifier(message) for message in response.classifiers], response.next_page_token),
    )


def get_classifier(name: str) -> Call[classification_pb2.GetClassifierResponse, Classifier]:
    """Return the call of `Client.get_classifier`. A name that cannot be sent raises InputError or InputTypeError."""
    request = classification_pb2.GetClassifierRequest(name=checks.text(name, "name"))
    return Call(GET_CLASSIFIER, request, lambda response: _classifier(response.classifier))


def load_model(name: str, path: str, variant: str) -> Call[model_pb2.LoadModelResponse, Step[Model]]:
    """Return the call of `Client.load_model`. A wrong argument raises InputError or InputTypeError."""
    request = model_pb2.LoadModelRequest(
        name=checks.text(name, "name"), path=checks.text(path, "path"), variant=checks.text(variant, "variant")
    )
    return Call(LOAD_MODEL, request, _step)


def reload_model(name: str, path: str, variant: str) -> Call[model_pb2.ReloadModelResponse, Step[Model]]:
    """Return the call of `Client.reload_model`. A wrong argument raises InputError or InputTypeError."""
    request = model_pb2.ReloadModelRequest(
        name=checks.text(name, "name"), path=checks.text(path, "path"), variant=checks.text(variant, "variant")
    )
    return Call(RELOAD_MODEL, request, _step)


def unload_model(name: str) -> Call[model_pb2.UnloadModelResponse, None]:
    """Return the call of `Client.unload_model`. A name that cannot be sent raises InputError or InputTypeError."""
    request = model_pb2.UnloadModelRequest(name=checks.text(name, "name"))
    return Call(UNLOAD_MODEL, request, lambda response: None)


def health(service: str) -> Call[Int32Value, Health]:
    """Return the call of `Client.health`. A status that is not in `Health` becomes `Health.UNKNOWN`.

    A wrong `service` raises InputError or InputTypeError.
    """
    request = StringValue(value=checks.text(service, "service"))
    known = {status.value: status for status in Health}
    return Call(HEALTH_CHECK, request, lambda response: known.get(response.value, Health.UNKNOWN))


def server_info() -> Call[server_pb2.GetServerInfoResponse, ServerInfo]:
    """Return the call of `Client.server_info`, which has no arguments."""

    def read(response: server_pb2.GetServerInfoResponse) -> ServerInfo:
        limits = {field.name: getattr(response.limits, field.name) for field in response.limits.DESCRIPTOR.fields}
        return ServerInfo(response.version, limits, tuple(response.features))

    return Call(GET_SERVER_INFO, server_pb2.GetServerInfoRequest(), read)


def _step(message: model_pb2.LoadModelResponse | model_pb2.ReloadModelResponse) -> Step[Model]:
    return Step(message.stage, _model(message.model))


def _classifier(message: classification_pb2.Classifier) -> Classifier:
    return Classifier(
        name=message.name,
        kind=word_of(message.kind, CLASSIFIER_KINDS),
        model=model_version(message.model),
        labels=tuple(ClassifierLabel(label.name, label.description) for label in message.labels),
        multi_label=message.multi_label,
        thresholds=tuple(message.thresholds),
        temperature=message.temperature,
        rejection_threshold=message.rejection_threshold if message.rejects else None,
        base_model=message.base_model,
        fine_tuning_strategy=message.fine_tuning_strategy,
        max_tokens=message.max_tokens,
        collection=message.collection,
        strategy=word_of(message.strategy, EXAMPLE_STRATEGIES),
        example_count=message.example_count,
        fit_time=to_datetime(message.fit_time) if message.HasField("fit_time") else None,
        quality=dict(sorted(message.quality.items())),
        rejection_score=word_of(message.rejection_score, REJECTION_SCORES) if message.rejection_score else None,
    )


def _model(message: model_pb2.Model) -> Model:
    return Model(
        name=message.name,
        task=word_of(message.task, TASKS),
        state=word_of(message.state, STATES),
        base_model=message.base_model,
        revision=message.revision,
        fingerprint=message.fingerprint,
        classifier_fingerprint=message.classifier_fingerprint,
        dimensions=message.dimensions,
        matryoshka_dimensions=tuple(message.matryoshka_dimensions),
        pooling=message.pooling,
        normalized=message.normalized,
        max_tokens=message.max_tokens,
        query_prompt=message.query_prompt,
        passage_prompt=message.passage_prompt,
        labels=tuple(message.labels),
        multi_label=message.multi_label,
        variant=message.variant,
        size_bytes=message.size_bytes,
        load_time=to_datetime(message.load_time) if message.HasField("load_time") else None,
        quality=dict(sorted(message.quality.items())),
        engine=message.engine,
        precision=message.precision,
        engine_reason=message.engine_reason,
    )
