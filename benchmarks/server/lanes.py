"""Measure whether a short call waits behind a huge one.

Different texts of about 8 tokens are embedded, one after the other: `--calls` texts on an idle server, as many during a
request of 10,000 texts, and as many during a stream of 10,000 texts. The request or stream is repeated as long as the
short calls are measured. Target: the 99th percentile of the latency during request or stream is at most 20 ms more than
3 times the 99th percentile on the idle server. The target is printed, and not checked.

    python -m benchmarks.server.lanes BUNDLE [--calls 400] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from subprocess import DEVNULL, Popen
from time import perf_counter, sleep
from types import TracebackType

from benchmarks.shared.load import call, cpu_seconds, host, mixed_texts, serving
from emberpc.bundle.cores import usable_cores
from emberpc.client import Client

HUGE = 10_000


class BackgroundLoad:
    """Context manager: a child process embeds 10,000 texts repeatedly during the block, and is killed at its end.

    An error of the child is not noticed.

    Args:
        address: address of the server, as host:port.
        way: `request` (one request at a time) or `stream` (one stream at a time).
    """

    def __init__(self, address: str, way: str) -> None:
        self._command = [sys.executable, "-m", "benchmarks.server.lanes", address, "--beside", way]

    def __enter__(self) -> None:
        self._process = Popen(self._command, stdout=DEVNULL, stderr=DEVNULL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def huge(address: str, way: str) -> None:
    """Embed 10,000 texts repeatedly until the process is killed or a call fails.

    The texts are sent as one stream if `way` is `stream`, else as one request.
    """
    texts = [f"{text} {i}" for i in range(5) for text in mixed_texts(HUGE // 5, None, seed=i)]
    with Client(address, timeout=3600) as client:
        while True:
            if way == "stream":
                for _ in client.embed_stream(texts, truncation="end"):
                    pass
            else:
                client.embed(texts, truncation="end", batch_size=HUGE)


def wait_until_busy(pid: int) -> None:
    """Wait, without a limit, until a process uses more than 0.8 of the CPU time of all usable cores for half a second.

    A server under one huge request or stream does so when it runs the texts.
    """
    while True:
        before, began = cpu_seconds(pid), perf_counter()
        sleep(0.5)
        if cpu_seconds(pid) - before > 0.8 * usable_cores() * (perf_counter() - began):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="an embedding model, exported")
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--beside", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.beside:
        huge(arguments.bundle, arguments.beside)
        return
    found = {}
    with serving(Path(arguments.bundle), "--cache-bytes", "0", "--max-texts", str(HUGE), *flags) as server:
        call(server.address, [f"warm {i}" for i in range(100)], in_flight=1)
        for way in ("idle", "request", "stream"):
            with nullcontext() if way == "idle" else BackgroundLoad(server.address, way):
                if way != "idle":
                    wait_until_busy(server.process.pid)
                texts = [f"where is my card {way} {i}" for i in range(arguments.calls)]
                outcome = call(server.address, texts, in_flight=1)
            found[way] = {"p50_ms": outcome.percentile(0.5), "p99_ms": outcome.percentile(0.99)}
            bound = 3 * found["idle"]["p99_ms"] + 20
            verdict = "" if way == "idle" else f" (target: at most {bound:.1f} ms)"
            print(f"{way:8} p50 {found[way]['p50_ms']:.1f} ms, p99 {found[way]['p99_ms']:.1f} ms{verdict}")
    if arguments.output:
        arguments.output.write_text(json.dumps({"host": host(), "lanes": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
