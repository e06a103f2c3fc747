"""Commands with stdin, stdout or stderr closed, full, or a pipe without a reader; and options given twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emberpc.client import Client
from fake_server import FakeServer

Emberpc = Any
#: One call of each command that prints a result, with the fake server below.
PRINTING = [
    ["--help"],
    ["--version"],
    ["classify", "a"],
    ["classify", "a", "--json"],
    ["collection", "export", "c", "-o", "-"],
    ["collection", "list"],
    ["collection", "records", "c"],
    ["collection", "get", "c"],
    ["collection", "verify", "c"],
    ["config"],
    ["count-tokens", "a"],
    ["delete", "c", "none"],
    ["embed", "a"],
    ["embed", "--help"],
    ["get", "c", "a"],
    ["health"],
    ["models"],
    ["search", "c", "a"],
    ["similarity", "a", "b"],
    ["upsert", "c", "RECORDS"],
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment variables for commands that call a fake server with the collection c."""
    with FakeServer() as server:
        environment = {**os.environ, "EMBERPC_TARGET": server.target}
        environment.pop("PYTHONUNBUFFERED", None)
        records = tmp_path_factory.mktemp("records") / "r.csv"
        records.write_text("id,text\na,words\n")
        with Client(server.target) as client:
            client.create_collection("c")
            client.upsert("c", [{"id": "a", "text": "words"}])
        yield {**environment, "RECORDS": str(records)}


def in_shell(arguments: list[str], redirections: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command with redirections of a shell; return its exit code and its stderr."""
    words = [environment["RECORDS"] if word == "RECORDS" else word for word in arguments]
    found = subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, "-m", "emberpc.cli.main", *words],
        env=environment,
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (["--help"], ["--version"], ["upsert", "c", "RECORDS"])
        ),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("redirection", "problem"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_an_unwritable_stdout_gives_one_line_of_error(
    served: dict[str, str], arguments: list[str], redirection: str, problem: str
) -> None:
    code, err = in_shell(arguments, redirection, served)
    assert (code, err) == (2, f"error: stdout cannot be written: {problem}; send it elsewhere\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
@pytest.mark.parametrize("redirection", [">/dev/full", "<&- >&-"])
def test_each_command_reports_an_unwritable_stdout(
    served: dict[str, str], arguments: list[str], redirection: str
) -> None:
    code, err = in_shell(arguments, redirection, served)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: stdout cannot be written: ")
    assert "emberpc made an error" not in err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
@pytest.mark.parametrize("redirection", ["<&-", "2>&-", "> >(exec <&-)"])
def test_no_command_fails_if_stdin_or_stderr_is_closed(
    served: dict[str, str], arguments: list[str], redirection: str
) -> None:
    code, err = in_shell(arguments, redirection, served)
    assert code == 0
    assert "Traceback" not in err
    assert "error" not in err


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_the_exit_code_is_right_if_stderr_cannot_be_written(served: dict[str, str], redirection: str) -> None:
    assert in_shell(["search", "none", "a"], redirection, served) == (4, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["upsert", "c", "-"],
        ["embed", "--file", "-"],
    ],
    ids=" ".join,
)
def test_a_closed_stdin_gives_one_line_of_error(served: dict[str, str], arguments: list[str]) -> None:
    code, err = in_shell(arguments, "<&-", served)
    assert (code, err) == (2, "error: stdin cannot be read: Bad file descriptor\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *(pytest.param(each, marks=pytest.mark.slow) for each in (["embed", "--help"], ["--version"]))],
    ids=" ".join,
)
def test_help_into_a_pipe_without_a_reader_is_no_error(served: dict[str, str], arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-m", "emberpc.cli.main", *arguments],
        env=served,
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    os.close(writer)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["search", "c", "q", "--where", 'a = "b"', "--where", 'c = "d"'], "--where"),
        (["search", "c", "q", "-k", "1", "--top-k", "2"], "--top-k"),
        (["delete", "c", "--where", "a exists", "--where=b exists"], "--where"),
        (["collection", "create", "c", "--model", "m", "--model", "n"], "--model"),
        (["models", "--target", "a:1", "--target", "b:1"], "--target"),
        (["config", "--listen", "a:1", "--listen", "b:1"], "--listen"),
    ],
)
def test_an_option_with_one_value_is_refused_if_given_twice(
    emberpc: Emberpc, fake: FakeServer, arguments: list[str], option: str
) -> None:
    outcome = emberpc(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: Option '{option}' is given 2 times; give it once; see emberpc ")
    assert not fake.asked


def test_repeatable_options_and_flags_are_accepted_twice(emberpc: Emberpc, fake: FakeServer) -> None:
    arguments = ["--indexed-field", "a", "--indexed-field", "b", "--json", "--json"]
    assert emberpc("collection", "create", "c", *arguments).code == 0
    assert list(fake.asked["CreateCollection"][0].request.collection.indexed_fields) == ["a", "b"]


def test_a_vector_is_printed_whole_into_a_pipe(emberpc: Emberpc, fake: FakeServer) -> None:
    ((vector,),) = [row[1:] for row in emberpc("embed", "a").rows[1:]]
    assert [float(number) for number in vector.split(" ")] == emberpc("embed", "a", "--json").objects[0]["vector"]


def test_classify_prints_all_labels_into_a_pipe_unless_top_k_is_given(emberpc: Emberpc, fake: FakeServer) -> None:
    assert emberpc("classify", "a?").rows[1] == ["question", "question 0.75, statement 0.25", "a?"]
    assert emberpc("classify", "a?", "-k", "1").rows[1] == ["question", "question 0.75", "a?"]
    (whole,) = emberpc("classify", "a?", "--json").objects
    assert [score["label"] for score in whole["classification"]["scores"]] == ["question", "statement"]
    emberpc("classify", "a?", "--json", "-k", "1")
    assert [asked.request.top_k for asked in fake.asked["Classify"]] == [0, 1, 0, 1]


def test_debug_is_accepted_after_the_command(emberpc: Emberpc, fake: FakeServer) -> None:
    for arguments in (["search", "none", "q", "--debug"], ["search", "--debug", "none", "q"]):
        outcome = emberpc(*arguments)
        assert outcome.code == 4
        assert "Traceback" in outcome.err
        assert outcome.err.endswith("error: there is no collection 'none'\n")
    assert emberpc("embed", "--json", "--", "--debug").objects[0]["text"] == "--debug"


@pytest.mark.export
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "4", "--budget", "4,16"], "--budget has 4 twice"),
        (["--budget", "4,,16"], "--budget has an empty item"),
        (["--strategy", "linear", "--strategy", "linear"], "--strategy has linear twice"),
    ],
)
def test_repeated_and_empty_list_items_are_refused(
    emberpc: Emberpc, tmp_path: Path, arguments: list[str], words: str
) -> None:
    outcome = emberpc("compare", "--train", "t.csv", "--test", "t.csv", "-o", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert words in outcome.err


@pytest.mark.server
def test_a_port_in_use_gives_one_line_of_error(served: dict[str, str], tmp_path: Path) -> None:
    environment = {name: value for name, value in served.items() if not name.startswith("GRPC_")}
    address = environment["EMBERPC_TARGET"]
    code, err = in_shell(["serve", "--listen", address, "--data-dir", str(tmp_path)], "", environment)
    assert code == 2
    hint, err = err.split("\n", 1)
    assert hint.startswith("no model is served")
    assert err == (
        f"error: cannot listen on {address}: the port is in use, or this host has no such address; stop the other "
        "program, or choose another address with --listen HOST:PORT\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "r.csv",
            "id;text\na;b\n",
            "the columns seem to be separated by semicolons, but",
        ),
        ("r.tsv", "id,text\na,b\n", "the columns seem to be separated by commas, but"),
        ("r.csv", "id\ttext\na\tb\n", "the columns seem to be separated by tabs"),
    ],
)
def test_the_error_for_another_delimiter_names_the_delimiter(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, name: str, content: str, words: str
) -> None:
    emberpc("collection", "create", "c")
    (tmp_path / name).write_text(content)
    outcome = emberpc("upsert", "c", tmp_path / name)
    assert outcome.code == 2
    assert f"{name}:1: {words}" in outcome.err
