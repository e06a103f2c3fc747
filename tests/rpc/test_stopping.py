"""SIGTERM ends the server within its time limit with exit code 0, even if work never ends."""

from __future__ import annotations

import ctypes
import os
import queue
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from emberpc.client import Client
from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Index
from emberpc.server.stopping import Stopping
from examples.server_process import ServerProcess
from waiting import wait_until

DRAIN = ("--drain-seconds", "0.1")


@contextmanager
def never_read_to_its_end(path: Path) -> Iterator[None]:
    """Keep a pipe open that the server reads in place of a file, so that the read of its thread never ends."""

    def opened() -> int | None:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # the server does not read yet
            return None

    held = wait_until(opened)
    try:
        yield
    finally:
        os.close(held)


def test_an_endless_pool_thread_does_not_delay_the_end_of_the_server(tiny_bundle: Path, tmp_path: Path) -> None:
    with closing(Index(tmp_path)) as index:
        index.create(CollectionSpec("stuck", 4))
    (folder,) = (tmp_path / "collections").iterdir()
    os.mkfifo(folder / "recall.json")
    server = ServerProcess({"tiny": tiny_bundle}, tmp_path, *DRAIN)
    with ThreadPoolExecutor(1) as pool, Client(server.address, timeout=300) as client:
        client.create_collection("books", model="tiny")
        client.upsert("books", [{"id": "a", "text": "a b c"}])
        call = pool.submit(client.get, "stuck", ["a"])
        with never_read_to_its_end(folder / "recall.json"):
            assert server.stop() == 0
        assert call.exception(300)
    assert "the process ends though work still runs on pool_" in server.output
    assert "Traceback" not in server.output
    (folder / "recall.json").unlink()
    with closing(Index(tmp_path)) as index:
        assert [record.id for record in index.get("books").get(["a"])] == ["a"]


def test_an_endless_session_load_does_not_delay_the_end_of_the_server(tiny_bundle: Path, tmp_path: Path) -> None:
    """A call with one text starts loading a session with several threads; the model file is a pipe by then."""
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


#: A server that runs `work` in its event loop, which waits for a signal or never ends.
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

#: Python code that blocks the event loop: only signals are handled.
LOOP_KEPT = "while True: pass"


@pytest.mark.parametrize(
    ("work", "code", "words"),
    [
        ("await stopping.requested.wait()", 0, ""),
        (LOOP_KEPT, 0, "the process ends though its shutdown takes longer than 0.1"),
        ("await stopping.finish(asyncio.sleep(3600))\n    while True: pass", 0, "its shutdown takes longer than 0.1"),
        # A call into a library that blocks the interpreter: no Python code runs any more.
        ("await stopping.requested.wait()\n    re.match('(a+)+$', 'a' * 60 + 'b')", 1, "Timeout"),
    ],
    ids=["no work", "blocked event loop", "blocked shutdown", "blocked interpreter"],
)
def test_the_process_ends_in_time_despite_blocking_work(work: str, code: int, words: str) -> None:
    # On a slow host, the dump for a blocked interpreter must not be written before the end of one that is not blocked.
    held = 0.5 if code else 250.0
    # The watching thread may end a blocked loop early, but not a process that ends without its help.
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
    if words:  # otherwise the process may have restored the default handler already
        run.send_signal(signal.SIGINT)  # a second one changes nothing
    output, errors = run.communicate(timeout=300)
    assert run.returncode == code, errors
    assert words in errors
    assert output == ("" if words else "ended\n")


#: The main thread waits in its event loop, and another thread receives the signal.
SIGNAL_OF_ANOTHER_THREAD = """
import asyncio, os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from emberpc.server.stopping import Stopping
from waiting import wait_until

def receive():
    place = Path(f"/proc/self/task/{os.getpid()}/wchan")  # "0": the kernel does not say
    wait_until(lambda: place.read_text() == "0" or "poll" in place.read_text())
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

async def wait():
    stopping.listen()
    threading.Thread(target=receive).start()
    await asyncio.wait_for(stopping.requested.wait(), 300)
    print("stopped")

stopping = Stopping(0.1)
asyncio.run(wait())
stopping.end(ThreadPoolExecutor(1))
"""


def test_a_signal_that_another_thread_receives_wakes_the_event_loop() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", SIGNAL_OF_ANOTHER_THREAD],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "stopped\n", "")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="the C library cannot signal one thread")
def test_a_signal_that_the_watching_thread_receives_ends_a_blocked_event_loop() -> None:
    """If two signals arrive at the same time, the second one goes to another thread than the main thread."""
    work = f"""import threading
    print(*(thread.native_id for thread in threading.enumerate() if thread.name == "stopping"), flush=True)
    {LOOP_KEPT}"""
    script = SCRIPT.format(work=work, held=250.0, end=0.1)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        thread = int(run.stdout.readline())
        assert ctypes.CDLL(None).tgkill(run.pid, thread, signal.SIGTERM) == 0
        try:
            assert run.wait(300) == 0
        finally:
            run.kill()


def test_the_watching_thread_requests_the_interpreter_lock_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a main thread that computes may never run the handlers of two signals that arrive at the same time."""
    waits: list[float] = []

    class Signals:
        def get(self, timeout: float) -> float:
            waits.append(timeout)
            if len(waits) == 3:
                stopping._ended.set()
            raise queue.Empty

    stopping = Stopping(0.1)
    monkeypatch.setattr(stopping, "_signals", Signals())
    stopping._watch()
    assert waits == [0.25] * 3
