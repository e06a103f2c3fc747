"""Output of commands on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

import pytest
import typer

from emberpc.cli.main import main
from emberpc.client import Client
from fake_server import FakeServer


def on_terminal(
    *arguments: object, columns: int = 60, typed: str | None = None, stdout: TextIO | None = None, code: int = 0
) -> list[str]:
    """Run a command in this process on a terminal of its own, and check its exit code; return the lines that it wrote.

    `typed` is the input from the terminal; None: stdin is no terminal. `stdout` replaces the terminal as stdout.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        # Linux raises OSError when the other end is closed.
        with suppress(OSError):
            while piece := os.read(ours, 65536):
                written.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    try:
        reader.start()
        if typed is not None:
            os.write(ours, typed.encode())
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setenv("TERM", "xterm")
            patch.delenv("COLUMNS", raising=False)
            # The size of the terminal is that of the descriptors 0 to 2.
            for number in range(3):
                stack.callback(os.close, before := os.dup(number))
                stack.callback(os.dup2, before, number)
                os.dup2(theirs, number)
            stdin = stack.enter_context(open(os.devnull if typed is None else os.dup(theirs)))  # noqa: PTH123
            patch.setattr(sys, "stdin", stdin)
            for name in ("stdout", "stderr"):
                patch.setattr(sys, name, stack.enter_context(open(os.dup(theirs), "w")))  # noqa: PTH123
            if stdout is not None:
                patch.setattr(sys, "stdout", stdout)
            assert main([str(argument) for argument in arguments]) == code
    finally:
        os.close(theirs)
        reader.join(300)
        assert not reader.is_alive()
        os.close(ours)
    return b"".join(written).decode().splitlines()


@pytest.fixture
def collection(fake: FakeServer, tmp_path: Path) -> Path:
    """A file of records, all of which the collection c has."""
    records = [
        {"id": "short", "text": "a text"},
        {"id": "hostile", "text": "\x1b[2J[bold]x[/bold]\r\n\x07"},
        {"id": "wide", "text": "漢字" * 60},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with Client(fake.target) as client:
        client.create_collection("c")
        client.upsert("c", records)
    return path


def test_a_table_fits_the_terminal_and_shortens_only_long_texts(collection: Path) -> None:
    header, hostile, short, wide = on_terminal("collection", "records", "c", columns=50)
    assert header.split() == ["id", "label", "text"]
    assert short.split() == ["short", "a", "text"]
    assert wide.startswith("wide ")
    assert wide.endswith("…")
    # A Chinese character takes two cells.
    assert 48 <= len(wide) + wide.count("漢") + wide.count("字") <= 50
    assert hostile.endswith("�[2J[bold]x[/bold] �")


def test_a_narrow_terminal_still_shows_ids_and_scores(collection: Path) -> None:
    lines = on_terminal("search", "c", "a text", columns=30)
    assert lines[0].split() == ["score", "id", "text"]
    assert lines[1].split()[:2] == ["1.0000", "short"]


def test_hits_are_shown_with_their_labels_if_any_has_one(collection: Path, fake: FakeServer) -> None:
    with Client(fake.target) as client:
        client.upsert("c", [{"id": "short", "text": "a text", "label": "letters"}])
    lines = on_terminal("search", "c", "a text")
    assert lines[0].split() == ["score", "id", "label", "text"]
    assert lines[1].split()[:3] == ["1.0000", "short", "letters"]


def test_progress_is_shown_and_removed_at_the_end(collection: Path) -> None:
    lines = on_terminal("upsert", "c", collection)
    assert any("upserting" in line for line in lines)
    assert [line.split() for line in lines[-3:]][1:] == [["updated", "3"], ["sequence", "2"]]
    assert not any("embedding" in line for line in on_terminal("embed", "a"))


def test_a_search_for_queries_of_a_file_shows_hits_in_one_table(collection: Path, tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"text": "a text"}\n' * 3)
    lines = on_terminal("search", "c", "--file", path, "-k", 1, "--batch-size", 2)
    assert [line.split()[:3] for line in lines] == [
        ["line", "score", "id"],
        *([str(line), "1.0000", "short"] for line in (1, 2, 3)),
    ]


def test_a_search_for_queries_of_a_file_shows_progress_if_only_stderr_is_a_terminal(
    collection: Path, tmp_path: Path, fake: FakeServer
) -> None:
    path, output = tmp_path / "queries.jsonl", tmp_path / "hits.jsonl"
    path.write_text('{"text": "a text"}\n' * 3)
    with output.open("w") as stdout:
        lines = on_terminal("search", "c", "--file", path, "-k", 1, "--batch-size", 2, "--json", stdout=stdout)
    assert any("searching" in line for line in lines)
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_that_ascii_cannot_encode_is_replaced_or_escaped(collection: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "emberpc.cli.main", "get", "c", "wide", *flags]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    outcome = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
    if flags:
        assert json.loads(outcome.stdout)["text"] == "漢字" * 60
    else:
        assert "??" in outcome.stdout


@pytest.mark.parametrize(("typed", "there"), [("n\n", True), ("\n", True), ("\x04", True), ("y\n", False)])
def test_deleting_a_collection_asks_for_confirmation_on_a_terminal(
    collection: Path, fake: FakeServer, typed: str, there: bool
) -> None:
    lines = on_terminal("collection", "delete", "c", typed=typed, code=1 if there else 0)
    assert any("delete the collection c with 3 records? [y/N]" in line for line in lines)
    assert not any("error" in line for line in lines)
    assert ("c" in fake.collections) == there
    # The terminal may echo the answer, which then ends the line of the question.
    assert lines[-1].endswith("nothing deleted" if there else "deleted the collection c")


def test_ctrl_c_at_the_confirmation_deletes_nothing(
    collection: Path, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        abort = typer.Abort()
        abort.__context__ = KeyboardInterrupt()  # as of the error that `typer.confirm` raises
        raise abort

    monkeypatch.setattr(typer, "confirm", interrupted)
    assert on_terminal("collection", "delete", "c", typed="", code=130)[-1].endswith("interrupted")
    assert "c" in fake.collections


@pytest.mark.parametrize("flags", [["--yes"], ["-y"]])
def test_deleting_a_collection_with_yes_asks_no_confirmation(
    collection: Path, fake: FakeServer, flags: list[str]
) -> None:
    lines = on_terminal("collection", "delete", "c", *flags, typed="n\n")
    # The terminal echoes the typed line, which no command reads, before or after the output.
    assert [line for line in lines if line != "n"] == ["deleted the collection c"]
    assert "c" not in fake.collections


def test_deleting_a_collection_in_a_script_asks_no_confirmation(collection: Path, fake: FakeServer) -> None:
    assert on_terminal("collection", "delete", "c") == ["deleted the collection c"]
