"""`emberpc search --file`: a search for each query of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.cli.errors import CliError
from emberpc.cli.queries import QueryFile
from emberpc.client import Client
from emberpc.v1 import types_pb2
from fake_server import FakeServer, Fault

Emberpc = Any
#: A filter with more conditions than the server accepts in one conjunction.
LONG_FILTER = " and ".join(["a exists"] * 101)


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
        ('{"vector": [1, "a"]}', "vector[1] is 'a'; it must be a number"),
        ('{"vector": [[1, 2]]}', "vector[0] is [1, 2]; it must be a number"),
        ('{"vector": [true]}', "vector[0] is True; it must be a number"),
        ('{"vector": []}', "vector is empty"),
        (f'{{"vector": [1{"0" * 400}]}}', "vector has a number beyond float32"),
        # Found by the client.
        ('{"text": "a", "top_k": 0}', "top_k is 0; it must be at least 1"),
        ('{"text": "a", "ef": -1}', "ef is -1; it must be at least 0"),
        ('{"text": "a", "where": "x >"}', "where, column 4: "),
        ('{"vector": [1e39]}', "vector holds NaN, infinity or a number beyond float32"),
        (r'{"text": "\ud800"}', "text holds a lone surrogate"),
        (r'{"id": "\ud800"}', "id holds a lone surrogate"),
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
    assert (outcome.code, outcome.err) == (4, f"error: {path}:3: id is 'z'\n")


@pytest.mark.parametrize(
    ("line", "options", "code", "words"),
    [
        ('{"id": "queries[0].x"}', [], 4, "there is no record 'queries["),
        ('{"text": " "}', [], 2, "text is empty; give it some text, or search by vector or id"),
        ('{"vector": [1, 2]}', [], 2, "vector: dimensions is 2; collection 'c' has 32; give a vector of 32 dimensions"),
        (f'{{"vector": {[0] * 32}}}', [], 2, "vector has length zero, so no direction for cosine; give a vector that"),
        ('{"text": "a", "top_k": 20000}', [], 2, "top_k is 20000; it must be 1 to 10000"),
        ('{"text": "a", "ef": 2000000}', [], 2, "ef is 2000000; it must be 0 (the server chooses) to 1000000"),
        ('{"text": "a", "ef": 9}', ["--min-recall", 0.9], 2, "ef is given beside --min-recall; give one of the two"),
        ('{"text": "a", "ef": 9}', ["--mode", "lexical"], 2, "ef is set, but 'lexical' search uses no graph"),
        (
            '{"id": "a"}',
            ["--mode", "hybrid"],
            2,
            "the query has no text, which 'hybrid' search needs; give a text, or -",
        ),
        (
            f'{{"text": "a", "where": "{LONG_FILTER}"}}',
            [],
            2,
            "where: all.filters has 101 filters; it must have 1 to 100",
        ),
        (f'{{"text": "{"a " * 90}"}}', ["--truncation", "refuse"], 2, "text has "),
    ],
)
@pytest.mark.parametrize("before", [0, 150])
def test_a_query_that_a_server_refuses_is_named_by_its_line_and_fields(
    emberpc: Emberpc, tiny_client: Client, line: str, options: list[Any], code: int, words: str, before: int
) -> None:
    tiny_client.create_collection("c", model="tiny")
    tiny_client.upsert("c", [{"id": "a", "text": "a"}])
    queries = '{"text": "a"}\n' * before + f"{line}\n"
    outcome = emberpc("search", "c", "--file", "-", *options, stdin=queries)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(f"error: stdin:{before + 1}: {words}")


def test_an_error_of_an_option_names_the_option(emberpc: Emberpc, tiny_client: Client) -> None:
    tiny_client.create_collection("c", model="tiny")
    for query in (["a"], ["--file", "-"]):
        outcome = emberpc("search", "c", *query, "-k", 20_000, stdin='{"text": "a"}')
        assert (outcome.code, outcome.err) == (2, "error: --top-k is 20000; it must be 1 to 10000\n")
        outcome = emberpc("search", "c", *query, "--where", "x >", stdin='{"text": "a"}')
        assert outcome.err.startswith("error: --where, column 4: ")
        outcome = emberpc("search", "c", *query, "--where", LONG_FILTER, stdin='{"text": "a"}')
        assert outcome.err.startswith("error: --where: all.filters has 101 filters; it must have 1 to 100")


def test_queries_are_sent_in_batches_and_each_is_printed_before_the_next_is_sent(
    emberpc: Emberpc, fake: FakeServer, seas: str
) -> None:
    printed: list[str] = []
    fake.hooks["Search"] = lambda _: printed.append(sys.stdout.getvalue())  # type: ignore[union-attr]
    queries = '{"text": "azov"}\n\n' * 5
    outcome = emberpc("search", seas, "--file", "-", "-k", 1, "--batch-size", 2, "--details", stdin=queries)
    assert [len(asked.request.queries) for asked in fake.asked["Search"]] == [2, 2, 1]
    assert [len(text.splitlines()) for text in printed] == [0, 3, 5]
    assert outcome.rows[0] == ["line", "score", "id", "label", "text"]
    assert [row[0] for row in outcome.rows[1:]] == ["1", "3", "5", "7", "9"]
    found = [json.loads(line) for line in outcome.err.splitlines()]
    assert [(each["first"], each["count"]) for each in found] == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize(
    ("line", "fault", "code", "words"),
    [
        ("{", None, 2, "stdin:7: the line is not JSON"),
        ('{"text": "a", "ef": -1}', None, 2, "stdin:7: ef is -1; it must be at least 0"),
        ('{"text": "a"}', Fault(grpc.StatusCode.INTERNAL, "broken", "INTERNAL"), 1, "broken"),
        (
            '{"id": "z"}',
            Fault(grpc.StatusCode.NOT_FOUND, "there is no record 'z'; upsert it, or give another record in queries[1]"),
            4,
            "stdin:7: there is no record 'z'; upsert it, or give another id",
        ),
    ],
)
def test_an_error_in_a_later_batch_states_how_many_queries_are_answered(
    emberpc: Emberpc, fake: FakeServer, seas: str, line: str, fault: Fault | None, code: int, words: str
) -> None:
    fake.faults["Search"].extend([None, None, fault])
    queries = "\n" + '{"text": "azov"}\n' * 5 + f"{line}\n"
    outcome = emberpc("search", seas, "--file", "-", "-k", 1, "--json", "--batch-size", 2, stdin=queries)
    assert outcome.code == code
    assert outcome.err.startswith(f"error: {words}")
    assert outcome.err.endswith("; answered queries of stdin: 4, up to line 5\n")
    assert [hit["line"] for hit in outcome.objects] == [2, 3, 4, 5]


def test_only_one_batch_of_a_file_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(
        '{"text": "a"}\n{"text": "a", "top_k": 9000}\n' * 4 + f'{{"text": "{"x" * 9 * 2**20}"}}\n' * 2 + "{"
    )
    source = QueryFile(str(path))
    lines = []
    with pytest.raises(CliError, match=f"{path}:11: the line is not JSON"):
        for batch in source.batches(5, 10):
            assert len(source.lines) == len(batch)
            lines.append(list(source.lines))
    # The limits are 5 queries, 20,000 hits and 8 MiB.
    assert lines == [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10]]
    assert source.answered == 10


def test_errors_that_name_no_query_have_remedies_for_a_file(emberpc: Emberpc, fake: FakeServer, seas: str) -> None:
    query = '{"text": "a"}'
    needs = "the call needs about 40.0 s; give it a longer timeout, send fewer texts, or try again later"
    fake.faults["Search"].append(Fault(grpc.StatusCode.FAILED_PRECONDITION, needs, "DEADLINE_TOO_SOON"))
    outcome = emberpc("search", seas, "--file", "-", stdin=query)
    assert (outcome.code, "give a longer --timeout, a smaller --batch-size, or" in outcome.err) == (5, True)
    without = Fault(grpc.StatusCode.FAILED_PRECONDITION, "no model", "COLLECTION_WITHOUT_MODEL")
    fake.faults["Search"].append(without)
    outcome = emberpc("search", seas, "--file", "-", stdin=query)
    assert (outcome.code, "--mode lexical for a lexical search, or queries with vector or id" in outcome.err) == (
        5,
        True,
    )
    outcome = emberpc("search", seas, "a", "--batch-size", 3)
    assert (outcome.code, outcome.err) == (2, "error: --batch-size goes with --file; leave it out\n")


def test_too_many_conditions_in_one_request_are_divided_by_the_batch_size(
    emberpc: Emberpc, tiny_client: Client
) -> None:
    tiny_client.create_collection("c", model="tiny")
    tiny_client.upsert("c", [{"id": "a", "text": "a", "metadata": {"a": 1}}])
    queries = (json.dumps({"text": "a", "where": " and ".join(["a exists"] * 50)}) + "\n") * 50
    outcome = emberpc("search", "c", "--file", "-", stdin=queries)
    wanted = "where makes 2040 conditions in the request, which may have 2000; give a smaller --batch-size"
    assert (outcome.code, outcome.err) == (2, f"error: stdin:40: {wanted}\n")
    outcome = emberpc("search", "c", "--file", "-", "--json", "--batch-size", 39, "-k", 1, stdin=queries)
    assert (outcome.code, len(outcome.objects)) == (0, 50)


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
