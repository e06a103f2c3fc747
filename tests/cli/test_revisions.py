"""Options that reach fields of the API: expected revisions of `upsert`, and the plan of `search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emberpc.client import Client
from fake_server import FakeServer

Emberpc = Any


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t", "revision": 7}\n\n{"id": "b", "text": "u", "revision": 0}\n')
    return path


def test_check_revisions_sends_the_revision_of_each_record(emberpc: Emberpc, fake: FakeServer, records: Path) -> None:
    emberpc("collection", "create", "c")
    assert emberpc("upsert", "c", records, "--check-revisions", "--batch-size", 1).code == 0
    assert [list(asked.request.expected_revisions) for asked in fake.asked["UpsertRecords"]] == [[7], [0]]
    assert emberpc("upsert", "c", records).code == 0
    assert list(fake.asked["UpsertRecords"][-1].request.expected_revisions) == []


@pytest.mark.parametrize(
    ("revision", "shown"), [("", "missing"), (', "revision": -1', "-1"), (', "revision": true', "True")]
)
def test_the_error_for_a_record_without_a_valid_revision_names_its_line(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, revision: str, shown: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"id": "a", "text": "t", "revision": 1}}\n{{"id": "b", "text": "t"{revision}}}\n')
    outcome = emberpc("upsert", "c", path, "--check-revisions")
    assert outcome.code == 2
    assert f"{path}:2: revision is {shown}; it must be a whole number" in outcome.err
    assert fake.asked["UpsertRecords"] == []


def test_check_revisions_is_refused_for_tables_and_streams(
    emberpc: Emberpc, fake: FakeServer, records: Path, tmp_path: Path
) -> None:
    table = tmp_path / "r.csv"
    table.write_text("id,revision\na,1\n")
    outcome = emberpc("upsert", "c", table, "--check-revisions")
    assert (outcome.code, "is for JSON Lines" in outcome.err) == (2, True)
    outcome = emberpc("upsert", "c", records, "--check-revisions", "--stream")
    assert (outcome.code, "--stream" in outcome.err) == (2, True)


def test_listed_records_are_written_back_only_if_they_did_not_change(
    emberpc: Emberpc, tiny_client: Client, tmp_path: Path
) -> None:
    tiny_client.create_collection("c", model="tiny")
    tiny_client.upsert("c", [{"id": "a", "text": "first"}])
    path = tmp_path / "r.jsonl"
    path.write_text(emberpc("collection", "records", "c", "--json").out)
    assert json.loads(path.read_text())["revision"] > 0
    assert emberpc("upsert", "c", path, "--check-revisions").code == 0
    outcome = emberpc("upsert", "c", path, "--check-revisions")
    assert outcome.code == 5
    assert "record 'a' has revision" in outcome.err


def test_search_prints_its_plan(emberpc: Emberpc, fake: FakeServer) -> None:
    emberpc("collection", "create", "c")
    emberpc("upsert", "c", "-", stdin='{"id": "a", "text": "t"}\n')
    assert "plan: " not in emberpc("search", "c", "t").err
    outcome = emberpc("search", "c", "t", "--plan")
    assert outcome.code == 0
    assert "plan: strategy " in outcome.err
    assert ", ef " in outcome.err
