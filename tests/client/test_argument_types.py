"""An argument of a wrong type is refused before anything is sent. The error names it, its type and the right types."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from emberpc.client import TLS, Client, InputError, InputTypeError, RecordId, SearchQuery
from emberpc.client._core import checks
from fake_server import FakeServer

Shell = Any


def letters() -> Iterator[str]:
    yield from "ab"


#: Values by the names of their types.
KINDS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"text": "x"},
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"x"),
    "NoneType": lambda: None,
    "int": lambda: 3,
    "object": object,
    "generator": letters,
    "ndarray": lambda: np.ones((2, 3)),
}
#: A right value of each parameter that may be given by its place.
RIGHT: dict[str, Any] = {
    **{name: ["a"] for name in ("texts", "sources", "targets", "items", "ids", "queries")},
    **dict.fromkeys(("collection", "name", "classifier", "model", "service", "query", "path"), "a"),
    "records": [{"id": "a", "text": "a"}],
    "truncation": "end",
    "count": 3,
}
NESTED: Any = SearchQuery("a")
#: Parameters that accept a value of a type of KINDS: by the name of the type.
ACCEPTED = {
    "generator": {"texts", "sources", "targets", "items", "ids", "queries", "records"},
    "int": {"count"},
    # A row is a query. Items of a stream are checked when they are read.
    "ndarray": {"queries", "items", "upsert_stream.records"},
    # None is the default.
    "NoneType": {"delete.ids"},
}


def parameters() -> Iterator[tuple[str, str]]:
    """Yield each method of the client with each parameter that may be given by its place."""
    for method, function in inspect.getmembers(Client, inspect.isfunction):
        for name, parameter in inspect.signature(function).parameters.items():
            if not method.startswith("_") and name != "self" and parameter.kind is not parameter.KEYWORD_ONLY:
                yield method, name


@pytest.mark.parametrize(("method", "parameter"), list(parameters()))
def test_the_error_for_a_wrong_type_names_argument_and_types(
    fake: FakeServer, shell: Shell, method: str, parameter: str
) -> None:
    names = [name for each, name in parameters() if each == method]
    for kind, value in KINDS.items():
        if {parameter, f"{method}.{parameter}"} & ACCEPTED.get(kind, set()):
            continue
        arguments = {**{name: RIGHT[name] for name in names}, parameter: value()}
        with pytest.raises(InputTypeError) as raised:
            shell(method, *arguments.values())
        # A matrix is a list, whose first item has a wrong type.
        item = r"(\[0\])?" if kind == "ndarray" else ""
        assert re.match(rf"{parameter}{item} is of type {kind}\b.*(it must be|give) (a|an|one) ", str(raised.value)), (
            kind
        )
    assert not fake.asked


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"text": "x"}, " is of type dict"),
        (b"x", " is of type bytes"),
        (None, " is of type NoneType"),
        (3, " is of type int"),
        (np.float32(3), " is of type float32"),
        (letters(), " is of type generator"),
        ({1.0, 2.0}, " is of type set"),
        (SearchQuery(NESTED), r"\.query is of type SearchQuery"),
    ],
)
def test_the_error_of_a_query_names_all_kinds_of_queries(
    fake: FakeServer, shell: Shell, query: Any, words: str
) -> None:
    kinds = rf"{words}; it must be a text \(str\), a vector \(a list of numbers or .*\) or a RecordId; .*SearchQuery"
    with pytest.raises(InputTypeError, match="query" + kinds):
        shell("search", "c", query)
    with pytest.raises(InputTypeError, match=r"queries\[1\]" + kinds):
        shell("search_batch", "c", ["a", query])
    assert not fake.asked


@pytest.mark.parametrize("query", [np.ones((2, 3)), [[1.0, 2.0]], [np.ones(2)]])
def test_a_list_of_vectors_is_refused_as_a_query(fake: FakeServer, shell: Shell, query: Any) -> None:
    words = r"has shape \(\d, \d\); it must be one vector, \(dimensions,\), or use `search_batch` for several"
    with pytest.raises(InputTypeError, match=f"query is of type {type(query).__name__} and {words}"):
        shell("search", "c", query)
    assert not fake.asked


def test_sequences_of_numbers_are_accepted_as_queries(fake: FakeServer, shell: Shell) -> None:
    import array
    from collections import deque

    shell("create_collection", "c")
    shell("upsert", "c", [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}])
    ones = [1.0] * 8
    queries = [ones, tuple(ones), deque(ones), array.array("f", ones), np.ones(8), np.ones(8, np.int8), range(8)]
    results = shell("search_batch", "c", [*queries, RecordId("a")])
    assert [len(result.hits) for result in results] == [2] * len(queries) + [1]


@pytest.mark.parametrize("vector", [{"a": 1.0}, b"ab", bytearray(b"ab"), 3, {1.0}, letters()])
def test_a_vector_of_a_record_of_a_wrong_type_is_refused(fake: FakeServer, shell: Shell, vector: Any) -> None:
    kind = type(vector).__name__
    with pytest.raises(InputTypeError, match=rf"records\[0\]\.vector is of type {kind}; it must be a list of numbers"):
        shell("upsert", "c", [{"id": "a", "vector": vector}])
    with pytest.raises(InputTypeError, match=rf"vectors is of type {kind}; it must be a list of numbers"):
        shell("upsert", "c", [{"id": "a"}], vectors=vector)
    assert not fake.asked


@pytest.mark.parametrize(("method", "arguments"), [("embed_stream", ()), ("upsert_stream", ("c",))])
def test_a_blocking_client_refuses_an_asynchronous_stream(
    fake: FakeServer, method: str, arguments: tuple[str, ...]
) -> None:
    async def items() -> AsyncIterator[str]:
        yield "a"

    with Client(fake.target) as client, pytest.raises(InputTypeError, match="async_generator, which only AsyncClient"):
        list(getattr(client, method)(*arguments, items()))
    assert not fake.asked


@pytest.mark.parametrize("name", ["root_certificates", "private_key", "certificate_chain"])
def test_paths_of_certificates_of_a_wrong_type_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: {}}
    with pytest.raises(InputTypeError, match=f"{name} is of type dict; it must be a str or a pathlib.Path"):
        TLS.from_files(**wrong)


class BytesPath:
    """A path object that stands for bytes."""

    def __fspath__(self) -> bytes:
        return b"a"


def test_invalid_paths_are_refused() -> None:
    with pytest.raises(InputTypeError, match="it is of type BytesPath; it must be a str or a pathlib.Path"):
        checks.path(BytesPath(), "it")
    with pytest.raises(InputError, match="it has a NUL character"):
        checks.path("a\0b", "it")
