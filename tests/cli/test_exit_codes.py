"""The exit code and the line on stderr for each kind of failure."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.cli import app, interrupts
from emberpc.cli import main as main_module
from emberpc.cli.errors import ExitCode
from fake_server import FakeServer, Fault

Emberpc = Any


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 3),
        (grpc.StatusCode.NOT_FOUND, 4),
        (grpc.StatusCode.ALREADY_EXISTS, 5),
        (grpc.StatusCode.FAILED_PRECONDITION, 5),
        (grpc.StatusCode.ABORTED, 5),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 6),
        (grpc.StatusCode.UNAUTHENTICATED, 6),
        (grpc.StatusCode.PERMISSION_DENIED, 6),
        (grpc.StatusCode.INTERNAL, 1),
        (grpc.StatusCode.UNIMPLEMENTED, 1),
        (grpc.StatusCode.DATA_LOSS, 1),
    ],
)
def test_each_status_of_the_server_has_its_exit_code(
    emberpc: Emberpc, fake: FakeServer, status: grpc.StatusCode, code: int
) -> None:
    fake.faults["ListModels"].append(Fault(status, "it went\nwrong; do this", "REASON"))
    outcome = emberpc("models", "--json")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", "error: it went wrong; do this\n")


def test_an_unreachable_server_gives_exit_code_3(emberpc: Emberpc) -> None:
    with FakeServer() as gone:
        pass
    outcome = emberpc("models", "--target", gone.target)
    assert outcome.code == 3
    assert outcome.err.startswith(f"error: no emberpc server answers at {gone.target}; ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command 'nonsense'; see emberpc --help"),
        (["models", "--nonsense"], "No such option: --nonsense; see emberpc models show --help"),
        (["search"], "Missing argument 'COLLECTION'; see emberpc search --help"),
        (["search", "c", "q", "-k", "0"], "see emberpc search --help"),
        (["collection", "create", "c", "--distance", "manhattan"], "see emberpc collection create --help"),
        (["upsert", "c", "no-such-file.jsonl"], "no-such-file.jsonl cannot be read: No such file or directory"),
        (["upsert", "c", "data.xlsx"], "data.xlsx: cannot tell what it holds by its name"),
        (["embed", "a\udce9"], "error: text 1 holds a lone surrogate"),
        (["models", "--timeout", "0"], "error: --timeout is 0 seconds"),
    ],
)
def test_wrong_usage_gives_exit_code_2_and_one_line(
    emberpc: Emberpc, fake: FakeServer, arguments: list[str], words: str
) -> None:
    outcome = emberpc(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not fake.asked


@pytest.mark.parametrize("arguments", [[], ["collection"]])
def test_no_command_shows_the_help(emberpc: Emberpc, arguments: list[str]) -> None:
    outcome = emberpc(*arguments)
    assert outcome.code == 2
    assert "Usage:" in outcome.out + outcome.err
    assert "error" not in outcome.err


def test_the_help_lists_the_exit_codes(emberpc: Emberpc) -> None:
    outcome = emberpc("--help")
    assert outcome.code == 0
    shown = " ".join(outcome.out.split())
    for code in ExitCode:
        assert f"{int(code)} " in shown.partition("Exit codes:")[2]
        assert f"| {int(code)} |" in str(main_module.__doc__)


def test_the_version_is_that_of_the_package(emberpc: Emberpc) -> None:
    from importlib.metadata import version

    assert emberpc("--version").out == f"emberpc {version('emberpc')}\n"


def test_debug_prints_the_traceback_of_an_error(
    emberpc: Emberpc, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Traceback" not in emberpc("search", "none", "q").err
    outcome = emberpc("--debug", "search", "none", "q")
    assert outcome.code == 4
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: there is no collection 'none'\n")
    assert "Traceback" not in emberpc("search", "none", "q").err
    monkeypatch.setenv("EMBERPC_DEBUG", "1")
    assert "Traceback" in emberpc("search", "none", "q").err


def test_an_internal_error_prints_no_traceback_without_debug(
    emberpc: Emberpc, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emberpc.client import Client

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(Client, "models", broken)
    outcome = emberpc("models")
    assert (outcome.code, outcome.err) == (1, "error: emberpc made an error (KeyError); see it with --debug\n")


def test_an_error_that_ctrl_c_causes_in_a_library_gives_exit_code_130(
    emberpc: Emberpc, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emberpc.client import Client

    def broken(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(Client, "models", broken)
    assert emberpc("models").code == 130


def test_ctrl_c_ends_a_command(fake: FakeServer) -> None:
    arrived, done = threading.Event(), threading.Event()

    def hook(_: Any) -> None:
        arrived.set()
        done.wait(300)

    fake.hooks["Embed"] = hook
    # Where the tests run in the background, SIGINT is ignored, and a child inherits that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from emberpc.cli.main import main; sys.exit(main(['embed', 'a']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert arrived.wait(300)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        done.set()
        process.kill()
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


@pytest.mark.usefixtures("fake", "interruptible")
@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_ctrl_c_in_a_constructor_prints_no_error_of_the_destructor(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, in_a_cycle: bool
) -> None:
    from emberpc.client import Client

    destroyed = []

    class Call:
        def __init__(self) -> None:
            if in_a_cycle:
                self.itself = self
            signal.raise_signal(signal.SIGINT)
            self.state = "complete"

        def __del__(self) -> None:
            destroyed.append(True)
            assert self.state

    monkeypatch.setattr(Client, "models", lambda *_, **__: Call())
    outcome = emberpc("models")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
    assert destroyed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("fake", "interruptible")
def test_ctrl_c_in_a_destructor_ends_the_command(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    from emberpc.client import Client

    class Call:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def models(*_: Any, **__: Any) -> list[Any]:
        Call()
        while True:
            pass

    monkeypatch.setattr(Client, "models", models)
    outcome = emberpc("models")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_the_imports_ends_the_command(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_module, "_run", lambda _: signal.raise_signal(signal.SIGINT))
    outcome = emberpc("models")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


@pytest.mark.usefixtures("fake", "interruptible")
@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_in_a_destructor_is_not_raised_after_the_command(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """KeyboardInterrupt in a destructor is raised again; the command may end before that."""
    from emberpc.client import Client

    class Call:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    if late:
        monkeypatch.setattr(interrupts, "_RETRY_SECONDS", 300)
    monkeypatch.setattr(Client, "models", lambda *_, **__: [Call()][1:])
    hook = sys.unraisablehook
    outcome = emberpc("models")
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is hook
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.usefixtures("fake", "interruptible")
def test_a_second_ctrl_c_leaves_no_handler_behind(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    from emberpc.client import Client

    monkeypatch.setattr(Client, "models", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(gc, "collect", lambda: signal.raise_signal(signal.SIGINT))
    hook = sys.unraisablehook
    assert emberpc("models").code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is hook


@pytest.mark.usefixtures("interruptible")
def test_a_failing_destructor_without_ctrl_c_is_reported(
    emberpc: Emberpc, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emberpc.client import Client

    reported = []

    class Call:
        def __del__(self) -> None:
            raise ValueError

    monkeypatch.setattr(sys, "unraisablehook", lambda error: reported.append(error.exc_type))
    monkeypatch.setattr(Client, "models", lambda *_, **__: [Call()][1:])
    assert emberpc("models").code == 0
    assert reported == [ValueError]


@pytest.mark.parametrize("json", [True, False])
def test_a_stdout_pipe_that_is_closed_early_is_no_error(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, json: bool
) -> None:
    emberpc("collection", "create", "c")
    path = tmp_path / "r.csv"
    path.write_text(
        "id,text\n" + "".join(f"{i:05},{'word ' * 40}\n" for i in range(1000))
    )  # 3 times the capacity of a pipe
    assert emberpc("upsert", "c", path).code == 0
    command = [sys.executable, "-m", "emberpc.cli.main", "collection", "records", "c", "--limit", "0"]
    process = subprocess.Popen(
        [*command, *(["--json"] if json else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(300), err) == (0, b"")


def test_a_stdout_pipe_without_a_reader_is_no_error(fake: FakeServer) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "emberpc.cli.main", "models"],
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


def in_a_circle(*errors: BaseException) -> BaseException:
    """Set the next error as the cause of each error, and the first as the cause of the last."""
    for error, cause in zip(errors, [*errors[1:], errors[0]], strict=True):
        error.__cause__ = cause
    return errors[0]


def test_cyclic_causes_of_an_exception_are_followed_once() -> None:
    assert not app._is_of_an_interrupt(in_a_circle(ValueError(), OSError(), ValueError()))
    assert not app._is_of_an_interrupt(in_a_circle(ValueError()))
    assert app._is_of_an_interrupt(in_a_circle(ValueError(), KeyboardInterrupt()))
