"""Compare searches by vector of an emberpc server with gRPC servers that do not search, and with hnswlib.

`benchmarks/index/compare.py` calls `measure`, which compares the emberpc server with three systems:

- a comparison server whose handler returns an empty response;
- a comparison server whose handler always returns the same ten hits, so that gRPC carries about as many bytes;
- hnswlib in the process of the caller, with the ef that the emberpc server reports, and one thread per usable core.

Each server has its own process. Run as a program, this module is a comparison server:

    python -m benchmarks.index.rpc ADDRESS_FILE [RESPONSE]

The program writes its address (host:port) to ADDRESS_FILE. It answers every search with the SearchResponse in the file
RESPONSE (protobuf's wire format), or with an empty response if RESPONSE is not given.
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
#: `CALLERS`: number of concurrent callers that send calls of one query. `CALLS`: number of calls of each of these
#: callers; see `_calls_per_second` for larger calls. `ONE_BY_ONE`: number of sequential calls that measure latency.
CALLERS, CALLS, ONE_BY_ONE = 8, 500, 1000
#: Number of callers that send calls of 64 queries, and of hnswlib's threads: one for each usable core.
CORES = usable_cores()

Figures = dict[str, Any]


def measure(address: str, graph: hnswlib.Index, queries: np.ndarray, rounds: int) -> Figures:
    """Measure an emberpc server, two comparison servers and hnswlib, one after the other in each round.

    Args:
        address: address of the emberpc server, as host:port; the server has the collection `COLLECTION`.
        graph: hnswlib's graph of the vectors in the collection; its ef is changed.
        queries: vectors to search for, float32 (n, dimensions); n is at least 100, and at least 64 times the number of
            usable cores.
        rounds: number of rounds that count, at least 1. One round before them does not count.

    Returns:
        `ef`: the ef that the emberpc server reports for the first query. `rounds`: the argument. `shares`: as
        `_shares` returns them. `servers`: medians over the rounds, by the name of the system. For each server,
        `queries_per_second_1` is measured with 8 concurrent callers and one query in a call, and `latency_ms` with one
        caller. For `emberpc` and `hnswlib`, `queries_per_second_64` is measured with 64 queries in a call.

    Raises:
        RuntimeError: a comparison server ended, or h2load reports a failed call (see `capacity`).
        FileNotFoundError: h2load is not installed.
        grpc.RpcError: a call of the Python client failed.
    """
    found: dict[str, list[Figures]] = {"emberpc": [], "empty handler": [], "ten ready hits": [], "hnswlib": []}
    with grpc.insecure_channel(address) as channel:
        response = index_pb2_grpc.IndexServiceStub(channel).Search(_requests(queries, 1, 1)[0])
    ef = response.results[0].plan.ef
    with ExitStack() as stack:
        addresses = {
            "emberpc": address,
            "empty handler": stack.enter_context(_comparison_server(b"")),
            "ten ready hits": stack.enter_context(_comparison_server(response.SerializeToString())),
        }
        # The first round does not count: its searches may be the first to read the records of the hits from disk.
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
    """Return emberpc's speed divided by that of another system, by figure and system: medians over the rounds.

    For latency, the other system's time is divided by emberpc's time. So a greater share is always better for emberpc.

    Args:
        found: by the name of the system, its figures in each round.
    """

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
    """Return how many queries per second a server answers to concurrent callers, measured with h2load.

    A caller makes 500 // `each` sequential calls, but at least 20. All calls of a caller have the same queries, and
    each caller has queries of its own. The exceptions are those of `capacity`.

    Args:
        address: address of the server, as host:port.
        queries: vectors to search for, float32 (at least `callers` * `each`, dimensions).
        callers: number of concurrent callers.
        each: number of queries in a call.
    """
    calls = max(20, CALLS // each)
    return callers * calls * each / capacity(address, SEARCH, _requests(queries, callers, each), calls)


def _latency(address: str, queries: np.ndarray) -> float:
    """Return the median milliseconds of a call with one query, for 1,000 sequential calls by a client in Python.

    The calls send the first 100 queries in turn. `queries` has at least 100 rows.
    """
    requests: Sequence[pb.SearchRequest] = _requests(queries, 100, 1)
    times = []
    with grpc.insecure_channel(address) as channel:
        # Responses are not decoded, since decoding would add time of the client to that of the server.
        search: Any = channel.unary_unary(SEARCH, request_serializer=pb.SearchRequest.SerializeToString)
        for i in range(ONE_BY_ONE):
            start = perf_counter()
            search(requests[i % len(requests)])
            times.append(1000 * (perf_counter() - start))
    return middle(times)


def _raw(graph: hnswlib.Index, queries: np.ndarray, ef: int) -> float:
    """Search with hnswlib, 64 queries in a call on `CORES` threads; return queries per second.

    All queries up to the last full 64 are searched for, again and again until half a second has passed. The graph
    keeps the ef that is set here.
    """
    graph.set_ef(ef)
    start, count = perf_counter(), 0
    while perf_counter() - start < 0.5:
        for first in range(0, len(queries) - BATCH + 1, BATCH):
            graph.knn_query(queries[first : first + BATCH], K, num_threads=CORES)
            count += BATCH
    return count / (perf_counter() - start)


@contextmanager
def _comparison_server(response: bytes) -> Iterator[str]:
    """Run a server in a child process that always returns the same SearchResponse; yield its address, as host:port.

    `response` is the SearchResponse in protobuf's wire format. The child is killed at the end of the block.

    Raises:
        RuntimeError: the server ended before it served.
    """
    with tempfile.TemporaryDirectory() as folder:
        address_file, ready = Path(folder) / "address", Path(folder) / "response"
        ready.write_bytes(response)
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


async def _serve(address_file: Path, response: pb.SearchResponse) -> None:
    async def search(request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        return response

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
    parser.add_argument("response", type=Path, nargs="?")
    arguments = parser.parse_args()
    written = arguments.response.read_bytes() if arguments.response else b""
    asyncio.run(_serve(arguments.address_file, pb.SearchResponse.FromString(written)))


if __name__ == "__main__":
    main()
