"""Measure goodput and latency under overload.

Calls arrive at fixed moments, whether or not earlier calls were answered (an open loop). Their rate in texts is 1, 2
and 5 times the server's capacity, which the script measures first, with 64 concurrent calls of one text. Each call has
a deadline of one second. Calls of one text, calls of 32 texts, and streams of 32 texts are measured one after another.
Goodput is the number of texts per second that are answered before the deadline. Targets, which are not checked: goodput
does not fall when the rate grows, and a refused call is refused at once.

    python -m benchmarks.server.overload BUNDLE [--seconds 8] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from subprocess import run
from time import perf_counter
from typing import Any

import grpc.aio

from benchmarks.shared.load import call, host, middle, mixed_texts, serving
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc, types_pb2

DEADLINE = 1.0
FACTORS = (1.0, 2.0, 5.0)
WAYS = {"calls of 1 text": 1, "calls of 32 texts": 32, "streams of 32 texts": 32}


async def arrivals(address: str, way: str, texts: list[str], rate: float, seconds: float) -> dict[str, float]:
    """Send calls at equal intervals, whether or not earlier calls were answered; return the figures.

    Args:
        address: address of the server, as host:port.
        way: kind of the calls, a key of `WAYS`.
        texts: texts to send, in turn and repeatedly; the number of the call is put behind each text. A call with the
            last of the texts may have fewer texts than other calls.
        rate: texts per second to send.
        seconds: seconds in which calls are sent.

    Returns:
        `goodput`: texts per second until the end of the last call; each answered call counts as a full one. `answered`,
        `refused` and `late`: numbers of calls. A call is refused if it fails with RESOURCE_EXHAUSTED, or is a stream
        that ends before all its texts have vectors; after any other error it is late. `p50_ms` and `refusal_p50_ms`:
        median milliseconds of answered and of refused calls; 0 if there are none.
    """
    batch = WAYS[way]
    latencies: list[float] = []
    refusals: list[float] = []
    late = 0
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        await channel.channel_ready()

        async def one(number: int) -> None:
            nonlocal late
            part = [f"{text} {number}" for text in texts[number * batch % len(texts) :][:batch]]
            start = perf_counter()
            try:
                if "streams" in way:
                    done = 0
                    async for response in stub.EmbedStream(_requests(part), timeout=DEADLINE):
                        done += len(response.ids)
                    if done < len(part):
                        refusals.append(perf_counter() - start)
                        return
                else:
                    request = pb.EmbedRequest(texts=part, truncation=types_pb2.TRUNCATION_END)
                    await stub.Embed(request, timeout=DEADLINE)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refusals.append(perf_counter() - start)
                else:
                    late += 1
            else:
                latencies.append(perf_counter() - start)

        begin, tasks = perf_counter(), []
        for number in range(int(rate * seconds / batch)):
            await asyncio.sleep(max(0.0, begin + number * batch / rate - perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
        await asyncio.gather(*tasks)
        taken = perf_counter() - begin
    return {
        "goodput": batch * len(latencies) / taken,
        "answered": len(latencies),
        "refused": len(refusals),
        "late": late,
        "p50_ms": 1000 * middle(latencies or [0.0]),
        "refusal_p50_ms": 1000 * middle(refusals or [0.0]),
    }


async def _requests(part: list[str]) -> AsyncIterator[pb.EmbedStreamRequest]:
    config = pb.EmbedStreamConfig(truncation=types_pb2.TRUNCATION_END)
    items = [pb.EmbedStreamItem(id=str(i), text=text) for i, text in enumerate(part)]
    yield pb.EmbedStreamRequest(config=config, items=items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="an embedding model, exported")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--arrivals", nargs=2, metavar=("WAY", "RATE"), help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    texts = mixed_texts(1000, None)
    if arguments.arrivals:
        way, rate = arguments.arrivals
        print(json.dumps(asyncio.run(arrivals(arguments.bundle, way, texts, float(rate), arguments.seconds))))
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    with serving(Path(arguments.bundle), "--cache-bytes", "0", *flags) as server:
        call(server.address, texts[:200], in_flight=64)  # warm
        capacity = len(texts) / call(server.address, texts, in_flight=64).seconds
        print(f"capacity: {capacity:.0f} texts per second")
        for way in WAYS:
            for factor in FACTORS:
                command = [sys.executable, "-m", "benchmarks.server.overload", server.address]
                command += ["--seconds", str(arguments.seconds), "--arrivals", way, str(capacity * factor)]
                outcome = json.loads(run(command, check=True, capture_output=True, text=True).stdout)
                found.setdefault(way, {})[f"{factor:g}"] = outcome
                calls = outcome["answered"] + outcome["refused"] + outcome["late"]
                print(
                    f"{way}, {factor:g} times: goodput {outcome['goodput']:.0f} texts per second, p50 "
                    f"{outcome['p50_ms']:.0f} ms; of {calls} calls "
                    f"{outcome['refused']} refused (after {outcome['refusal_p50_ms']:.0f} ms), {outcome['late']} late"
                )
    if arguments.output:
        result = {"host": host(), "capacity": capacity, "overload": found}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
