"""How does the index compare with the graph that it is made of, with the bare RPC layer, and with its peers?

The same vectors for all, one after the other: raw hnswlib in process; emberpc
through gRPC, from upsert to restart; and each peer for whose packages a Python
is given (`benchmarks/index_peers.py`). The truth is every vector compared.
Asked: building takes at most 1.15 times raw hnswlib's add_items at the same
parameters and threads; a search by one vector has 0.6 of the calls a second
that a server with an empty handler answers; 64 at a time have 0.8 of raw
hnswlib's queries a second; recall@10 is 0.98 by default.

    python benchmarks/index.py VECTORS.npy [--peer chromadb=/path/bin/python] ... [--records N] [-o RESULT.json]

VECTORS.npy comes from `benchmarks/corpus.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import grpc.aio
import hnswlib
import numpy as np

from emberpc.client import Client, Record
from emberpc.server.cores import usable_cores
from emberpc.server.index import CollectionSpec, Index, NewRecord
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import vectors as wire
from load import capacity, cpu_seconds, host, middle, resident_megabytes
from server_process import ServerProcess

QUERIES, K, BATCH = 1000, 10, 64
M, EF_CONSTRUCTION = 16, 200
EFS = (10, 20, 50, 100, 200, 400)
CALLERS, CALLS = 8, 500
CORES = usable_cores()
#: What the server chooses for K hits.
DEFAULT_EF = 200
SEARCH = "/emberpc.v1.IndexService/Search"

Figures = dict[str, Any]


def truth(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the true nearest, int64 (queries, K), of vectors of length 1."""
    rows = []
    for first in range(0, len(queries), 100):
        rows.append(np.argsort(-(queries[first : first + 100] @ vectors.T), axis=1)[:, :K])
    return np.vstack(rows)


def recall(found: Any, true: np.ndarray) -> float:
    """Return the share of the true nearest that was found."""
    hits = sum(len(set(map(int, ids)) & set(row.tolist())) for ids, row in zip(found, true, strict=True))
    return hits / true.size


def raw_hnswlib(vectors: np.ndarray, queries: np.ndarray, true: np.ndarray, folder: Path) -> Figures:
    """Measure the library alone, with one thread."""
    graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
    graph.init_index(len(vectors), ef_construction=EF_CONSTRUCTION, M=M)
    start, cpu = perf_counter(), process_time()
    graph.add_items(vectors, num_threads=1)
    figures: Figures = {"build_seconds": perf_counter() - start, "build_cpu_seconds": process_time() - cpu}
    curve = []
    for ef in EFS:
        graph.set_ef(ef)
        start = perf_counter()
        found = [
            graph.knn_query(queries[first : first + BATCH], K, num_threads=1)[0] for first in _starts(len(queries))
        ]
        curve.append(
            {
                "ef": ef,
                "queries_per_second": len(queries) / (perf_counter() - start),
                "recall": recall(np.vstack(found), true),
            }
        )
    figures["curve"] = curve
    graph.set_ef(DEFAULT_EF)
    start = perf_counter()
    for first in _starts(len(queries)):
        graph.knn_query(queries[first : first + BATCH], K, num_threads=CORES)
    figures["queries_per_second_64"] = len(queries) / (perf_counter() - start)
    path = folder / "raw.bin"
    graph.save_index(str(path))
    start = perf_counter()
    hnswlib.Index(space="ip", dim=vectors.shape[1]).load_index(str(path))
    return {**figures, "restart_seconds": perf_counter() - start, "disk_megabytes": path.stat().st_size / 1e6}


def emberpc(vectors: np.ndarray, queries: np.ndarray, true: np.ndarray, folder: Path) -> Figures:
    """Measure the server, from the first record to the search after a restart."""
    figures: Figures = {}
    with ServerProcess({}, folder) as server, Client(server.address) as client:
        pid = server.process.pid
        figures["empty_megabytes"] = resident_megabytes(pid)
        client.create_collection("c", dimensions=vectors.shape[1], m=M, ef_construction=EF_CONSTRUCTION)
        start, cpu = perf_counter(), cpu_seconds(pid)
        records = (Record(id=str(i), metadata={"n": i}) for i in range(len(vectors)))
        client.upsert("c", records, vectors=vectors, batch_size=1000)
        figures["upsert_seconds"] = perf_counter() - start
        _await_graph(client, queries[0])
        figures["build_seconds"] = perf_counter() - start
        figures["build_cpu_seconds"] = cpu_seconds(pid) - cpu
        figures["curve"] = [_searched(client, queries, true, ef) for ef in (*EFS, 0)]
        figures["queries_per_second_1"] = _searches_per_second(server.address, queries)
        figures["queries_per_second_64"] = _searches_per_second(server.address, queries, CORES, BATCH)
        figures["megabytes"] = resident_megabytes(pid)
        server.stop()
        figures["disk_megabytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    start = perf_counter()
    with ServerProcess({}, folder) as server, Client(server.address) as client:
        client.search("c", queries[0])
        figures["restart_seconds"] = perf_counter() - start
    return figures


def graph_seconds(vectors: np.ndarray, folder: Path) -> float:
    """Return the seconds that the graph takes to be built of vectors that are all there."""
    index = Index(folder, snapshot_every=2 * len(vectors))
    collection = index.create(CollectionSpec("c", vectors.shape[1], m=M, ef_construction=EF_CONSTRUCTION))
    # In pieces, with nothing said of them to the maintenance thread before the last.
    collection._wake = lambda: None  # it would begin at once, beside the writes
    for first in range(0, len(vectors), 5000):
        part = vectors[first : first + 5000]
        collection.upsert([NewRecord(str(first + i)) for i in range(len(part))], part)
    start = perf_counter()
    # Without what maintenance does beside: snapshots, and measuring recall.
    collection._neighbours.drain(len(vectors), lambda: False)
    seconds = perf_counter() - start
    index.close()
    return seconds


def _searched(client: Client, queries: np.ndarray, true: np.ndarray, ef: int) -> Figures:
    """Search for all queries, 64 in a call, one call at a time."""
    found: list[list[str]] = []
    start = perf_counter()
    plans = []
    for first in _starts(len(queries)):
        for result in client.search_batch("c", list(queries[first : first + BATCH]), top_k=K, ef=ef):
            found.append([hit.record.id for hit in result.hits])
            plans.append(result.plan)
    seconds = perf_counter() - start
    return {
        "ef": ef,
        "plan_ef": plans[0].ef,
        "queries_per_second": len(queries) / seconds,
        "recall": recall(found, true),
    }


def _searches_per_second(address: str, queries: np.ndarray, callers: int = CALLERS, each: int = 1) -> float:
    """Return the queries a second of callers who each send the same so many queries again and again."""
    requests = []
    for first in range(0, callers * each, each):
        wanted = [pb.SearchQuery(vector=wire.encode(query[None])) for query in queries[first : first + each]]
        requests.append(pb.SearchRequest(collection="c", queries=wanted, top_k=K))
    calls = max(20, CALLS // each)
    return middle([callers * calls * each / capacity(address, SEARCH, requests, calls) for _ in range(3)])


def _await_graph(client: Client, query: np.ndarray) -> None:
    """Wait until the newest vectors, those compared one by one, get no fewer."""
    before = -1
    while (waiting := client.search_batch("c", [query])[0].plan.compared_count) != before:
        before = waiting
        sleep(1)


def _starts(count: int) -> range:
    return range(0, count, BATCH)


def bare(queries: np.ndarray) -> float:
    """Return the calls a second of a server whose handler does nothing, asked as emberpc is."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "address"
        child = subprocess.Popen([sys.executable, __file__, "--empty-handler", str(said)])
        try:
            while not said.exists():
                sleep(0.1)
            return _searches_per_second(said.read_text(), queries)
        finally:
            child.kill()
            child.wait()


async def _serve_nothing(said: Path) -> None:
    async def search(request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        return pb.SearchResponse()

    method = grpc.unary_unary_rpc_method_handler(
        search,
        request_deserializer=pb.SearchRequest.FromString,
        response_serializer=pb.SearchResponse.SerializeToString,
    )
    server = grpc.aio.server()
    service, name = SEARCH.strip("/").split("/")
    server.add_registered_method_handlers(service, {name: method})
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    temporary = said.with_suffix(".part")
    temporary.write_text(f"127.0.0.1:{port}")
    temporary.rename(said)
    await server.wait_for_termination()


def peer(name: str, python: str, vectors: Path, queries: Path, true: np.ndarray) -> Figures:
    """Run one peer in its environment, then open what it left in a second process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).with_name("index_peers.py")), name, str(vectors), str(queries), folder]
        figures: Figures = {}
        for step in ([], ["reopen"]):
            run = subprocess.run([*command, *step], check=False, capture_output=True, text=True, timeout=3600)
            if run.returncode:
                raise RuntimeError(
                    run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit {run.returncode}"
                )
            figures |= json.loads(run.stdout.splitlines()[-1])
    figures["recall"] = recall(figures.pop("found"), true)
    return figures


def report(found: Figures) -> None:
    """Print the figures and the ratios that were asked for."""
    raw, ours = found["hnswlib"], found["emberpc"]
    for name, figures in found.items():
        for point in figures.get("curve", ()):
            print(name, *(f"{key} {value:.4g}" for key, value in point.items()), sep="  ")
        print(name, *(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)), sep="  ")
    default = ours["curve"][-1]
    ratios = {
        "build, times add_items with one thread (asked: 1.15)": ours["graph_seconds"] / raw["build_seconds"],
        "one vector a call, of an empty handler (asked: 0.6)": ours["queries_per_second_1"]
        / found["empty handler"]["queries_per_second_1"],
        "64 a call, of knn_query on as many cores (asked: 0.8)": ours["queries_per_second_64"]
        / raw["queries_per_second_64"],
        "recall@10 by default (asked: 0.98)": default["recall"],
    }
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, nargs="?", help="float32 (count, dimensions), of length 1")
    parser.add_argument("--records", type=int, help="how many of them to store; default: all but 1000, the queries")
    parser.add_argument("--peer", action="append", default=[], metavar="PEER=PYTHON", help="a peer to measure, too")
    parser.add_argument("-o", "--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--empty-handler", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.empty_handler:
        asyncio.run(_serve_nothing(arguments.empty_handler))
        return
    every = np.load(arguments.vectors)
    queries, vectors = every[:QUERIES], every[QUERIES:][: arguments.records]
    true = truth(vectors, queries)
    found: Figures = {"records": len(vectors)}
    failed = {}
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "queries.npy", queries)
        results["hnswlib"] = raw_hnswlib(vectors, queries, true, folder)
        results["empty handler"] = {"queries_per_second_1": bare(queries)}
        results["emberpc"] = emberpc(vectors, queries, true, folder / "data")
        results["emberpc"]["graph_seconds"] = graph_seconds(vectors, folder / "graph")
        for entry in arguments.peer:
            peer_name, _, python = entry.partition("=")
            try:
                results[peer_name] = peer(peer_name, python, folder / "vectors.npy", folder / "queries.npy", true)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed[peer_name] = str(error)
    report(results)
    for peer_name, reason in failed.items():
        print(f"{peer_name} was not measured: {reason}")
    if arguments.output:
        result = {"host": host(), **found, "index": results, "failed": failed}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
