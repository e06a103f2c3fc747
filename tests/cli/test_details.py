"""Labels of hits and details of responses in the output of commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emberpc.client import Client
from fake_server import FakeServer

Emberpc = Callable[..., Any]


@pytest.fixture
def books(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> Path:
    """A file of three records, all of which the collection `books` has."""
    texts = {"a": "a whale", "b": "two cities", "c": "an island"}
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()))
    assert emberpc("collection", "create", "books", "--model", "canned").code == 0
    assert emberpc("upsert", "books", path).code == 0
    return path


def test_search_shows_the_labels_of_the_hits(emberpc: Emberpc, fake: FakeServer, books: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("id,text,label\nd,an island,geography\n")
    assert emberpc("upsert", "books", labelled).code == 0
    rows = emberpc("search", "books", "an island").rows
    assert {tuple(row[1:3]) for row in rows[1:3]} == {("c", ""), ("d", "geography")}


@pytest.mark.parametrize(
    "command",
    [
        ("embed", "a text"),
        ("classify", "a text"),
        ("count-tokens", "a text"),
        ("similarity", "a text", "another"),
        ("search", "books", "an island"),
        ("get", "books", "a"),
        ("delete", "books", "zz"),
    ],
)
def test_details_of_responses_are_printed_to_stderr(
    emberpc: Emberpc, fake: FakeServer, books: Path, command: tuple[str, ...]
) -> None:
    plain = emberpc(*command, "--json")
    outcome = emberpc(*command, "--json", "--details")
    (details,) = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert details["first"] == 0
    assert outcome.out == plain.out


def test_details_of_a_write_state_its_durability(emberpc: Emberpc, fake: FakeServer, books: Path) -> None:
    outcome = emberpc("upsert", "books", books, "--batch-size", 2, "--details")
    found = [json.loads(line) for line in outcome.err.splitlines()]
    assert [(each["first"], each["count"]) for each in found] == [(0, 2), (2, 1)]
    assert all("durability" in each and "sequence" in each for each in found)


def test_details_of_a_stream_of_texts_are_printed_for_each_text(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    plain = emberpc("embed", "--file", "-", "--stream", "--json", stdin="one\nbad\ntwo words\n")
    outcome = emberpc("embed", "--file", "-", "--stream", "--json", "--details", stdin="one\nbad\ntwo words\n")
    assert outcome.out == plain.out
    found = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert {each["first"]: (each["count"], each["usages"]) for each in found} == {
        0: (1, [{"tokens": 3, "truncated": False}]),
        2: (1, [{"tokens": 4, "truncated": False}]),
    }
    assert {each["model"]["name"] for each in found} == {"canned"}
    # A stream does not state times.
    assert not any("timings" in each for each in found)


def test_details_of_a_stream_of_records_are_printed_for_each_write(emberpc: Emberpc, tiny_client: Client) -> None:
    tiny_client.create_collection("c", model="tiny")
    texts = ["one", "two", "three", " ", "five"]
    lines = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    outcome = emberpc("upsert", "c", "-", "--stream", "--batch-size", 2, "--details", stdin=lines)
    assert "stdin:4: text" in outcome.err
    found = [json.loads(line) for line in outcome.err.splitlines() if line.startswith("{")]
    assert [(each["first"], each["count"], each["durability"]) for each in found] == [
        (0, 2, "synced"),
        (2, 2, "synced"),
        (4, 1, "synced"),
    ]
    sequences = [each["sequence"] for each in found]
    assert sequences == sorted(set(sequences))
