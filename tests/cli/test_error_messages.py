"""Errors name options of the command line and state the next step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.cli import progress
from emberpc.cli.error_messages import in_cli_terms
from emberpc.client import Client, types
from fake_server import FakeServer, Fault

Emberpc = Any
LONG = "has 600 tokens, the model takes at most 512; shorten it, or set the call's `truncation` to 'end' or 'start'"


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("texts[0] is empty", "text 1 is empty"),
        ("targets[2] is empty", "target 3 is empty"),
        (
            "queries[0].text is empty; give it some text, or search by a vector or a record id",
            "the query is empty; give it some text, or --id ID",
        ),
        ("sources[0] is empty; leave it out or give it some text", "the source is empty; give it some text"),
        (
            "there is no record 'a'; upsert it, or give another record in queries[0]",
            "there is no record 'a'; upsert it, or give another --id",
        ),
        ("name is 'my notes'; use 1 to 128 letters", "the name is 'my notes'; use 1 to 128 letters"),
        ("min_recall is given beside ef; give one", "--min-recall is given beside --ef; give one"),
        (
            "dense_weight is set, but only 'hybrid' search uses it; leave it out, or set mode to 'hybrid'",
            "--mode hybrid",
        ),
        ("target is 'a:0'; its port must be 1 to 65535", "--target is 'a:0'; its port must be"),
        ("the row is damaged; see what `verify_collection` finds", "see what `emberpc collection verify` finds"),
        (
            "dimensions is 9; model 'm' gives vectors of 8 dimensions, and 0 means 8",
            "dimensions, and without --dimensions 8",
        ),
        (f"texts[1] {LONG}", "text 2 has 600 tokens, the model takes at most 512; shorten it, or give --truncation"),
        (
            "there is no collection 'c'; create it, or list the collections to find the name of another",
            "`emberpc collection create NAME --model MODEL`",
        ),
        (
            "dimensions is needed without a model; name a model, or give 1 to 16000",
            "--dimensions is needed without a model; give --model NAME or, for vectors only, --dimensions 1 to 16000",
        ),
        ("top_k is 100000; it must be 1 to 10000", "--top-k is 100000; it must be 1 to 10000"),
        (
            "no emberpc server answers at x; start a server there or give the address of another server, and check",
            "or give the address of another server with --target HOST:PORT, and check",
        ),
        ("ef_construction is 3", "--ef-construction is 3"),
        ("where, column 4: expected a value; found the end", "--where, column 4: expected a value; found the end"),
        ("filter has no condition; set one", "--where has no condition; set one"),
        ("filter.all.filters[3].prefix is empty; give", "--where: all.filters[3].prefix is empty; give"),
        ("filters are hard", "filters are hard"),
        (
            "the response is too large; ask for fewer hits, or fewer parts of the records",
            "the response is too large; give a smaller --top-k, or leave out --vectors",
        ),
        ("model is empty, and there are several", "--model is empty, and there are several"),
        (
            "no response; give a longer timeout, or send less at once",
            "no response; give a longer --timeout, or fewer text",
        ),
        ("there is no model 'texts[0]: x'; model: y", "there is no model 'texts[0]: x'; model: y"),
    ],
)
def test_fields_in_server_errors_are_replaced_by_options_and_arguments(message: str, wanted: str) -> None:
    assert wanted in in_cli_terms(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["embed", "x", "--server", "a"],
            "No such option: --server; the address of the server is --target HOST:PORT",
        ),
        (["search", "c", "x", "--port", "1"], "No such option: --port; the address of the server is --target"),
        (["serve", "--port", "1"], "No such option: --port; the address of the server is --listen HOST:PORT"),
        (["export", "embedding", "x", "--url", "y"], "No such option: --url; see emberpc export embedding --help"),
        (["serach"], "No such command 'serach'. Did you mean 'search'? See emberpc --help"),
        (["search", "c", "x", "--mode", "hybird"], "Invalid value for '--mode': 'hybird' is not one of 'dense', "),
    ],
)
def test_a_mistyped_option_or_command_is_refused_with_a_hint(
    emberpc: Emberpc, arguments: list[str], message: str
) -> None:
    outcome = emberpc(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("command", "method", "remedy"),
    [
        (["upsert", "c", "FILE"], "UpsertRecords", "give a longer --timeout, a smaller --batch-size, or try again"),
        (["embed", "a text"], "Embed", "give a longer --timeout, a smaller --batch-size, or try again"),
        (["search", "c", "a text"], "Search", "give a longer --timeout, fewer texts in one request, or try again"),
    ],
)
def test_an_error_about_the_deadline_names_options_to_change(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, command: list[str], method: str, remedy: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t"}\n')
    assert emberpc("collection", "create", "c", "--model", "canned").code == 0
    needs = "the call needs about 40.0 s; give it a longer timeout, send fewer texts, or try again later"
    fake.faults[method].append(Fault(grpc.StatusCode.FAILED_PRECONDITION, needs, "DEADLINE_TOO_SOON"))
    outcome = emberpc(*[path if word == "FILE" else word for word in command])
    assert outcome.code == 5
    assert remedy in outcome.err


def test_a_timeout_error_names_options_to_change(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t"}\n')
    assert emberpc("collection", "create", "c", "--model", "canned").code == 0
    done = threading.Event()
    fake.hooks["UpsertRecords"] = lambda _: done.wait(300)
    try:
        outcome = emberpc("upsert", "c", path, "--timeout", "0.2")
    finally:
        done.set()
    assert outcome.code == 3
    assert "within 0.2 s; give a longer --timeout, or a smaller --batch-size" in outcome.err


def test_upsert_sends_at_most_64_records_in_a_request(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text\n" + "".join(f"text {i}\n" for i in range(65)))
    assert emberpc("collection", "create", "c", "--model", "canned").code == 0
    assert emberpc("upsert", "c", path).code == 0
    assert [len(asked.request.records) for asked in fake.asked["UpsertRecords"]] == [64, 1]
    assert emberpc("upsert", "c", path).code == 0
    with Client(fake.target) as client:
        assert client.count("c") == 65


@pytest.mark.parametrize("stream", [[], ["--stream"]])
@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ([0, 0], "vector has length zero, so no direction for cosine; give a vector that is not all zeros"),
        ([1e20, 0], "vector is longer than 1e+14; scale the vectors down"),
        ([1, 2, 3], "vector has 3 dimensions, the collection has 2; give a vector of 2 dimensions"),
    ],
)
def test_the_error_for_a_vector_names_its_line_and_the_remedy(
    emberpc: Emberpc, tiny_client: Client, stream: list[str], vector: list[float], words: str
) -> None:
    tiny_client.create_collection("c", dimensions=2)
    good = [json.dumps({"id": str(i), "vector": [1, i]}) for i in range(2)]
    records = "\n".join([*good, "", json.dumps({"id": "bad", "vector": vector})])
    outcome = emberpc("upsert", "c", "-", "--batch-size", 2, *stream, stdin=records)
    assert outcome.code == 2
    assert f"stdin:4: {words}" in outcome.err
    assert "vectors[" not in outcome.err
    assert tiny_client.count("c") == 2


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_error_for_an_over_long_record_names_the_setting_of_the_collection(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, stream: list[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t"}\n')
    assert emberpc("collection", "create", "c", "--model", "canned").code == 0
    if not stream:
        fault = Fault(grpc.StatusCode.INVALID_ARGUMENT, f"records[0].text: {LONG}", "TOO_LONG")
        fake.faults["UpsertRecords"].append(fault)
        outcome = emberpc("upsert", "c", path)
        assert outcome.code == 2
        assert f"{path}:1: " in outcome.err
        assert "`emberpc collection update c --truncation end` sets it for all writes" in outcome.err
    assert "`emberpc collection update c --truncation end`" in in_cli_terms(LONG, "c")


def test_the_error_for_a_text_query_without_a_model_names_other_kinds_of_queries(
    emberpc: Emberpc, fake: FakeServer
) -> None:
    fake.faults["Search"].append(
        Fault(grpc.StatusCode.FAILED_PRECONDITION, "no model; give vectors", "COLLECTION_WITHOUT_MODEL")
    )
    outcome = emberpc("search", "c", "a query")
    assert outcome.code == 5
    assert "give --mode lexical for a lexical search, or --id ID" in outcome.err
    assert "give vectors" not in outcome.err


def test_classify_accepts_the_option_model_for_the_classifier(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("classify", "x?", "--model", "kinds").code == 0
    assert emberpc("classify", "x?", "--classifier", "kinds").code == 0
    assert [asked.request.classifier for asked in fake.asked["Classify"]] == ["kinds", "kinds"]


def test_count_tokens_leaves_the_choice_of_the_model_to_the_server(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("count-tokens", "a b").code == 0
    assert emberpc("count-tokens", "a b", "--model", "kinds").code == 0
    # The server chooses its only embedding model for an empty name.
    assert [asked.request.model for asked in fake.asked["CountTokens"]] == ["", "kinds"]
    assert "ListModels" not in fake.asked


def test_clusters_are_printed_with_numbers(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, fake: FakeServer) -> None:
    def clusters(*_: Any, **__: Any) -> list[types.Cluster]:
        records = [types.Record(letter, f"text {letter}") for letter in "abc"]
        return [types.Cluster(5, tuple(records[:2])), types.Cluster(1, tuple(records[2:]))]

    monkeypatch.setattr(Client, "clusters", clusters)
    outcome = emberpc("collection", "clusters", "c", "-k", "3")
    assert outcome.rows == [
        ["cluster", "records", "id", "text"],
        ["1", "5", "a", "text a"],
        ["1", "", "b", "text b"],
        ["2", "1", "c", "text c"],
    ]
    assert outcome.err == "2 of 3 clusters: c has no more different records\n"


def test_create_with_exist_ok_accepts_an_existing_collection_of_the_same_model(
    emberpc: Emberpc, fake: FakeServer
) -> None:
    for code in (0, 0):
        assert emberpc("collection", "create", "c", "--model", "canned", "--exist-ok").code == code
    assert emberpc("collection", "create", "c", "--model", "canned").code == 5
    other = emberpc("collection", "create", "c", "--model", "other", "--exist-ok")
    assert other.code == 5
    assert "its model is 'canned', not 'other'" in other.err


def test_import_of_texts_into_a_collection_without_a_model_prints_a_hint(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "text": "t", "vector": [1, 2, 3, 4, 5, 6, 7, 8]}\n')
    outcome = emberpc("collection", "import", "c", path, "--create")
    assert "created the collection c: vectors only" in outcome.err
    assert "c has no model" in outcome.err
    assert "--create --model NAME" in outcome.err
    assert emberpc("collection", "import", "d", path, "--create", "--model", "canned").err.count("has no model") == 0


@pytest.mark.parametrize("listen", ["1.2.3.4:99999", "[::1]:65536"])
def test_a_port_out_of_range_is_named_in_the_error(emberpc: Emberpc, listen: str) -> None:
    outcome = emberpc("config", "--listen", listen)
    assert outcome.code == 2
    assert "the port must be 0 to 65535" in outcome.err


@pytest.mark.parametrize(("words", "wanted"), [("emberpc coll", "collection"), ("emberpc collection del", "delete")])
def test_completion_completes_command_names(words: str, wanted: str) -> None:
    environment = {
        **os.environ,
        "_EMBERPC_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-m", "emberpc.cli.main"]
    outcome = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
    assert outcome.stdout.split() == [wanted]


def test_the_help_lists_the_option_install_completion(emberpc: Emberpc) -> None:
    outcome = emberpc("--help")
    assert "--install-completion" in outcome.out
    assert "--install-completion" not in emberpc("search", "--help").out


@pytest.mark.parametrize("form", [["--install-completion", "zsh"], ["--install-completion=zsh"]])
def test_completion_is_installed_for_the_given_shell(
    emberpc: Emberpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = emberpc(*form)
    assert outcome.code == 0
    assert outcome.out.startswith(f"zsh completion installed in {tmp_path}/.zfunc/_emberpc; ")
    assert "compdef" in (tmp_path / ".zfunc" / "_emberpc").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".zfunc", ".zshrc"]


def test_a_failed_installation_of_completion_is_an_input_error(
    emberpc: Emberpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outcome = emberpc("--install-completion", "zsh")
    assert outcome.code == 2
    assert "the completion cannot be installed: " in outcome.err
    assert "home" in outcome.err


def test_completion_is_printed_for_the_given_shell(emberpc: Emberpc) -> None:
    assert "complete --command emberpc" in emberpc("--show-completion", "fish").out
    outcome = emberpc("--show-completion", "csh")
    assert outcome.code == 2
    assert "there is no completion for the shell 'csh'; give one of bash, zsh, fish" in outcome.err


def test_a_long_stage_prints_its_progress_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    lines = progress._Lines()
    for done in range(131):
        lines.report("embedding", done * 10, 5403, "4 s left")
        lines._print_if_due()
        now += 1
    lines.report("checking", 0, 1)
    now += 10
    lines._print_if_due()
    assert capsys.readouterr().err.splitlines() == [
        "embedding … 0 of 5,403, 4 s left",
        "embedding … 100 of 5,403, 4 s left (10 s)",
        "embedding … 300 of 5,403, 4 s left (30 s)",
        "embedding … 700 of 5,403, 4 s left (70 s)",
        "embedding … 1,300 of 5,403, 4 s left (130 s)",
        "checking …",
        "checking … (10 s)",
    ]


def test_a_stage_that_reports_nothing_is_still_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    second = threading.Event()

    def note(line: str) -> None:
        reported.append(line)
        if len(reported) == 2:
            second.set()

    monkeypatch.setattr(progress, "note", note)
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.01)
    with progress.stages() as show:
        show("converting", 0, 1)
        assert second.wait(300)
    assert reported[0] == "converting …"
    assert reported[1].startswith("converting … (")
