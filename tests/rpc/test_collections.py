"""Calls on collections of a server: records, searches and settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import (
    Client,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Record,
    RecordId,
    SearchQuery,
    SearchResult,
)
from emberpc.client.types import Fusion
from emberpc.server.collections import CollectionSpec
from emberpc.server.collections.backend import no_collection
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.collection_management import CollectionManagement
from emberpc.v1 import index_pb2, index_pb2_grpc
from examples.server_process import ServerProcess
from waiting import wait_until

TEXTS = {
    "whale": "A captain hunts a white whale across the oceans.",
    "ring": "A small folk carries a ring to a volcano to destroy it.",
    "spice": "On a desert planet houses fight over a spice.",
    "bees": "How to keep bees in your garden and harvest honey.",
    "bread": "Flour, water, salt and patience: baking sourdough bread.",
}


@pytest.fixture
def books(client: Client) -> Iterator[str]:
    client.create_collection("books", model="minilm")
    client.upsert("books", [Record(key, text, {"length": len(text), "tags": [key]}) for key, text in TEXTS.items()])
    yield "books"
    client.delete_collection("books")


def test_search_by_text_finds_records_by_meaning(client: Client, books: str) -> None:
    for query, best in (("making loaves at home", "bread"), ("sea adventure", "whale"), ("insects", "bees")):
        hits = client.search(books, query, top_k=3)
        assert hits[0].record.id == best
        assert hits[0].record.text == TEXTS[best]
        assert hits[0].record.metadata == {"length": len(TEXTS[best]), "tags": [best]}
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_search_by_vector_and_by_record_agree_with_search_by_text(client: Client, books: str) -> None:
    vector = client.embed(["sea adventure"], model="minilm", input_kind="query")[0]
    by_text, by_vector = client.search_batch(books, ["sea adventure", vector], top_k=5)
    assert [hit.record.id for hit in by_text.hits] == [hit.record.id for hit in by_vector.hits]
    assert np.allclose([hit.score for hit in by_text.hits], [hit.score for hit in by_vector.hits], atol=1e-5)
    neighbours = client.search(books, RecordId("whale"), top_k=10)
    assert len(neighbours) == 4
    assert "whale" not in {hit.record.id for hit in neighbours}


def test_queries_of_one_call_have_their_own_options(client: Client, books: str) -> None:
    queries: list[str | SearchQuery] = [
        SearchQuery("sea adventure", top_k=1),
        SearchQuery("sea adventure", where='tags = "bees"'),
        "insects",
    ]
    whale, bees, insects = client.search_batch(books, queries, top_k=3, where="length > 0", mode="hybrid")
    assert [hit.record.id for hit in whale.hits] == ["whale"]
    assert [hit.record.id for hit in bees.hits] == ["bees"]
    assert len(insects.hits) == 3


def test_a_search_by_a_missing_record_raises_not_found(client: Client, books: str) -> None:
    with pytest.raises(NotFound) as missing:
        client.search(books, RecordId("none"))
    assert missing.value.reason == "RECORD_NOT_FOUND"


def test_min_recall_is_accepted_and_invalid_values_are_refused(client: Client, books: str) -> None:
    assert [hit.record.id for hit in client.search(books, "making loaves at home", top_k=1, min_recall=1)] == ["bread"]
    with pytest.raises(InvalidArgument, match="one of the two"):
        client.search(books, "sea", ef=20, min_recall=0.9)
    with pytest.raises(InvalidArgument, match="at most 1"):
        client.search(books, "sea", min_recall=float("nan"))


def test_a_search_result_states_its_plan(client: Client, books: str) -> None:
    (result,) = client.search_batch(books, ["sea"], top_k=50)
    assert result.plan.strategy == "exact"
    assert result.plan.compared_count == 5
    assert result.plan.shortfall_reason == "the collection holds 5 records"


def test_stored_vectors_equal_those_of_embed(client: Client, books: str) -> None:
    stored = client.get(books, list(TEXTS), with_vectors=True)
    embedded = client.embed(list(TEXTS.values()), model="minilm")
    assert np.allclose(np.stack([record.vector for record in stored if record.vector is not None]), embedded, atol=1e-5)
    (hit,) = client.search(books, "bees", top_k=1, with_vectors=True)
    assert hit.record.vector is not None
    assert hit.record.vector.shape == (384,)


def test_records_are_listed_counted_and_deleted(client: Client, books: str) -> None:
    assert [record.id for record in client.records(books)] == sorted(TEXTS)
    assert client.count(books) == 5
    assert client.delete(books, ["ring", "none"]) == 1
    assert [record.id for record in client.get(books, ["ring", "spice"])] == ["spice"]
    assert "ring" not in {hit.record.id for hit in client.search(books, TEXTS["ring"], top_k=10)}


def test_get_collection_returns_model_count_and_size(client: Client, books: str) -> None:
    found = client.get_collection(books)
    assert (found.model, found.dimensions, found.record_count, found.distance) == ("minilm", 384, 5, "cosine")
    assert found.model_fingerprint == client.get_model("minilm").fingerprint
    assert found.size_bytes > 0
    assert books in [each.name for each in client.collections()]


def test_a_collection_of_vectors_needs_no_model(client: Client) -> None:
    client.create_collection("points", dimensions=2, distance="euclidean")
    try:
        result = client.upsert("points", [{"id": "a"}, {"id": "b"}], vectors=np.array([[0, 0], [3, 4]], np.float32))
        assert (result.inserted, result.updated) == (2, 0)
        hits = client.search("points", np.array([0, 0], np.float32), top_k=2)
        assert [(hit.record.id, hit.score) for hit in hits] == [("a", 0.0), ("b", -5.0)]
    finally:
        client.delete_collection("points")


def test_over_long_texts_follow_the_truncation_of_the_collection(client: Client) -> None:
    client.create_collection("long", model="minilm", truncation="end")
    try:
        client.upsert("long", [{"id": "a", "text": "honey bees " * 1000}])
        (hit,) = client.search("long", "bees " * 1000, top_k=1)
        assert hit.record.id == "a"
    finally:
        client.delete_collection("long")


def test_records_have_only_the_requested_parts(server: ServerProcess, books: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        request = index_pb2.BatchGetRecordsRequest(
            collection=books, ids=["bees", "none"], parts=[index_pb2.RECORD_PART_METADATA]
        )
        response = stub.BatchGetRecords(request)
        assert response.missing_ids == ["none"]
        (record,) = response.records
        assert record.text == ""
        assert record.metadata["length"] == len(TEXTS["bees"])
        assert not response.HasField("vectors")


def test_the_response_of_a_write_states_sequence_and_durability(server: ServerProcess, books: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = index_pb2_grpc.IndexServiceStub(channel)
        request = index_pb2.UpsertRecordsRequest(
            collection=books, records=[index_pb2.Record(id="new", text="not seen before")]
        )
        first, second = stub.UpsertRecords(request), stub.UpsertRecords(request)
        assert (first.inserted_count, second.updated_count) == (1, 1)
        assert second.receipt.sequence > first.receipt.sequence
        assert second.receipt.durability == index_pb2.DURABILITY_SYNCED
        assert second.usages[0].tokens > 3
        assert first.timings.infer_seconds > 0
        request.expected_revisions.append(first.receipt.sequence)
        with pytest.raises(grpc.RpcError) as refused:
            stub.UpsertRecords(request)
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.ABORTED


def test_lexical_and_hybrid_searches_find_words(client: Client, books: str) -> None:
    (lexical,) = client.search_batch(books, ["Honey, salt & kept bees"], mode="lexical", top_k=4)
    assert {hit.record.id for hit in lexical.hits} == {"bees", "bread"}
    assert (lexical.plan.strategy, lexical.plan.lexical_count) == ("lexical", 2)
    assert lexical.plan.shortfall_reason == "2 records have a word of the query"
    (hybrid,) = client.search_batch(books, ["making loaves, with honey"], mode="hybrid", dense_weight=0.6)
    assert {hit.record.id for hit in hybrid.hits[:2]} == {"bread", "bees"}
    assert len(hybrid.hits) == 5
    assert client.search(books, "salt", mode="hybrid", where="length < 10") == []
    by_rank = client.search(books, "making loaves, with honey", mode="hybrid", fusion="ranks")
    assert len(by_rank) == 5
    assert 2 * 0.5 / 61 >= by_rank[0].score > by_rank[-1].score > 0


def test_each_fusion_of_a_hybrid_search_has_its_default_weight(client: Client, books: str) -> None:
    def scores(fusion: Fusion | None = None, dense_weight: float | None = None) -> dict[str, float]:
        hits = client.search(
            books, "making loaves, with honey", mode="hybrid", fusion=fusion, dense_weight=dense_weight
        )
        return {hit.record.id: hit.score for hit in hits}

    weights: dict[Fusion, float] = {"bounds": 0.7, "scores": 0.5, "ranks": 0.5}
    found = {fusion: scores(fusion, weight) for fusion, weight in weights.items()}
    for fusion, expected in found.items():
        assert scores(fusion) == pytest.approx(expected)
    assert scores() == pytest.approx(found["bounds"])
    assert found["bounds"] != pytest.approx(found["scores"])


def test_queries_of_a_hybrid_search_have_their_own_ef(client: Client) -> None:
    """Only a graph has an ef, and it needs more records than other collections of these tests have."""
    client.create_collection("many", model="minilm")
    try:
        matrix = np.random.default_rng(0).standard_normal((4200, 384), dtype=np.float32)
        client.upsert("many", [Record(str(i), f"record {i}") for i in range(len(matrix))], vectors=matrix)
        queries: list[str | SearchQuery] = [
            SearchQuery("record 7", ef=150),
            "record 7",
            SearchQuery("record 7", ef=300, top_k=2),
        ]

        def searches_of_the_graph() -> list[SearchResult] | None:
            """Return the results, or None while the graph is filled and has too few records for one of the queries."""
            results = client.search_batch("many", queries, mode="hybrid", ef=120)
            return results if all(result.plan.strategy == "hnsw" for result in results) else None

        found = wait_until(searches_of_the_graph)
        assert [result.plan.ef for result in found] == [150, 120, 300]
        assert [len(result.hits) for result in found] == [10, 10, 2]
        assert all("7" in [hit.record.id for hit in result.hits] for result in found)
    finally:
        client.delete_collection("many")


def test_a_collection_without_a_model_supports_only_lexical_search_of_texts(client: Client) -> None:
    client.create_collection("notes", dimensions=2)
    client.upsert("notes", [Record("a", "a note on bees"), Record("b", "another")], vectors=[[1, 0], [0, 1]])
    assert [hit.record.id for hit in client.search("notes", "bee", mode="lexical")] == ["a"]
    with pytest.raises(FailedPrecondition, match="vectors only"):
        client.search("notes", "bee", mode="hybrid")
    client.delete_collection("notes")


def test_options_that_do_not_fit_the_search_mode_are_refused(server: ServerProcess, client: Client, books: str) -> None:
    for mode in ("lexical", "hybrid"):
        with pytest.raises(InvalidArgument, match=f"which {mode!r} search needs; give a text, or use mode 'dense'"):
            client.search(books, RecordId("ring"), mode=mode)
    with pytest.raises(InvalidArgument, match="only 'hybrid' search"):
        client.search(books, "bees", dense_weight=0.5)
    with pytest.raises(InvalidArgument, match="dense_weight"):
        client.search(books, "bees", mode="hybrid", dense_weight=1.5)
    with pytest.raises(InvalidArgument, match="only 'hybrid' search"):
        client.search(books, "bees", fusion="ranks")
    with pytest.raises(InvalidArgument, match="no graph"):
        client.search(books, "bees", mode="lexical", ef=10)
    with pytest.raises(InvalidArgument, match="is empty"):
        client.search(books, " ", mode="lexical")
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
        queries = [index_pb2.SearchQuery(text="x")]
        request = index_pb2.SearchRequest(collection=books, queries=queries, mode=77)  # type: ignore[arg-type]  # none
        index_pb2_grpc.IndexServiceStub(channel).Search(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_collection_is_verified_with_progress(client: Client, books: str) -> None:
    reported: list[tuple[int, int]] = []
    found = client.verify_collection(books, progress=lambda checked, total: reported.append((checked, total)))
    assert (found.ok, found.checked, found.problems) == (True, 5, ())
    assert (reported[0], reported[-1]) == ((0, 5), (5, 5))
    with pytest.raises(NotFound):
        client.verify_collection("none")


def test_a_record_returns_its_remaining_time_to_live_and_expires(client: Client, books: str) -> None:
    client.upsert(books, [Record("lasting", "a lamp", time_to_live=3600), {"id": "short", "text": "a match"}])
    lasting, short = client.get(books, ["lasting", "short"])
    assert lasting.time_to_live is not None
    assert 3500 < lasting.time_to_live <= 3600
    assert short.time_to_live is None
    client.upsert(books, [Record("short", "a match", time_to_live=0.05)])
    wait_until(lambda: not client.get(books, ["short"]))
    client.delete(books, ["lasting"])


async def test_a_collection_that_is_deleted_while_it_is_listed_does_not_hide_the_others() -> None:
    """The database closes after the collection was found and before it is described."""

    class Access(CollectionAccess):
        def __init__(self) -> None:
            self.found = 0

        async def open(self, name: str) -> Any:
            self.found += 1
            if self.found > 1:
                raise no_collection(name)
            return object()

    async def describe(collection: object) -> Any:
        raise ServiceError(Code.UNAVAILABLE, "closed", reason="CLOSED")

    management = object.__new__(CollectionManagement)
    management._access = access = Access()
    management.describe = describe  # type: ignore[method-assign]
    assert await management._describe_or_problem(CollectionSpec("gone", 2)) is None
    assert access.found == 2
