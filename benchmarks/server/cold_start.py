"""Measure the start-up time of a server, and its memory while idle.

The script starts `emberpc serve` with one bundle several times. It measures the time from the start of the process to
the first response of the health service. It measures the resident memory one second after the server has stored its
best size of micro-batches. The script waits for this size without a limit, since a server on a busy host measures the
size again later. The script prints medians over the starts, and the slowest imports of the server.

    python -m benchmarks.server.cold_start BUNDLE [--rounds 7] [--engine openvino] [--precision bf16] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, run
from time import perf_counter, sleep
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.shared.load import add_engine_options, engine_flags, host, middle, resident_megabytes

#: Seconds to wait after the server has stored its best size of micro-batches, before its resident memory is read. After
#: storing the size, the server releases memory that the measurement of the size took.
SETTLED = 1.0


def start(bundle: Path, variant: str, port: int, flags: Sequence[str]) -> tuple[float, float]:
    """Start a server, measure its start and its memory while idle, and stop it.

    The function waits without a limit until the server has stored its best size of micro-batches.

    Args:
        bundle: folder of the bundle.
        variant: variant of the bundle to serve.
        port: a free port.
        flags: further flags of `emberpc serve`.

    Returns:
        Seconds from the start of the process to SERVING, and resident MB while idle.

    Raises:
        SystemExit: the health service answered, but not with SERVING.
        grpc.RpcError: the health service did not answer within 60 seconds, or with an error. Before the function raises
            one of these two exceptions, it waits without a limit until the server's process ends by itself.
    """
    with tempfile.TemporaryDirectory() as data:
        address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "emberpc.cli.main", "serve", "--listen", address, "--data-dir", data]
        began = perf_counter()
        models = ["--model", f"model={bundle}", "--variant", f"model={variant}"]
        with Popen([*command, *models, *flags], stderr=DEVNULL) as process:
            options = [("grpc.initial_reconnect_backoff_ms", 10), ("grpc.max_reconnect_backoff_ms", 10)]
            with grpc.insecure_channel(address, options) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    raise SystemExit("the server started but is not serving")
            seconds = perf_counter() - began
            while not Path(data, "engines.json").exists():
                sleep(0.1)
            sleep(SETTLED)
            memory = resident_megabytes(process.pid)
            process.terminate()
        return seconds, memory


def slowest_imports(count: int) -> list[tuple[str, float]]:
    """Return the `count` slowest imports in a new process that imports `emberpc.server.app`, slowest first.

    An item is the name of a module, which may be of another package, and milliseconds. The time of a module includes
    the modules that it is the first to import.

    Raises:
        CalledProcessError: the import failed.
    """
    found = run(
        [sys.executable, "-X", "importtime", "-c", "import emberpc.server.app"], stderr=PIPE, check=True, text=True
    )
    lines = [line.removeprefix("import time:").split("|") for line in found.stderr.splitlines() if "|" in line][1:]
    times = [(name.strip(), int(total) / 1000) for _, total, name in lines]
    return sorted(times, key=lambda item: -item[1])[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("--variant", default="fp32", help="variant of the bundle (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=50871, help="a free port (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    add_engine_options(parser)
    arguments = parser.parse_args()
    flags = engine_flags(arguments)
    rounds = [start(arguments.bundle, arguments.variant, arguments.port, flags) for _ in range(arguments.rounds)]
    seconds, memory = (middle(values) for values in zip(*rounds, strict=True))
    print(f"SERVING after {seconds:.2f} s, {memory:.0f} MB resident")
    imports = slowest_imports(12)
    for name, taken in imports:
        print(f"  {taken:7.1f} ms  {name}")
    if arguments.output:
        result = {"host": host(), "seconds": seconds, "resident_megabytes": memory, "imports_ms": dict(imports)}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
