"""SIGTERM ends the server in time with exit code 0, also beside work that never ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from emberpc.client import Client
from emberpc.server.index import Index
from examples.server_process import ServerProcess

DRAIN = ("--drain-seconds", "0.1")


@contextmanager
def never_read_to_its_end(path: Path) -> Iterator[None]:
    """Hold a pipe open that the server reads in place of a file: its thread never comes back from that."""
    held, deadline = None, time.monotonic() + 300
    while held is None:
        try:
            held = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
    try:
        yield
    finally:
        os.close(held)


def test_a_thread_of_the_pool_that_never_ends_does_not_hold_up_the_end(tiny_bundle: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.json"
    os.mkfifo(calibration)
    server = ServerProcess({"tiny": tiny_bundle}, tmp_path, "--batch-tokens", "0", *DRAIN)
    with never_read_to_its_end(calibration):
        with Client(server.address) as client:
            client.create_collection("books", model="tiny")
            client.upsert("books", [{"id": "a", "text": "a b c"}])
        assert server.stop() == 0
    assert "the process ends though work still runs on pool_" in server.output
    assert "Traceback" not in server.output
    calibration.unlink()
    with closing(Index(tmp_path)) as index:
        assert [record.id for record in index.get("books").get(["a"])] == ["a"]


def test_a_session_that_is_loaded_for_ever_does_not_hold_up_the_end(tiny_bundle: Path, tmp_path: Path) -> None:
    """A lone text has a session with several threads loaded beside it, and the model's file is a pipe by then."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    server = ServerProcess({"tiny": bundle}, tmp_path / "data", "--workers", "2", "--batch-tokens", "64", *DRAIN)
    path = bundle / "onnx" / "model.onnx"
    path.unlink()
    os.mkfifo(path)
    with Client(server.address) as client:
        client.embed(["a b c"])
        with never_read_to_its_end(path):
            assert server.stop() == 0
    assert "the process ends though work still runs on widen" in server.output
    assert "Traceback" not in server.output


#: An event loop that serves and does no more than wait for a signal, then work that never ends.
SCRIPT = """
import asyncio, logging, re, sys
from concurrent.futures import ThreadPoolExecutor
from emberpc.server import stopping as module
from emberpc.server.stopping import Stopping

module._HELD_SECONDS = {held}
module._END_SECONDS = {end}
logging.basicConfig(level="INFO")

async def serve():
    stopping.listen()
    stopping.serving()
    print("ready", flush=True)
    {work}

stopping = Stopping(0.1)
asyncio.run(serve())
stopping.end(ThreadPoolExecutor(1))
print("ended", flush=True)
"""

#: Python code that keeps the event loop: signals are handled, nothing else is.
LOOP_KEPT = "while True: pass"


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        ("await stopping.requested.wait()", 0, ""),
        (LOOP_KEPT, 0, "the process ends though its shutdown takes longer than 0.1"),
        ("await stopping.finish(asyncio.sleep(3600))\n    while True: pass", 0, "its shutdown takes longer than 0.1"),
        # One call into a library that keeps the interpreter: no Python code runs any more.
        ("await stopping.requested.wait()\n    re.match('(a+)+$', 'a' * 60 + 'b')", 1, "Timeout"),
    ],
    ids=["nothing", "loop kept", "work of the shutdown", "interpreter kept"],
)
def test_the_process_ends_whatever_keeps_it(work: str, code: int, words: str) -> None:
    # The dump of an interpreter that is kept must not come before the end of one that is not, on a slow host.
    held = 0.5 if code else 250.0
    # The watching thread may end a loop that is kept at once, but not a process that ends by itself.
    end = 0.1 if work == LOOP_KEPT else 1.6
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(work=work, held=held, end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    if words:  # otherwise the process may be so far that the system's own handler is back
        run.send_signal(signal.SIGINT)  # a second one changes nothing
    output, errors = run.communicate(timeout=300)
    assert run.returncode == code, errors
    assert words in errors
    assert output == ("" if words else "ended\n")
