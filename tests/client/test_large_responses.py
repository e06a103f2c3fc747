"""Requests whose response would be too large: the clients divide them into smaller requests."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import ResourceExhausted, SearchQuery
from fake_server import FakeServer, Fault

Shell = Any

TOO_LARGE = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "the response would have more bytes", "RESPONSE_TOO_LARGE")
TEXTS = ["one", "two", "three", "four", "five"]
QUERIES = [SearchQuery(text, top_k=1) for text in TEXTS]

#: RPC, method, arguments, and the repeated field of the request.
CALLS = {
    "search": ("Search", "search_batch", ("c", QUERIES), "queries"),
    "get": ("BatchGetRecords", "get", ("c", TEXTS), "ids"),
    "embed": ("Embed", "embed", (TEXTS,), "texts"),
    "classify": ("Classify", "classify", (TEXTS,), "texts"),
}


@pytest.fixture(autouse=True)
def records(shell: Shell) -> None:
    shell("create_collection", "c")
    shell("upsert", "c", [{"id": text, "text": text} for text in TEXTS])


@pytest.mark.parametrize("kind", CALLS)
def test_a_request_is_divided_until_its_response_fits(fake: FakeServer, shell: Shell, kind: str) -> None:
    rpc, name, arguments, field = CALLS[kind]
    whole = shell(name, *arguments)
    fake.asked[rpc].clear()

    def refuse(request: Any) -> None:
        if len(getattr(request, field)) > 2:
            fake.faults[rpc].append(TOO_LARGE)

    fake.hooks[rpc] = refuse
    divided = shell(name, *arguments)
    assert np.array_equal(divided, whole) if kind == "embed" else divided == whole
    sizes = [len(getattr(asked.request, field)) for asked in fake.asked[rpc]]
    assert sorted(sizes) == [1, 2, 2, 3, 5]


@pytest.mark.parametrize("kind", CALLS)
def test_a_too_large_response_for_one_item_is_an_error(fake: FakeServer, shell: Shell, kind: str) -> None:
    rpc, name, arguments, _ = CALLS[kind]
    fake.faults[rpc].extend([TOO_LARGE] * 20)
    with pytest.raises(ResourceExhausted, match="more bytes") as raised:
        shell(name, *arguments)
    assert raised.value.reason == "RESPONSE_TOO_LARGE"


def test_a_request_with_another_error_is_not_divided(fake: FakeServer, shell: Shell) -> None:
    fake.faults["Search"].append(Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL"))
    with pytest.raises(ResourceExhausted, match="queue is full"):
        shell("search_batch", "c", QUERIES)
    assert {len(asked.request.queries) for asked in fake.asked["Search"]} == {len(QUERIES)}


def test_progress_counts_the_items_of_divided_requests(fake: FakeServer, shell: Shell) -> None:
    fake.faults["Embed"].append(TOO_LARGE)
    done: list[int] = []
    shell("embed", TEXTS, progress=done.append)
    assert done == [2, 5]


@pytest.mark.parametrize("of_each", [False, True])
def test_queries_for_many_hits_are_divided_into_requests(fake: FakeServer, shell: Shell, of_each: bool) -> None:
    queries = [SearchQuery(text, top_k=2000) if of_each else text for text in map(str, range(120))]
    assert len(shell("search_batch", "c", queries, **({} if of_each else {"top_k": 2000}))) == 120
    assert sorted(len(asked.request.queries) for asked in fake.asked["Search"]) == [20, 50, 50]
    shell("search", "c", "one", top_k=10_000)
