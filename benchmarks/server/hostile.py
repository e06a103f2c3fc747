"""Measure whether hostile requests delay other calls.

The script sends the requests of `benchmarks/server/hostile_requests.py`, with long texts of nearly 2 MiB, the server's
limit. It sends them one at a time over one connection; then all of them over two connections, eight at a time; then,
of each request that took more than 0.2 s when sent alone, eight copies at once. Meanwhile another process, the probe,
calls the health service and embeds a short text, one call after the other. Finally, without the probe, the script
begins to send all requests again, eight at a time, and at once sends SIGTERM.

For each request that was sent alone, the script prints the seconds of the slowest calls of the probe, and the peak
memory of the server; for eight copies, only the seconds. At the end it prints the other figures, such as the seconds
from SIGTERM to the server's exit. Targets, which are not checked: a call of the probe takes at most 500 ms, memory is
at most 600 MiB above that of the idle server, and the exit takes at most 2 s more than the drain time, which is 2 s.

    python -m benchmarks.server.hostile BUNDLE [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import grpc

from benchmarks.server import hostile_requests
from benchmarks.server.hostile_requests import Hostile, Size
from benchmarks.shared.load import host
from emberpc.bundle import read_bundle
from emberpc.v1 import embedding_pb2
from examples.server_process import ServerProcess

DRAIN = 2.0
TIMEOUT = 600
#: A request that took more than this many seconds when it was sent alone is also sent as eight copies at once.
_LONG_SECONDS = 0.2
#: Options of the two channels: responses of any size, and a connection of its own for each channel.
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


def _probe(address: str, stop: Event, results: Connection) -> None:
    """Call the health service and embed a short text, in turn and at least once each, until `stop` is set.

    At the end, send a list through `results`: seconds of the slowest health check and of the slowest Embed. If a call
    fails, its exception ends the process, and nothing is sent.
    """
    slowest = [0.0, 0.0]
    with grpc.insecure_channel(address) as channel:
        health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        embed: Any = channel.unary_unary("/emberpc.v1.EmbeddingService/Embed")
        while True:
            # Each text is new, so that the server's cache does not have its vector.
            request = embedding_pb2.EmbedRequest(model="tiny", texts=[f"a short text {perf_counter_ns()}"])
            for i, (call, data) in enumerate(((health, b""), (embed, request.SerializeToString()))):
                start = perf_counter()
                call(data, timeout=TIMEOUT)
                slowest[i] = max(slowest[i], perf_counter() - start)
            if stop.is_set():
                break
            stop.wait(0.01)
    results.send(slowest)


@contextmanager
def watched(address: str, found: list[float]) -> Iterator[None]:
    """Run `_probe` in another process during the block.

    At the end of the block, append the seconds of the slowest health check and of the slowest Embed to `found`.

    Raises:
        EOFError: a call of the probe failed; raised at the end of the block.
    """
    context = multiprocessing.get_context("spawn")
    stop, (ours, theirs) = context.Event(), context.Pipe()
    process = context.Process(target=_probe, args=(address, stop, theirs))
    process.start()
    theirs.close()  # else `recv` would wait for ever if the process ends without a result
    try:
        yield
    finally:
        stop.set()
        found.extend(ours.recv())
        process.join()


def send(channel: grpc.Channel, hostile: Hostile) -> str:
    """Send a request and read all its responses; return the name of the status code, such as OK.

    For an error without a status code, "no code" is returned. After 600 s the call ends with DEADLINE_EXCEEDED.
    """
    kind = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
    call: Any = getattr(channel, kind[2 * hostile.streams[0] + hostile.streams[1]])(hostile.method)
    try:
        response = call(iter(hostile.data) if hostile.streams[0] else hostile.data[0], timeout=TIMEOUT)
        if hostile.streams[1]:
            for _ in response:
                pass
    except grpc.RpcError as error:
        return str(error.code().name) if isinstance(error, grpc.Call) else "no code"
    return "OK"


def megabytes(process: ServerProcess, field: str) -> int:
    """Return the resident memory of a server in MiB, rounded down.

    Args:
        process: the server.
        field: `VmRSS` for the memory now, `VmHWM` for the peak since the start of the process, or since `measure` last
            reset it.
    """
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) // 1024


def measure(bundle: Path, data: Path) -> dict[str, Any]:
    """Start a server with a bundle, send all hostile requests, stop the server, and return the figures.

    Args:
        bundle: folder of an embedding model.
        data: data directory of the server, empty.

    Returns:
        Figures by name. Times are in seconds, memory is in MiB. `peak MB` is the peak of the memory while requests were
        sent eight at a time, or as eight copies.

    Raises:
        RuntimeError: the server did not start.
        EOFError: a call of the probe failed. The server is not stopped then.
        grpc.RpcError: a request of `hostile_requests.preparation` failed. The server is not stopped then.
    """
    size = Size(text=2 * 2**20 - 64, dimensions=read_bundle(bundle).manifest.dimensions)
    requests = hostile_requests.requests(size)
    process = ServerProcess({"tiny": bundle}, data, "--drain-seconds", str(DRAIN))
    rows: dict[str, Any] = {}
    with (
        grpc.insecure_channel(process.address, _OPTIONS) as one,
        grpc.insecure_channel(process.address, _OPTIONS) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        for method, request in hostile_requests.preparation(size):
            call: Any = one.unary_unary(method)
            call(request.SerializeToString(), timeout=TIMEOUT)
        idle = megabytes(process, "VmRSS")
        for name, hostile in requests.items():
            slowest: list[float] = []
            Path(f"/proc/{process.process.pid}/clear_refs").write_text("5")  # resets VmHWM
            start = perf_counter()
            with watched(process.address, slowest):
                start = perf_counter()
                code = send(one, hostile)
                seconds = perf_counter() - start
            peak = megabytes(process, "VmHWM")
            rows[name] = {"code": code, "seconds": seconds, "health": slowest[0], "embed": slowest[1], "peak MB": peak}
            waits = f"health {slowest[0]:.3f}, embed {slowest[1]:.3f}"
            print(f"{name:45} {code:20} {seconds:7.3f} s, {waits}, {peak} MB", flush=True)
        slowest = []
        with watched(process.address, slowest):
            channels = [one, other]
            jobs = [pool.submit(send, channels[i % 2], hostile) for i, hostile in enumerate(requests.values())]
            for job in jobs:
                job.result()
        together = {"health": slowest[0], "embed": slowest[1]}
        alike = {}
        for name, hostile in requests.items():
            if rows[name]["seconds"] > _LONG_SECONDS:
                slowest = []
                with watched(process.address, slowest):
                    list(pool.map(lambda i, hostile=hostile: send(channels[i % 2], hostile), range(8)))
                alike[name] = {"health": slowest[0], "embed": slowest[1]}
                print(f"eight times {name:33} health {slowest[0]:.3f}, embed {slowest[1]:.3f}", flush=True)
        peak = megabytes(process, "VmHWM")
        jobs = [pool.submit(send, channels[i % 2], hostile) for i, hostile in enumerate(requests.values())]
        start = perf_counter()
        exit_code = process.stop()
        end = perf_counter() - start
        pool.shutdown(cancel_futures=True)
    return {
        "host": host(),
        "requests": rows,
        "slowest": {key: max(row[key] for row in rows.values()) for key in ("health", "embed")},
        "eight at a time": together,
        "eight of one kind": alike,
        "idle MB": idle,
        "peak MB, one at a time": max(row["peak MB"] for row in rows.values()),
        "peak MB": peak,
        "seconds of the end": end,
        "exit code": exit_code,
    }


def main() -> None:
    """Measure, print the figures, and write them to a JSON file if `--out` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.bundle, Path(folder))
    print(json.dumps({key: value for key, value in result.items() if key != "requests"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
