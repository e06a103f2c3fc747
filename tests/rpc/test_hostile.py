"""The most expensive requests, valid or invalid, stop no server; a short form of benchmarks/server/hostile.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from benchmarks.server import hostile_requests
from benchmarks.server.hostile_requests import SHORT, Hostile, Size
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc
from examples.server_process import ServerProcess

#: Documented codes of a refused or ended request. INTERNAL and UNKNOWN are not among them.
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
}
#: Names of the requests, without the requests, which take 50 MB: each test process imports this module.
NAMES = list(hostile_requests.requests(Size(text=64, message=64, records=1)))
#: Megabytes by which the memory of the server may grow after the first request.
MAX_MEGABYTES = 600
#: Timeout of a request in seconds; on a usual host, none takes a hundredth of it.
TIMEOUT = 300


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess({"tiny": tiny_bundle}, tmp_path_factory.mktemp("data"))
    with grpc.insecure_channel(process.address) as channel:
        for method, request in hostile_requests.preparation(SHORT):
            call: Any = channel.unary_unary(method)
            call(request.SerializeToString(), timeout=TIMEOUT)
    before = megabytes(process)
    yield process
    assert megabytes(process) < before + MAX_MEGABYTES
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with connected(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def cases() -> dict[str, Hostile]:
    return hostile_requests.requests(SHORT)


def connected(server: ServerProcess) -> grpc.Channel:
    return grpc.insecure_channel(
        server.address, [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    )


def megabytes(server: ServerProcess) -> int:
    """Return the greatest memory of the server so far, in megabytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024


def send(channel: grpc.Channel, hostile: Hostile, timeout: float = TIMEOUT) -> grpc.StatusCode:
    """Send a request; return its status code."""
    kind = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
    call: Any = getattr(channel, kind[2 * hostile.streams[0] + hostile.streams[1]])(hostile.method)
    data: Any = iter(hostile.data) if hostile.streams[0] else hostile.data[0]
    try:
        response = call(data, timeout=timeout)
        if hostile.streams[1]:
            for _ in response:
                pass
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code()
    return grpc.StatusCode.OK


def check_alive(channel: grpc.Channel) -> None:
    health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    response = health_pb2.HealthCheckResponse.FromString(health(b"", timeout=TIMEOUT))
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    response_ = stub.Embed(embedding_pb2.EmbedRequest(model="tiny", texts=["a b"]), timeout=TIMEOUT)
    assert response_.embeddings.rows == 1


#: Kinds of long texts that the fast tests send only with one call of Embed, and the slow tests with all calls.
OTHER_KINDS = set(hostile_requests.KINDS) - {"one letter", "only marks", "unsegmented"}


def is_slow(name: str) -> bool:
    call, _, kind = name.rpartition(": ")
    return kind in OTHER_KINDS and call != "embed, cut at the end"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else []) for name in NAMES]
)
def test_a_hostile_request_is_answered_or_refused(channel: grpc.Channel, cases: dict[str, Hostile], name: str) -> None:
    hostile = cases[name]
    code = send(channel, hostile)
    assert code in (REFUSALS if hostile.refused else {grpc.StatusCode.OK, *REFUSALS}), code
    check_alive(channel)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in NAMES if not is_slow(name)][::3], id="a third of the fast ones"),
        pytest.param(NAMES, id="all", marks=pytest.mark.slow),
    ],
)
def test_eight_concurrent_hostile_requests_are_answered_or_refused(
    server: ServerProcess, cases: dict[str, Hostile], names: list[str]
) -> None:
    with connected(server) as one, connected(server) as other, ThreadPoolExecutor(8) as pool:
        channels = [one, other]
        jobs = [pool.submit(send, channels[i % 2], cases[name]) for i, name in enumerate(names)]
        codes = dict(zip(names, [job.result() for job in jobs], strict=True))
        check_alive(one)
    wrong = {name: code for name, code in codes.items() if code not in {grpc.StatusCode.OK, *REFUSALS}}
    assert wrong == {}


def test_cancelled_heavy_requests_do_not_block_other_calls(
    server: ServerProcess, channel: grpc.Channel, cases: dict[str, Hostile]
) -> None:
    """Callers cancel calls that the server has begun; calls of another connection must not be delayed."""
    heavy = [cases[name] for name in ("a wide filter", "many clusters", "all pairs", "a similarity of many")]
    with connected(server) as abandoned:
        calls = []
        for hostile in heavy * 4:
            call: Any = abandoned.unary_unary(hostile.method)
            calls.append(call.future(hostile.data[0], timeout=TIMEOUT))
        left = threading.Thread(target=lambda: [call.cancel() for call in calls])
        check_alive(channel)
        left.start()
        left.join()
        assert send(channel, cases["metadata: wide objects"]) is grpc.StatusCode.OK
        assert send(channel, cases["a wide filter"]) is grpc.StatusCode.OK
