"""The command line, run in this process against a fake server or a server of tiny models."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from emberpc.cli.main import main
from emberpc.client import Client
from examples.server_process import ServerProcess
from fake_server import FakeServer


@dataclass
class Outcome:
    """Exit code and outputs of a command."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        """The objects of the JSON Lines on stdout."""
        # Not `splitlines`, which also ends a line at characters that JSON need not escape.
        return [json.loads(line) for line in self.out.split("\n") if line]

    @property
    def rows(self) -> list[list[str]]:
        """The cells of the table on stdout, by line."""
        return [line.split("\t") for line in self.out.splitlines()]


Emberpc = Callable[..., Outcome]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as server:
        monkeypatch.setenv("EMBERPC_TARGET", server.target)
        yield server


@pytest.fixture
def emberpc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Emberpc:
    """Runs `emberpc ARGUMENTS`."""

    def run(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Set Python's default handler of SIGINT during a test. Tests in the background ignore SIGINT otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def tiny_client(tiny_server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client of `tiny_server`, which the commands call too; all its collections are deleted afterwards."""
    monkeypatch.setenv("EMBERPC_TARGET", tiny_server.address)
    with Client(tiny_server.address) as connected:
        yield connected
        for collection in connected.collections():
            connected.delete_collection(collection.name)
