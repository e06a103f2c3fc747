"""Every field of the API that the server serves can be set or read with the command line."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api_fields import WHERE, fields_of, methods, set_fields
from filled_server import FilledServer

Emberpc = Callable[..., Any]
Command = tuple[object, ...]

_PAGES = "decides only how many requests a list takes; a command reads all pages, or as many records as --limit states"
_OUTPUT = "output only: the server ignores it in requests"
#: Fields of requests that no command sets, and why.
UNSET = {
    "ClassifyRequest.nearest_examples": "no server has classifiers made from examples yet",
    **dict.fromkeys(
        [
            f"{kind}Request.page_size"
            for kind in ("FindDuplicates", "ListClassifiers", "ListCollections", "ListModels", "ListRecords")
        ],
        _PAGES,
    ),
    **dict.fromkeys(
        [
            *(f"Record.{field}" for field in ("revision", "create_time", "update_time")),
            *(
                f"Collection.{field}"
                for field in ("model_fingerprint", "record_count", "create_time", "sequence", "size_bytes", "problem")
            ),
            "Collection.reembedding",
            *(f"Reembedding.{field}" for field in ("model", "done", "total", "start_time", "problem")),
        ],
        _OUTPUT,
    ),
}
#: Fields of responses that no command shows, and why.
UNSHOWN = {
    "Classification.nearest_examples": "no server has classifiers made from examples yet",
    **dict.fromkeys(
        [f"NearestExample.{field}" for field in ("record_id", "label", "text", "score")],
        "no server has classifiers made from examples yet",
    ),
    "ComputeSimilarityResponse.rows": "the command has one source",
    "ComputeSimilarityResponse.columns": "the number of targets, which are arguments",
    "UpsertRecordsStreamResponse.batch_number": "the client matches the response with its request",
    "UpsertRecordsStreamResponse.model_fingerprint": "the client compares it when it opens a stream again",
    "VerifyCollectionResponse.total_count": "the progress bar has the number of records of GetCollection",
    "VerifyCollectionResponse.done": "the end of the command states the same",
    "BackupCollectionResponse.total_bytes": "the end of the progress bar, on a terminal only",
    "ErrorStatus.details": "packed messages; test_error_messages.py reads them",
}


def commands(folder: Path) -> Iterator[Command]:
    """Yield commands that together have every option which sets a field, and print every kind of response."""
    record = {"id": "a", "text": "t", "metadata": {"k": "v"}, "label": "l", "time_to_live": 1, "revision": 1}
    for name, lines in {
        "texts.txt": ["t", "u"],
        "records.jsonl": [json.dumps({**record, "vector": [1.0, 2.0]})],
        "two.jsonl": [json.dumps(record), json.dumps({**record, "id": "b"})],
        "query.jsonl": [json.dumps({"text": "q", "where": WHERE, "top_k": 1, "ef": 1})],
        "vector.jsonl": [json.dumps({"vector": [1.0, 2.0]})],
        "backup": ["x"],
    }.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    texts = ("--model", "m", "--truncation", "end", "--details", "--json")
    purpose = ("--input-kind", "query", "--dimensions", 2)
    embedding = (*texts, *purpose, "--dtype", "int8", "--normalize", "--priority", "bulk")
    yield ("embed", "t", *embedding)
    yield ("embed", "--file", folder / "texts.txt", "--stream", *embedding)
    yield ("count-tokens", "t", "--model", "m", "--input-kind", "query", "--details", "--json")
    yield ("similarity", "s", "t", *texts, "--source-kind", "query", "--target-kind", "query")
    yield ("classify", "t", *texts, "-k", 1, "--priority", "bulk")
    create = ("--dimensions", 2, "--distance", "euclidean", "--m", 4, "--ef-construction", 16, "--indexed-field", "f")
    yield ("collection", "create", "c", "--model", "m", "--truncation", "end", *create)
    yield ("collection", "list", "--json")
    yield ("collection", "get", "c", "--json")
    yield ("collection", "update", "c", "--truncation", "end")
    yield ("collection", "delete", "c", "--yes")
    yield ("collection", "reembed", "c", "--model", "m", "--dimensions", 2, "--no-wait")
    yield ("collection", "reembed", "c", "--cancel")
    yield ("collection", "verify", "c", "--full", "--json")
    yield ("collection", "records", "c", "--where", WHERE, "--vectors", "--json", "--limit", 0)
    yield ("collection", "count", "c", "--where", WHERE)
    yield ("collection", "duplicates", "c", "--min-score", 0.5, "--json")
    yield ("collection", "clusters", "c", "-k", 2, "--examples", 1, "--json")
    yield ("collection", "backup", "c", "-o", folder / "new", "--overwrite")
    yield ("collection", "restore", "c", folder / "backup", "--json")
    write = ("--truncation", "end", "--details", "--json")
    yield ("upsert", "c", folder / "records.jsonl", "--check-revisions", *write)
    yield ("upsert", "c", folder / "two.jsonl", "--stream", *write)
    yield ("upsert", "c", folder / "records.jsonl", "--stream", *write)
    yield ("get", "c", "a", "--vectors", "--details", "--json")
    yield ("delete", "c", "a", "--details")
    yield ("delete", "c", "--where", WHERE, "--details")
    urgency = ("--truncation", "start", "--priority", "bulk")
    search = ("-k", 2, "--where", WHERE, *urgency, "--vectors", "--plan", "--details", "--json")
    hybrid = ("--mode", "hybrid", "--dense-weight", 0.25, "--fusion", "ranks")
    yield ("search", "c", "q", "--ef", 1, *hybrid, *search)
    yield ("search", "c", "--id", "a", "--min-recall", 0.5, *search)
    yield ("search", "c", "--file", folder / "query.jsonl", *search)
    yield ("search", "c", "--file", folder / "vector.jsonl", *search)
    yield ("models", "show", "--json")
    yield ("models", "show", "m", "--json")
    yield ("models", "classifiers", "--json")
    yield ("models", "classifiers", "c", "--json")
    yield ("models", "load", "m", "p", "--variant", "v", "--json")
    yield ("models", "reload", "m", "p", "--variant", "v", "--json")
    yield ("models", "unload", "m")
    yield ("info", "--json")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FilledServer]:
    with FilledServer() as running:
        monkeypatch.setenv("EMBERPC_TARGET", running.target)
        yield running


def test_every_field_of_a_request_is_set_by_a_command(emberpc: Emberpc, server: FilledServer, tmp_path: Path) -> None:
    for command in commands(tmp_path):
        outcome = emberpc(*command)
        assert "made an error" not in outcome.err, command
    wanted: set[str] = set()
    for method in methods():
        fields_of(method.input_type, wanted)
    reached = {name for _, request in server.asked for name in set_fields(request)}
    assert wanted - reached == set(UNSET)


def test_every_field_of_a_response_changes_the_output_of_a_command(
    emberpc: Emberpc, server: FilledServer, tmp_path: Path
) -> None:
    every = list(commands(tmp_path))
    complete = [emberpc(*command) for command in every]
    #: Commands whose responses may have a field, by the name of the field.
    users: dict[str, list[int]] = defaultdict(list)
    for i, command in enumerate(every):
        server.asked.clear()
        assert emberpc(*command) == complete[i], command
        fields: set[str] = set()
        for method, _ in server.asked:
            fields |= fields_of(method.output_type, set())
        for name in fields:
            users[name].append(i)
    assert users.keys() == {name for method in methods() for name in fields_of(method.output_type, set())}

    def shown(name: str) -> bool:
        server.without = name
        return any(emberpc(*every[i]) != complete[i] for i in users[name])

    missed = {name for name in users if name != "UpsertRecordsStreamResponse.batch_number" and not shown(name)}
    assert missed | {"UpsertRecordsStreamResponse.batch_number"} == set(UNSHOWN)
