"""`emberpc search --file`: a search for each query of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.client import Client
from emberpc.v1 import types_pb2
from fake_server import FakeServer, Fault

Emberpc = Any


@pytest.fixture
def seas(emberpc: Emberpc, fake: FakeServer) -> str:
    """A collection of three records."""
    assert emberpc("collection", "create", "seas", "--model", "canned").code == 0
    lines = "".join(
        json.dumps({"id": text[0], "text": text, "label": "sea"}) + "\n" for text in ("azov", "black", "coral")
    )
    assert emberpc("upsert", "seas", "-", stdin=lines).code == 0
    return "seas"


def test_each_query_has_options_of_its_own(emberpc: Emberpc, fake: FakeServer, seas: str, tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    queries = [
        {"text": "azov", "where": "size > 2", "top_k": 2, "ef": 50},
        {"vector": [1.0] * 8, "top_k": None},
        {"id": "b"},
    ]
    path.write_text("\n\n".join(map(json.dumps, queries)))
    assert emberpc("search", seas, "--file", path, "-k", 3, "--ef", 30, "--priority", "interactive").code == 0
    (asked,) = fake.asked["Search"]
    assert asked.request.priority == types_pb2.PRIORITY_INTERACTIVE
    assert (asked.request.top_k, asked.request.ef) == (3, 30)
    first, second, third = asked.request.queries
    assert (first.text, first.top_k, first.ef, first.filter.comparison.field) == ("azov", 2, 50, "size")
    assert (second.vector.dimensions, second.top_k, second.ef, second.HasField("filter")) == (8, 0, 0, False)
    assert third.record_id == "b"


def test_each_hit_has_the_line_of_its_query(emberpc: Emberpc, fake: FakeServer, seas: str) -> None:
    queries = '{"text": "azov"}\n\n{"id": "b"}\n'
    outcome = emberpc("search", seas, "--file", "-", "--json", "--plan", "-k", 3, stdin=queries)
    assert [(hit["line"], hit["label"]) for hit in outcome.objects] == [(1, "sea")] * 3 + [(3, "sea")] * 2
    assert outcome.objects[0]["id"] == "a"
    assert outcome.err.splitlines() == [
        "line 1: plan: strategy exact, ef 0, compared_count 3, lexical_count 0",
        "line 3: plan: strategy exact, ef 0, compared_count 2, lexical_count 0",
        "line 3: 2 hits: the collection has 3 records",
    ]
    rows = emberpc("search", seas, "--file", "-", "-k", 1, stdin=queries).rows
    assert rows[0] == ["line", "score", "id", "label", "text"]
    assert [row[0] for row in rows[1:]] == ["1", "3"]
    assert fake.asked["Search"][-1].request.priority == types_pb2.PRIORITY_BULK
    # A single query has no line.
    assert "line" not in emberpc("search", seas, "azov", "--json").objects[0]
    assert fake.asked["Search"][-1].request.priority == types_pb2.PRIORITY_INTERACTIVE


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "the line is not JSON"),
        ('["a"]', "the line is no JSON object"),
        ('{"text": "a", "topk": 3}', "there is a field 'topk'; a query has text, vector, id, where, top_k, ef"),
        ("{}", "give one of text, vector and id; there is none of them"),
        ('{"text": null}', "give one of text, vector and id; there is none of them"),
        ('{"text": "a", "id": "b"}', "give one of text, vector and id; there is text and id"),
        ('{"text": 3}', "text is 3; it must be a string"),
        ('{"vector": "a"}', "vector is 'a'; it must be a list of numbers"),
        ('{"text": "a", "top_k": true}', "top_k is True; it must be a whole number"),
        # Found by the client.
        ('{"text": "a", "top_k": 0}', "top_k is 0; it must be at least 1"),
        ('{"text": "a", "ef": -1}', "ef is -1; it must be at least 0"),
        ('{"text": "a", "where": "x >"}', "where"),
        ('{"vector": [1, "a"]}', "query is a list of texts"),
        ('{"vector": []}', "query has shape (0,)"),
    ],
)
def test_the_error_for_an_invalid_query_names_its_line(
    emberpc: Emberpc, fake: FakeServer, seas: str, line: str, words: str
) -> None:
    outcome = emberpc("search", seas, "--file", "-", stdin=f'{{"text": "a"}}\n{line}\n')
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: stdin:2: {words}")
    assert not fake.asked["Search"]


@pytest.mark.parametrize(
    "line",
    [f'{{"text": {[1] * 9000}}}', f'{{"{"k" * 9000}": 1}}', f'{{"vector": "{"v" * 9000}"}}'],
    ids=["list", "name of a field", "text"],
)
def test_the_error_for_a_long_invalid_query_is_short(emberpc: Emberpc, fake: FakeServer, seas: str, line: str) -> None:
    outcome = emberpc("search", seas, "--file", "-", stdin=line)
    assert outcome.code == 2
    assert len(outcome.err) < 300


def test_an_error_of_the_server_names_the_line_of_the_query(
    emberpc: Emberpc, fake: FakeServer, seas: str, tmp_path: Path
) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('\n{"text": "a"}\n{"id": "z"}\n')
    fake.faults["Search"].append(Fault(grpc.StatusCode.NOT_FOUND, "queries[1].record_id is 'z'", "RECORD_NOT_FOUND"))
    outcome = emberpc("search", seas, "--file", path)
    assert (outcome.code, outcome.err) == (4, f"error: {path}:3: record_id is 'z'\n")


def test_search_needs_exactly_one_source_of_queries(emberpc: Emberpc, fake: FakeServer, seas: str) -> None:
    for arguments in ([], ["a", "--id", "b"], ["a", "--file", "-"], ["--id", "b", "--file", "-"]):
        outcome = emberpc("search", seas, *arguments)
        assert outcome.code == 2
        assert "give a query in words, a record with --id, or a file of queries with --file" in outcome.err
    outcome = emberpc("search", seas, "--file", "-", stdin="\n")
    assert (outcome.code, "stdin holds no queries" in outcome.err) == (2, True)


def test_a_vector_printed_by_embed_is_accepted_as_a_query(emberpc: Emberpc, tiny_client: Client) -> None:
    tiny_client.create_collection("c", model="tiny")
    tiny_client.upsert("c", [{"id": text, "text": text} for text in ("a", "b", "c")])
    (embedded,) = emberpc("embed", "b", "--model", "tiny", "--json").objects
    query = json.dumps({"vector": embedded["vector"], "top_k": 1})
    (hit,) = emberpc("search", "c", "--file", "-", "--json", stdin=query).objects
    assert (hit["id"], hit["line"]) == ("b", 1)
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_a_min_score_of_zero_is_refused(emberpc: Emberpc, fake: FakeServer, seas: str) -> None:
    outcome = emberpc("collection", "duplicates", seas, "--min-score", 0)
    assert (outcome.code, outcome.err) == (2, "error: --min-score is 0; it must be above 0 and at most 1\n")
    assert not fake.asked["FindDuplicates"]
