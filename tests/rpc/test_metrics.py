"""Metrics for Prometheus: their values, and the port that serves them if `--metrics-listen` is set."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from emberpc.client import Client, InvalidArgument, Record, SearchQuery, SearchResult
from emberpc.server.scraping import MAX_CONNECTIONS, PageServer
from examples.server_process import ServerProcess
from waiting import wait_until


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    data = tmp_path_factory.mktemp("data")
    options = ("--metrics-listen", "127.0.0.1:0", "--recall-probe", "1")
    with ServerProcess({"tiny": tiny_bundle}, data, *options) as process:
        yield process


def figures(process: ServerProcess) -> dict[str, float]:
    found = re.search(r"figures at (http://\S+)", process.output)
    assert found is not None
    with urllib.request.urlopen(found[1], timeout=300) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_count_calls_batches_and_cache_hits(measured: ServerProcess) -> None:
    before = figures(measured)
    with Client(measured.address) as client:
        client.embed(["a b c", "d e"])
        client.embed(["a b c"])
        with pytest.raises(InvalidArgument):
            client.embed([" "])
    after = figures(measured)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('emberpc_request_count_total{method="Embed"}') == 3
    assert grown('emberpc_request_failure_total{err="INVALID_ARGUMENT",method="Embed"}') == 1
    assert grown('emberpc_request_duration_seconds_count{method="Embed"}') == 3
    assert grown("emberpc_batch_texts_total") == 2
    assert grown("emberpc_cache_hits_total") == 1
    assert grown("emberpc_batch_tokens_total") > 0
    assert after["emberpc_queue_size_tokens"] == 0
    assert after["emberpc_models"] == 1
    assert after['emberpc_model_info{engine="onnxruntime",model="tiny",precision="fp32",variant="fp32"}'] == 1
    assert after["process_resident_memory_bytes"] > 0


def test_metrics_state_the_recall_of_graph_searches(measured: ServerProcess) -> None:
    """The queries of a call have different values of ef. A graph needs more records than other collections here."""
    matrix = np.random.default_rng(0).standard_normal((4200, 8), dtype=np.float32)
    with Client(measured.address) as client:
        client.create_collection("points", dimensions=8)
        client.upsert("points", [Record(str(i)) for i in range(len(matrix))], vectors=matrix)
        assert not [name for name in figures(measured) if name.startswith("emberpc_search_recall")]
        queries = [SearchQuery(matrix[0], ef=ef) for ef in (150, 0, 300, 150)]
        results: list[SearchResult] = []

        def probed() -> dict[str, float] | None:
            results[:] = client.search_batch("points", queries, ef=120, top_k=5)
            found = figures(measured)
            # While the graph is filled, it has too few records for a search.
            of_graph = all(result.plan.strategy == "hnsw" for result in results)
            return found if of_graph and found.get('emberpc_search_probes_total{collection="points"}') else None

        found = wait_until(probed)
    assert [result.plan.ef for result in results] == [150, 120, 300, 150]
    assert [result.hits[0].record.id for result in results] == ["0"] * 4
    assert found['emberpc_search_recall{collection="points"}'] >= 0.9


def test_silent_connections_add_no_threads_and_block_no_scrape(measured: ServerProcess) -> None:
    """The connections send nothing, an incomplete request or an endless line, or do not read the response."""
    host, port = re.findall(r"figures at http://(\S+):(\d+)", measured.output)[0]
    tasks = Path(f"/proc/{measured.process.pid}/task")
    figures(measured)
    before = len(list(tasks.iterdir()))
    with ExitStack() as stack:
        for i in range(3 * MAX_CONNECTIONS):
            silent = stack.enter_context(socket.create_connection((host, int(port)), timeout=300))
            with suppress(OSError):  # the server closed it to accept newer ones
                silent.sendall((b"", b"GET /metr", b"x" * 30_000, b"GET /metrics HTTP/1.1\r\n\r\n")[i % 4])
        assert figures(measured)["emberpc_models"] == 1
        # Other work may start a few threads meanwhile, but far fewer than there are connections.
        assert len(list(tasks.iterdir())) < before + MAX_CONNECTIONS // 2


@pytest.mark.parametrize("request_line", [b"nonsense", b"POST /metrics HTTP/1.1", b"GET / a b c"])
def test_an_invalid_http_request_for_metrics_is_refused(measured: ServerProcess, request_line: bytes) -> None:
    host, port = re.findall(r"figures at http://(\S+):(\d+)", measured.output)[0]
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(request_line + b"\r\n\r\n")
        with connection.makefile("rb") as response:
            assert response.readline().startswith(b"HTTP/1.1 40")
    assert figures(measured)["emberpc_models"] == 1


@pytest.mark.slow
def test_an_invalid_host_of_metrics_listen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot listen on xxxx.* choose another --metrics-listen"):
        ServerProcess({}, tmp_path, "--metrics-listen", f"{'x' * 64}:0")


def test_a_used_address_of_metrics_listen_is_refused(measured: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another --metrics-listen"):
        ServerProcess({}, tmp_path, "--metrics-listen", measured.address)


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain;version=1.x.y",
        "text/plain; version=1.a.0, */*",
        "application/openmetrics-text; version=abc",
        "application/openmetrics-text;version=",
        "text/plain;version=1.0.0.\u0663",
        f"text/plain;version={'9' * 5000}.0.0",
    ],
)
def test_an_accept_header_with_an_invalid_version_gets_the_plain_format(measured: ServerProcess, accept: str) -> None:
    found = re.search(r"figures at (http://\S+)", measured.output)
    assert found is not None
    request = urllib.request.Request(found[1], headers={"Accept": accept.encode().decode("latin-1")})
    with urllib.request.urlopen(request, timeout=300) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        assert b"emberpc_models 1.0" in response.read()


def test_failed_requests_for_metrics_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    def fail(environ: object, start_response: object) -> list[bytes]:
        raise ZeroDivisionError("no figures")

    server = PageServer("127.0.0.1", 0, fail)
    for _ in range(3):
        with (
            pytest.raises(urllib.error.HTTPError, match="500") as refused,
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=300),
        ):
            pass
        refused.value.close()
    assert [record.getMessage() for record in caplog.records] == ["the metrics port: a request failed: no figures"]


def test_failed_accepts_of_connections_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    server = PageServer("127.0.0.1", 0, lambda environ, start: [])
    loop = asyncio.new_event_loop()
    try:
        for _ in range(100):
            server._log_now_and_then(loop, {"message": "no descriptor", "exception": OSError(24, "too many")})
    finally:
        loop.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the metrics port: no descriptor: [Errno 24] too many"
    ]
