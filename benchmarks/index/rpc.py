"""Compare a search by vector through gRPC with gRPC alone and with hnswlib alone, in alternating rounds of one run.

The emberpc server is compared with three systems: a server whose handler does
nothing; a server whose handler returns ten prepared hits, so that gRPC carries
the same bytes; and hnswlib in this process, with the ef that the emberpc server
reports, on as many threads as there are cores. Each server has its own process.

Run as a program, this script is one of the first two servers:

    python -m benchmarks.index.rpc ADDRESS_FILE [ANSWER]

It writes its address to ADDRESS_FILE. It returns the SearchResponse in the file ANSWER, or an empty one.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import grpc
import grpc.aio
import hnswlib
import numpy as np

from benchmarks.shared.load import capacity, middle
from emberpc.bundle.cores import usable_cores
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from emberpc.wire import vectors as wire

SEARCH = "/emberpc.v1.IndexService/Search"
COLLECTION, K, BATCH = "c", 10, 64
#: To measure calls per second: number of concurrent callers, and of calls by each. For latency: number of calls.
CALLERS, CALLS, ONE_BY_ONE = 8, 500, 1000
CORES = usable_cores()

Figures = dict[str, Any]


def measure(address: str, graph: hnswlib.Index, queries: np.ndarray, rounds: int) -> Figures:
    """Measure a server and the systems that it is compared with, and the ratios of each round.

    Args:
        address: address of the emberpc server; it has the collection.
        graph: graph of the same vectors.
        queries: float32 (at least 128, dimensions).
        rounds: number of rounds; the figures are their medians.

    Returns:
        `servers`: for each server, calls per second (`queries_per_second_1`) and milliseconds of a call without other
        calls (`latency_ms`); `hnswlib` and `emberpc` also have `queries_per_second_64`. `shares`: emberpc's figures as
        shares of the others'.
    """
    found: dict[str, list[Figures]] = {"emberpc": [], "empty handler": [], "ten ready hits": [], "hnswlib": []}
    with grpc.insecure_channel(address) as channel:
        answer = index_pb2_grpc.IndexServiceStub(channel).Search(_requests(queries, 1, 1)[0])
    ef = answer.results[0].plan.ef
    with ExitStack() as stack:
        addresses = {
            "emberpc": address,
            "empty handler": stack.enter_context(_comparison_server(b"")),
            "ten ready hits": stack.enter_context(_comparison_server(answer.SerializeToString())),
        }
        # The first round is not counted: its searches read data from disk.
        for _ in range(rounds + 1):
            for name, each in addresses.items():
                calls = _calls_per_second(each, queries)
                found[name].append({"queries_per_second_1": calls, "latency_ms": _latency(each, queries)})
            found["emberpc"][-1]["queries_per_second_64"] = _calls_per_second(address, queries, CORES, BATCH)
            found["hnswlib"].append({"queries_per_second_64": _raw(graph, queries, ef)})
    counted = {name: each[1:] for name, each in found.items()}
    servers = {
        name: {key: middle([figures[key] for figures in each]) for key in each[0]} for name, each in counted.items()
    }
    return {"ef": ef, "rounds": rounds, "servers": servers, "shares": _shares(counted)}


def _shares(found: dict[str, list[Figures]]) -> Figures:
    """Return emberpc's figures as shares of the others': the medians of the ratios of the rounds."""

    def share(name: str, key: str, *, of_time: bool = False) -> float:
        ratios = [ours[key] / theirs[key] for ours, theirs in zip(found["emberpc"], found[name], strict=True)]
        return middle([1 / ratio for ratio in ratios] if of_time else ratios)

    return {
        "calls, of an empty handler": share("empty handler", "queries_per_second_1"),
        "calls, of ten ready hits": share("ten ready hits", "queries_per_second_1"),
        "latency, of an empty handler": share("empty handler", "latency_ms", of_time=True),
        "latency, of ten ready hits": share("ten ready hits", "latency_ms", of_time=True),
        "64 a call, of hnswlib": share("hnswlib", "queries_per_second_64"),
    }


def _requests(queries: np.ndarray, calls: int, each: int) -> list[pb.SearchRequest]:
    requests = []
    for first in range(0, calls * each, each):
        wanted = [pb.SearchQuery(vector=wire.encode(query[None])) for query in queries[first : first + each]]
        requests.append(pb.SearchRequest(collection=COLLECTION, queries=wanted, top_k=K))
    return requests


def _calls_per_second(address: str, queries: np.ndarray, callers: int = CALLERS, each: int = 1) -> float:
    """Return queries per second of concurrent callers; each caller sends the same `each` queries in every call."""
    calls = max(20, CALLS // each)
    return callers * calls * each / capacity(address, SEARCH, _requests(queries, callers, each), calls)


def _latency(address: str, queries: np.ndarray) -> float:
    """Return the median milliseconds of a call, for sequential calls by a client in Python."""
    requests: Sequence[pb.SearchRequest] = _requests(queries, 100, 1)
    times = []
    with grpc.insecure_channel(address) as channel:
        # Answers are not parsed: parsing would add the client's time.
        search: Any = channel.unary_unary(SEARCH, request_serializer=pb.SearchRequest.SerializeToString)
        for i in range(ONE_BY_ONE):
            start = perf_counter()
            search(requests[i % len(requests)])
            times.append(1000 * (perf_counter() - start))
    return middle(times)


def _raw(graph: hnswlib.Index, queries: np.ndarray, ef: int) -> float:
    """Return queries per second of hnswlib alone, with 64 queries in a call."""
    graph.set_ef(ef)
    start, count = perf_counter(), 0
    while perf_counter() - start < 0.5:
        for first in range(0, len(queries) - BATCH + 1, BATCH):
            graph.knn_query(queries[first : first + BATCH], K, num_threads=CORES)
            count += BATCH
    return count / (perf_counter() - start)


@contextmanager
def _comparison_server(answer: bytes) -> Iterator[str]:
    """Run a server in a child process that always returns `answer`; yield its address."""
    with tempfile.TemporaryDirectory() as folder:
        address_file, ready = Path(folder) / "address", Path(folder) / "answer"
        ready.write_bytes(answer)
        command = [sys.executable, "-m", "benchmarks.index.rpc", str(address_file), str(ready)]
        child = subprocess.Popen(command)
        try:
            while not address_file.exists():
                if child.poll() is not None:
                    raise RuntimeError("the comparison server ended before it served")
                sleep(0.05)
            yield address_file.read_text()
        finally:
            child.kill()
            child.wait()


async def _serve(address_file: Path, answer: pb.SearchResponse) -> None:
    async def search(request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        return answer

    method = grpc.unary_unary_rpc_method_handler(
        search,
        request_deserializer=pb.SearchRequest.FromString,
        response_serializer=pb.SearchResponse.SerializeToString,
    )
    server = grpc.aio.server()
    service, name = SEARCH.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    temporary = address_file.with_suffix(".part")
    temporary.write_text(f"127.0.0.1:{port}")
    temporary.rename(address_file)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address_file", type=Path)
    parser.add_argument("answer", type=Path, nargs="?")
    arguments = parser.parse_args()
    written = arguments.answer.read_bytes() if arguments.answer else b""
    asyncio.run(_serve(arguments.address_file, pb.SearchResponse.FromString(written)))


if __name__ == "__main__":
    main()
