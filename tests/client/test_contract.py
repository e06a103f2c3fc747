"""The two clients have equal methods, agree with the protos, and import few packages."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
from google.protobuf.wrappers_pb2 import Int32Value, StringValue
from grpc_health.v1 import health_pb2

import emberpc.client
from emberpc.client import AsyncClient, Client, exceptions
from emberpc.client._core import (
    backups,
    clusters,
    collections,
    embed_stream,
    embedding,
    models,
    records,
    search,
    upsert_stream,
)
from emberpc.client._core.embedding import EmbedOptions
from emberpc.client._core.rpc_call import Method
from emberpc.client._core.search import SearchOptions
from emberpc.v1 import classification_pb2, embedding_pb2, index_pb2, model_pb2, server_pb2

METHODS = [
    value
    for module in (backups, clusters, collections, embed_stream, embedding, models, records, search, upsert_stream)
    for value in vars(module).values()
    if isinstance(value, Method)
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.path))
def test_methods_have_paths_and_messages_of_the_protos(method: Method) -> None:  # type: ignore[type-arg]  # of any response
    if method is models.HEALTH_CHECK:
        service = health_pb2.DESCRIPTOR.services_by_name["Health"]
        assert method.path == f"/{service.full_name}/{service.methods_by_name['Check'].name}"
        return
    _, service_name, name = method.path.split("/")
    services = {
        service.full_name: service
        for module in (classification_pb2, embedding_pb2, index_pb2, model_pb2, server_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    assert services[service_name].methods_by_name[name].output_type is method.response.DESCRIPTOR


def test_health_messages_have_the_wire_form_of_the_wrappers() -> None:
    request = health_pb2.HealthCheckRequest(service="a.b.C")
    assert StringValue(value="a.b.C").SerializeToString() == request.SerializeToString()
    response = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
    assert Int32Value.FromString(response.SerializeToString()).value == 2


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def parameters(client: type) -> dict[str, list[str]]:
        return {
            name: [described(parameter) for parameter in inspect.signature(method).parameters.values()]
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }

    def described(parameter: inspect.Parameter) -> str:
        # Where Client accepts an iterable, AsyncClient also accepts an asynchronous one.
        return re.sub(r" \| AsyncIterable\[.*\](?=')", "", str(parameter))

    assert parameters(Client) == parameters(AsyncClient)


#: Defaults of the second method of a pair that are not those of the first.
OTHER_DEFAULTS = {"embed_stream": {"priority": "bulk", "batch_size": 64}, "search_batch": {}}


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("options", "first", "second"),
    [(EmbedOptions, "embed", "embed_stream"), (SearchOptions, "search", "search_batch")],
)
def test_two_methods_with_the_same_options_have_equal_parameters(
    client: type, options: type, first: str, second: str
) -> None:
    def keywords(method: str) -> dict[str, inspect.Parameter]:
        found = inspect.signature(getattr(client, method)).parameters.values()
        return {parameter.name: parameter for parameter in found if parameter.kind is parameter.KEYWORD_ONLY}

    of_first, of_second = keywords(first), keywords(second)
    fields = [(field.name, field.type) for field in dataclasses.fields(options)]
    for of in (of_first, of_second):
        declared = [(name, parameter.annotation) for name, parameter in of.items()]
        assert declared[: len(fields)] == fields
    shared = [name for name in of_first if name in of_second]
    assert shared == [name for name in of_second if name in of_first]
    assert {name: of_first[name].annotation for name in shared} == {name: of_second[name].annotation for name in shared}
    differing = {name: of_second[name].default for name in shared if of_second[name].default != of_first[name].default}
    assert differing == OTHER_DEFAULTS[second]


def test_both_clients_have_equal_docstrings_except_about_threads() -> None:
    names = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")]
    for name in names:
        ours, other = (inspect.getdoc(getattr(client, name)) or "" for client in (Client, AsyncClient))
        assert ours
        differing = [a for a, b in zip(ours.splitlines(), other.splitlines(), strict=True) if a != b]
        assert all(re.search("thread|close", line) for line in differing), differing


def test_the_docstring_of_exceptions_lists_every_exception() -> None:
    kinds: list[type[Exception]] = [exceptions.EmberpcError, exceptions.InputError, exceptions.InputTypeError]
    for kind in (*kinds, *exceptions.EmberpcError.__subclasses__()):
        assert kind.__name__ in str(exceptions.__doc__)
        assert kind.__name__ in emberpc.client.__all__


@pytest.mark.parametrize(
    "heavy", ["onnxruntime", "tokenizers", "hnswlib", "torch", "transformers", "typer", "rich", "emberpc.server"]
)
def test_importing_the_client_loads_no_large_packages(loaded: set[str], heavy: str) -> None:
    assert heavy not in loaded


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The modules that are loaded after `import emberpc.client` in a new interpreter."""
    code = "import sys, emberpc.client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(found.stdout.split())
    assert "emberpc.client" in modules
    return modules
