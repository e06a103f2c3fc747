"""Duplicates and clusters of real texts, with the RPCs and the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from emberpc.client import AsyncClient, Client, InvalidArgument
from emberpc.server.paging import encode_token
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from examples.server_process import ServerProcess

ASKED = {
    "card": ["My card has not arrived", "My card hasn't arrived yet", "Where is my new card?"],
    "rate": ["What is the exchange rate?", "Which exchange rate do you use?", "Exchange rates for euros"],
    "bees": ["How to keep bees", "Keeping bees in a garden", "Bees and their honey"],
}


@pytest.fixture(scope="module")
def texts(server: ServerProcess) -> Iterator[str]:
    with Client(server.address) as client:
        client.create_collection("asked", model="minilm")
        client.upsert(
            "asked", [{"id": f"{k}-{i}", "text": text} for k, own in ASKED.items() for i, text in enumerate(own)]
        )
        yield "asked"
        client.delete_collection("asked")


def test_texts_of_equal_meaning_are_duplicates(client: Client, texts: str) -> None:
    pairs = list(client.duplicates(texts, min_score=0.6))
    assert (pairs[0].first_id, pairs[0].second_id) == ("card-0", "card-1")
    assert all(pair.first_id.partition("-")[0] == pair.second_id.partition("-")[0] for pair in pairs)
    assert list(client.duplicates(texts, min_score=1.0)) == []


def test_pages_of_duplicates_are_complete_despite_new_records(
    server: ServerProcess, client: Client, texts: str
) -> None:
    every = [(pair.first_id, pair.second_id) for pair in client.duplicates(texts, min_score=0.01)]
    with grpc.insecure_channel(server.address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        walked, token = [], ""
        while True:
            request = pb.FindDuplicatesRequest(collection=texts, min_score=0.01, page_size=4, page_token=token)
            page = stub.FindDuplicates(request)
            walked += [
                (pair.first_id, pair.second_id) for pair in page.pairs if "new" not in pair.first_id + pair.second_id
            ]
            client.upsert(texts, [{"id": "new", "text": "Something else altogether"}])
            if not (token := page.next_page_token):
                break
    client.delete(texts, ["new"])
    assert walked == every


def test_clusters_group_texts_by_topic(client: Client, texts: str) -> None:
    found = client.clusters(texts, 3, examples=3)
    assert [cluster.record_count for cluster in found] == [3, 3, 3]
    kinds = [{record.id.partition("-")[0] for record in cluster.examples} for cluster in found]
    assert sorted(map(sorted, kinds)) == [["bees"], ["card"], ["rate"]]


async def test_the_asynchronous_client_returns_equal_duplicates_and_clusters(
    server: ServerProcess, client: Client, texts: str
) -> None:
    async with AsyncClient(server.address) as asynchronous:
        pairs = [pair async for pair in asynchronous.duplicates(texts, min_score=0.6)]
        clusters = await asynchronous.clusters(texts, 3)
    assert pairs == list(client.duplicates(texts, min_score=0.6))
    assert clusters == client.clusters(texts, 3)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda client: list(client.duplicates("asked", min_score=1.5)), "min_score"),
        (lambda client: list(client.duplicates("asked", min_score=-0.1)), "min_score"),
        (lambda client: client.clusters("asked", 1), "cluster_count"),
        (lambda client: client.clusters("asked", 1001), "cluster_count"),
        (lambda client: client.clusters("asked", 5, examples=101), "examples_per_cluster"),
    ],
)
def test_options_outside_their_limits_are_refused_with_the_field(
    client: Client, texts: str, ask: Callable[[Client], Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        ask(client)
    assert [violation.field for violation in raised.value.violations] == [field]


FORGED = {
    "no base64": "x",
    "one item": encode_token("[1]"),
    "no JSON": encode_token("not json"),
    "nested": encode_token("[" * 5_000),
    "too long": encode_token('"' + "x" * 20_000),
    "not finite": encode_token('[NaN, "a", "b"]'),
    "infinite": encode_token('[1e999, "a", "b"]'),
    "a huge number": encode_token("[1" + "0" * 400 + ', "a", "b"]'),
    "ids that are numbers": encode_token("[0.5, 1, 2]"),
    "an object": encode_token('{"a": 1, "b": 2, "c": 3}'),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_page_token_is_refused(server: ServerProcess, texts: str, kind: str) -> None:
    token = FORGED[kind]
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError, match="page_token is not"):
        index_pb2_grpc.IndexServiceStub(channel).FindDuplicates(
            pb.FindDuplicatesRequest(collection=texts, page_token=token)
        )
