"""Compare the index with raw hnswlib, with a bare RPC server, and with its peers.

All systems get the same vectors, and are measured one after the other: raw hnswlib in this process; emberpc through
gRPC, from upsert to restart; and each peer for which a Python with its packages is given
(`benchmarks/index/peer_process.py`). The first 1,000 vectors of the file are the queries, and are not stored. Recall is
measured against a comparison with every vector. Targets, which are only printed beside the figures:

- Building the graph takes at most 1.15 times as long as raw hnswlib's add_items, with the same parameters and one
  thread. For this target, an index in this process builds the graph of vectors that it has stored before.
- Calls with one vector reach 0.6 of the calls per second of a server with an empty handler, and calls with 64 vectors
  reach 0.8 of raw hnswlib's queries per second with the same ef (`benchmarks/index/rpc.py`, in alternating rounds).
- recall@10 is at least 0.98 by default.

    python -m benchmarks.index.compare VECTORS.npy [--peer chromadb=/path/bin/python] ... [--records N] [-o RESULT.json]

VECTORS.npy comes from `benchmarks/index/corpus.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import hnswlib
import numpy as np

from benchmarks.index import rpc
from benchmarks.shared.load import cpu_seconds, host, resident_megabytes
from emberpc.client import Client, Record
from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Index
from emberpc.server.index.search.recall import MIN_SIZE, load
from examples.server_process import ServerProcess

QUERIES = 1000
K, BATCH, COLLECTION = rpc.K, rpc.BATCH, rpc.COLLECTION
M, EF_CONSTRUCTION = 16, 200
EFS = (10, 20, 50, 100, 200, 400)
#: Number of rounds of `rpc.measure`. In each round the server and the systems that it is compared with are measured.
ROUNDS = 5
#: Number of records that are written after the last snapshot, before the server is killed.
UNSAVED = 3000

Figures = dict[str, Any]


def truth(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the row numbers of the 10 vectors nearest to each query, nearest first, int64 (queries, 10).

    Vectors and queries are float32 matrices with rows of length 1.
    """
    rows = []
    for first in range(0, len(queries), 100):
        rows.append(np.argsort(-(queries[first : first + 100] @ vectors.T), axis=1)[:, :K])
    return np.vstack(rows)


def recall(found: Any, true: np.ndarray) -> float:
    """Return the share of the true nearest vectors that were found, in [0, 1].

    Args:
        found: ids that were found for each query, as numbers or strings of numbers.
        true: row numbers of the true nearest vectors, which are their ids, int64 (queries, K).
    """
    hits = sum(len(set(map(int, ids)) & set(row.tolist())) for ids, row in zip(found, true, strict=True))
    return hits / true.size


def raw_hnswlib(
    vectors: np.ndarray, queries: np.ndarray, true: np.ndarray, folder: Path
) -> tuple[hnswlib.Index, Figures]:
    """Measure hnswlib alone with one thread: building, searching at several ef, saving and loading.

    Args:
        vectors: vectors to add, float32 (n, dimensions), of length 1.
        queries: vectors to search for, float32 (queries, dimensions).
        true: row numbers of the true nearest vectors, int64 (queries, K).
        folder: folder for the saved graph.

    Returns:
        The graph, and the figures; `curve` has queries per second and recall for each ef.
    """
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
    path = folder / "raw.bin"
    graph.save_index(str(path))
    start = perf_counter()
    hnswlib.Index(space="ip", dim=vectors.shape[1]).load_index(str(path))
    restart = {"restart_seconds": perf_counter() - start, "disk_megabytes": path.stat().st_size / 1e6}
    return graph, {**figures, **restart}


def emberpc(
    vectors: np.ndarray, queries: np.ndarray, true: np.ndarray, folder: Path, graph: hnswlib.Index
) -> tuple[Figures, Figures]:
    """Measure an emberpc server: upserts, building of the graph, searches at several ef, memory, disk and restarts.

    Args:
        vectors: vectors to store, float32 (n, dimensions), of length 1.
        queries: vectors to search for, float32 (queries, dimensions).
        true: row numbers of the true nearest vectors, int64 (queries, K).
        folder: data directory of the server; empty or missing.
        graph: hnswlib's graph of the same vectors, for `rpc.measure`.

    Returns:
        The figures of the server, and the result of `rpc.measure`.
    """
    figures: Figures = {}
    with ServerProcess({}, folder) as server, Client(server.address) as client:
        pid = server.process.pid
        figures["empty_megabytes"] = resident_megabytes(pid)
        client.create_collection(COLLECTION, dimensions=vectors.shape[1], m=M, ef_construction=EF_CONSTRUCTION)
        start, cpu = perf_counter(), cpu_seconds(pid)
        records = (Record(id=str(i), metadata={"n": i}) for i in range(len(vectors)))
        client.upsert(COLLECTION, records, vectors=vectors, batch_size=1000)
        figures["upsert_seconds"] = perf_counter() - start
        await_graph(client, queries[0])
        figures["build_seconds"] = perf_counter() - start
        figures["build_cpu_seconds"] = cpu_seconds(pid) - cpu
        await_measured(folder, len(vectors))
        figures["curve"] = [_searched(client, queries, true, ef) for ef in (*EFS, 0)]
        beside = rpc.measure(server.address, graph, queries, ROUNDS)
        figures["megabytes"] = resident_megabytes(pid)
        server.stop()
        figures["disk_megabytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    figures |= restarts(vectors, queries, folder)
    return figures, beside


def restarts(vectors: np.ndarray, queries: np.ndarray, folder: Path) -> Figures:
    """Return the seconds from the server's start to its first response: after a stop, after a kill, without a snapshot.

    Before the kill, the first 3,000 records are written again, and no snapshot has these writes. Before the last start,
    the snapshots of graphs are deleted.

    Args:
        vectors: the vectors of the collection, float32 (n, dimensions).
        queries: the first of them is searched for after each start, float32 (queries, dimensions).
        folder: data directory of the server, which is stopped.
    """
    figures: Figures = {}
    with _restarted(folder, queries[0], figures, "restart_seconds") as server, Client(server.address) as client:
        again = (Record(id=str(i), metadata={"n": i}) for i in range(UNSAVED))
        client.upsert(COLLECTION, again, vectors=vectors[:UNSAVED], batch_size=1000)
        server.kill()
    with _restarted(folder, queries[0], figures, "restart_killed_seconds"):
        pass
    for path in folder.rglob("graph-*"):
        path.unlink()
    with _restarted(folder, queries[0], figures, "restart_without_graph_seconds"):
        pass
    return figures


@contextmanager
def _restarted(folder: Path, query: np.ndarray, figures: Figures, key: str) -> Iterator[ServerProcess]:
    start = perf_counter()
    with ServerProcess({}, folder) as server:
        with Client(server.address) as client:
            client.search(COLLECTION, query)
        figures[key] = perf_counter() - start
        yield server


def graph_seconds(vectors: np.ndarray, folder: Path) -> float:
    """Store the vectors in a collection of a new index in `folder`; then return the seconds to build the graph."""
    index = Index(folder, snapshot_every=2 * len(vectors))
    collection = index.create(CollectionSpec(COLLECTION, vectors.shape[1], m=M, ef_construction=EF_CONSTRUCTION))
    # The vectors are written in parts. The maintenance thread is not woken, since it would start to build the graph
    # during the writes.
    collection._wake = lambda: None
    for first in range(0, len(vectors), 5000):
        part = vectors[first : first + 5000]
        collection.upsert([NewRecord(str(first + i)) for i in range(len(part))], part)
    start = perf_counter()
    # Only the building is timed. So `maintain` is not called, which also writes snapshots and measures recall.
    collection._neighbours.drain(len(vectors), lambda: False)
    seconds = perf_counter() - start
    index.close()
    return seconds


def _searched(client: Client, queries: np.ndarray, true: np.ndarray, ef: int) -> Figures:
    """Search for all queries, 64 in a call, one call at a time, with `ef` (0: the server's default).

    Returns:
        `ef`, the ef that the server used (`plan_ef`), queries per second, and recall@10.
    """
    found: list[list[str]] = []
    start = perf_counter()
    plans = []
    for first in _starts(len(queries)):
        for result in client.search_batch(COLLECTION, list(queries[first : first + BATCH]), top_k=K, ef=ef):
            found.append([hit.record.id for hit in result.hits])
            plans.append(result.plan)
    seconds = perf_counter() - start
    return {
        "ef": ef,
        "plan_ef": plans[0].ef,
        "queries_per_second": len(queries) / seconds,
        "recall": recall(found, true),
    }


def await_graph(client: Client, query: np.ndarray) -> None:
    """Wait until the graph has all vectors: until a search with the query compares no vectors of the buffer.

    The wait also ends if the search does not use the graph, as in a small collection.
    """
    while True:
        plan = client.search_batch(COLLECTION, [query])[0].plan
        if not plan.compared_count or not plan.ef:
            return
        sleep(0.2)


def await_measured(folder: Path, count: int) -> None:
    """Wait until the server has saved a measurement of recall on a graph of more than two thirds of `count` vectors.

    The default ef depends on this measurement. A graph of fewer than 1,000 vectors is not measured, so there is no wait
    for it.
    """
    while count >= MIN_SIZE:
        measured = [load(path.parent) for path in folder.rglob("recall.json")]
        if any(each is not None and not each.outgrown(count) for each in measured):
            return
        sleep(0.2)


def _starts(count: int) -> range:
    return range(0, count, BATCH)


def peer(name: str, python: str, vectors: Path, queries: Path, true: np.ndarray) -> Figures:
    """Measure one peer in its environment, and reopen its data in a second process.

    Args:
        name: name of the peer, as in `peer_process.py`.
        python: Python of the environment where the peer is installed.
        vectors: .npy file of the vectors to store.
        queries: .npy file of the queries.
        true: row numbers of the true nearest vectors, int64 (queries, K).

    Returns:
        The figures that `peer_process.py` prints, with `recall` instead of the ids found.

    Raises:
        RuntimeError: the peer failed; the message is the last line of its stderr, or its exit code.
        TimeoutExpired: one of the two processes took more than an hour.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(Path(__file__).with_name("peer_process.py")), name, str(vectors), str(queries), folder]
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
    """Print the figures of each system, and emberpc's time of building and recall beside their targets.

    Args:
        found: figures by the name of the system; `hnswlib` and `emberpc` must be among them.
    """
    raw, ours = found["hnswlib"], found["emberpc"]
    for name, figures in found.items():
        for point in figures.get("curve", ()):
            print(name, *(f"{key} {value:.4g}" for key, value in point.items()), sep="  ")
        print(name, *(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float)), sep="  ")
    print(f"build, times add_items with one thread (target: 1.15): {ours['graph_seconds'] / raw['build_seconds']:.3f}")
    print(f"recall@10 by default (target: 0.98): {ours['curve'][-1]['recall']:.3f}")


def report_beside(beside: Figures) -> None:
    """Print the result of `rpc.measure`: the figures of each system, and emberpc's shares with the targets."""
    for name, figures in beside["servers"].items():
        print(name, *(f"{key} {value:.4g}" for key, value in figures.items()), sep="  ")
    for what, share in beside["shares"].items():
        print(f"{what}, at ef {beside['ef']} (target: 0.6 of an empty handler, 0.8 of hnswlib): {share:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, nargs="?", help="float32 (count, dimensions), of length 1")
    parser.add_argument("--records", type=int, help="number of vectors to store; default: all but the 1000 queries")
    parser.add_argument("--peer", action="append", default=[], metavar="PEER=PYTHON", help="a peer to measure, too")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
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
        graph, results["hnswlib"] = raw_hnswlib(vectors, queries, true, folder)
        results["emberpc"], beside = emberpc(vectors, queries, true, folder / "data", graph)
        del graph
        for name_beside, figures in beside["servers"].items():
            results[name_beside] = {**results.get(name_beside, {}), **figures}
        results["emberpc"]["graph_seconds"] = graph_seconds(vectors, folder / "graph")
        for entry in arguments.peer:
            peer_name, _, python = entry.partition("=")
            try:
                results[peer_name] = peer(peer_name, python, folder / "vectors.npy", folder / "queries.npy", true)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failed[peer_name] = str(error)
    report(results)
    report_beside(beside)
    for peer_name, reason in failed.items():
        print(f"{peer_name} was not measured: {reason}")
    if arguments.output:
        result = {"host": host(), **found, "index": results, "beside": beside, "failed": failed}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
