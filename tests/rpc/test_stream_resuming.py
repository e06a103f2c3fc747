"""`embed_stream` against real servers: a large corpus in little memory, and servers that are killed or stopped."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from emberpc.client import AsyncClient, Client, FailedPrecondition, InvalidArgument, StreamedEmbedding, Unavailable
from emberpc.client.types import DType
from examples.server_process import ServerProcess
from stream_helpers import LETTERS, texts_of

#: Time that a stopping server gives open streams to end.
FLAGS = ("--drain-seconds", "0.2")


class Restartable:
    """A server of the tiny model that can be ended and started again at the same address."""

    def __init__(self, bundle: Path, data_dir: Path) -> None:
        self._bundle, self._data_dir = bundle, data_dir
        self.start("127.0.0.1:0")

    @property
    def ended(self) -> bool:
        return self.process.process.poll() is not None

    def start(self, listen: str) -> None:
        self.process = ServerProcess({"tiny": self._bundle}, self._data_dir, *FLAGS, listen=listen)
        self.address = self.process.address


@pytest.fixture(scope="module")
def of_module(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restartable]:
    server = Restartable(tiny_bundle, tmp_path_factory.mktemp("data"))
    yield server
    if not server.ended:
        server.process.kill()


@pytest.fixture
def server(of_module: Restartable) -> Restartable:
    """A running server that a test may end."""
    if of_module.ended:
        of_module.start("127.0.0.1:0")  # another process may use the former port now
    return of_module


@pytest.fixture
def address(server: Restartable) -> str:
    return server.address


def test_the_window_limits_the_texts_read_ahead_of_20000(address: str) -> None:
    total, window = 20_000, 512
    read = taken = maximum = 0
    texts = texts_of(100)

    def corpus() -> Iterator[str]:
        nonlocal read, maximum
        for i in range(total):
            read += 1
            maximum = max(maximum, read - taken)
            yield texts[i % 100]

    seen: Counter[str] = Counter()
    with Client(address) as client:
        expected = client.embed(texts)
        for result in client.embed_stream(corpus(), window=window):
            taken += 1
            seen[result.id] += 1
            assert result.vector is not None
            assert np.abs(result.vector - expected[int(result.id) % 100]).max() < 1e-5
    assert seen == Counter({str(i): 1 for i in range(total)})
    # Beside the unanswered texts, those of the response that the client reads may count.
    assert maximum <= window + 64


def test_invalid_texts_fail_alone_in_both_clients(address: str) -> None:
    items = [("gut", "a b"), ("leer", ""), ("lang", " ".join(LETTERS * 2)), ("schön 🦊", "c d")]

    async def run() -> list[StreamedEmbedding]:
        async with AsyncClient(address) as client:
            return [result async for result in client.embed_stream(items)]

    with Client(address) as client:
        outcomes = [list(client.embed_stream(items)), asyncio.run(run())]
    for outcome in outcomes:
        results = {result.id: result for result in outcome}
        assert {key for key, result in results.items() if result.error is None} == {"gut", "schön 🦊"}
        for key, words in (("leer", "is empty"), ("lang", "at most 32")):
            error = results[key].error
            assert isinstance(error, InvalidArgument)
            assert words in error.message
            assert error.request_id


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
def test_other_element_types_equal_those_of_embed(address: str, dtype: DType) -> None:
    texts = texts_of(20)
    with Client(address) as client:
        expected = client.embed(texts, dtype=dtype, dimensions=0)
        for result in client.embed_stream(texts, dtype=dtype):
            assert result.vector is not None
            near = np.abs(result.vector - expected[int(result.id)]) < 0.05
            assert near.mean() > (0.9 if dtype == "binary" else 0.999)


def interrupted(server: Restartable, end: Callable[[ServerProcess], int]) -> tuple[list[StreamedEmbedding], int]:
    """Run a stream whose server is restarted meanwhile; return the results, and their number before the restart."""
    first = server.process.process
    before = 0
    results: list[StreamedEmbedding] = []

    def restart() -> None:
        end(server.process)
        server.start(server.address)

    thread = threading.Thread(target=restart)
    with Client(server.address) as client:
        for result in client.embed_stream(iter_forever(thread)):
            results.append(result)
            if len(results) == 1000:
                thread.start()
            if first.poll() is None:
                before = len(results)
        thread.join()
        assert client.health().name == "SERVING"
    assert server.process.process is not first
    return results, before


def iter_forever(thread: threading.Thread) -> Iterator[tuple[str, str]]:
    """Yield texts until the thread has ended, and then 1000 more."""
    texts, left, number = texts_of(50), 1000, 0
    while left:
        if thread.ident is not None and not thread.is_alive():
            left -= 1
        yield f"text-{number}", texts[number % 50]
        number += 1


def test_every_text_is_answered_once_after_a_kill_of_the_server(server: Restartable) -> None:
    results, before = interrupted(server, ServerProcess.kill)
    assert 1000 <= before < len(results)
    assert Counter(result.id for result in results) == Counter({f"text-{i}": 1 for i in range(len(results))})
    assert all(result.error is None and result.vector is not None for result in results)


@pytest.mark.slow
def test_every_text_is_answered_once_after_a_stop_of_the_server(server: Restartable) -> None:
    """A stream that is still open when the drain time is over continues with the next server."""
    results, before = interrupted(server, ServerProcess.stop)
    assert 1000 <= before < len(results)
    assert Counter(result.id for result in results) == Counter({f"text-{i}": 1 for i in range(len(results))})
    assert all(result.error is None and result.vector is not None for result in results)


async def test_the_asynchronous_client_resumes_a_stream_after_a_kill(server: Restartable) -> None:
    texts = texts_of(50)
    seen: Counter[str] = Counter()
    restarting: asyncio.Task[None] | None = None

    def restart() -> None:
        server.process.kill()
        server.start(server.address)

    def corpus() -> Iterator[tuple[str, str]]:
        number = 0
        while restarting is None or not restarting.done():
            yield f"text-{number}", texts[number % 50]
            number += 1

    async with AsyncClient(server.address) as client:
        async for result in client.embed_stream(corpus()):
            seen[result.id] += 1
            assert result.error is None
            if len(seen) == 500:
                restarting = asyncio.create_task(asyncio.to_thread(restart))
            if len(seen) % 64 == 0:
                await asyncio.sleep(0)
    assert seen == Counter({f"text-{i}": 1 for i in range(len(seen))})
    assert len(seen) > 500
    assert not server.ended


def test_a_stream_fails_if_the_server_does_not_return(server: Restartable) -> None:
    with Client(server.address) as client:
        results = client.embed_stream(
            ("a b" for _ in range(10**9)), timeout=5
        )  # time for the first response on a slow host
        next(results)
        server.process.kill()
        with pytest.raises(Unavailable, match="no emberpc server answers"):
            list(results)


def test_a_stream_fails_if_the_model_of_its_name_changed(
    server: Restartable, other_tiny_bundle: Path, tmp_path: Path
) -> None:
    with Client(server.address) as client:
        results = client.embed_stream(("a b" for _ in range(10**9)), model="tiny")
        next(results)
        server.process.kill()
        with (
            ServerProcess({"tiny": other_tiny_bundle}, tmp_path, listen=server.address),
            pytest.raises(FailedPrecondition, match="another model 'tiny'"),
        ):
            list(results)
