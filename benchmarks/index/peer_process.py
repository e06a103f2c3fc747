"""Measure one peer of the index, another vector database, in an environment of its own.

    python -m benchmarks.index.peer_process PEER VECTORS.npy QUERIES.npy FOLDER [reopen]

PEER is chromadb, lancedb, milvus-lite or qdrant-local. The script needs the packages of that peer and numpy only. It
stores the vectors in FOLDER and searches for the queries. A peer with an HNSW index gets emberpc's M 16 and
efConstruction 200, and ef 200. The last line printed is JSON: seconds to store and index the vectors, queries per
second with 1 and with 64 queries in a call, megabytes in memory and on disk, and the ids of the 10 hits of each query.
With `reopen`, the script opens the data of an earlier run instead, and the JSON has the seconds to the first response.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Search = Callable[[Any], list[list[int]]]
K = 10
_ADDED_AT_A_TIME = 5000


def chromadb(vectors: Any, folder: Path) -> tuple[Callable[[], None], Callable[[], Search]]:
    peer = import_module("chromadb")
    settings = import_module("chromadb.config").Settings(anonymized_telemetry=False)
    client = peer.PersistentClient(str(folder), settings=settings)

    def fill() -> None:
        hnsw = {"space": "cosine", "max_neighbors": 16, "ef_construction": 200, "ef_search": 200}
        collection = client.create_collection("vectors", configuration={"hnsw": hnsw})
        step = min(_ADDED_AT_A_TIME, client.get_max_batch_size())
        for start in range(0, len(vectors), step):
            part = vectors[start : start + step]
            collection.add(ids=[str(start + i) for i in range(len(part))], embeddings=part)

    def opened() -> Search:
        collection = client.get_collection("vectors")
        return lambda queries: [
            [int(each) for each in ids]
            for ids in collection.query(query_embeddings=queries, n_results=K, include=[])["ids"]
        ]

    return fill, opened


def lancedb(vectors: Any, folder: Path) -> tuple[Callable[[], None], Callable[[], Search]]:
    pa = import_module("pyarrow")
    database = import_module("lancedb").connect(str(folder))

    def fill() -> None:
        width = vectors.shape[1]
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), width))])
        table = database.create_table("t", schema=schema)
        for start in range(0, len(vectors), _ADDED_AT_A_TIME):
            part = vectors[start : start + _ADDED_AT_A_TIME]
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
            ids = pa.array(np.arange(start, start + len(part)))
            table.add(pa.table({"id": ids, "vector": column}))
        # LanceDB builds an HNSW graph of quantized vectors for each partition. With one partition, there is one graph
        # of all vectors, as in emberpc.
        table.create_index(
            metric="cosine",
            vector_column_name="vector",
            index_type="IVF_HNSW_SQ",
            num_partitions=1,
            m=16,
            ef_construction=200,
        )

    def opened() -> Search:
        table = database.open_table("t")

        def search(queries: Any) -> list[list[int]]:
            found: list[list[int]] = [[] for _ in queries]
            rows = (
                table.search(queries)
                .distance_type("cosine")
                .ef(200)
                .refine_factor(2)
                .limit(K)
                .select(["id"])
                .to_arrow()
            )
            numbers = rows["query_index"].to_pylist() if "query_index" in rows.column_names else [0] * len(rows)
            for number, each in zip(numbers, rows["id"].to_pylist(), strict=True):
                found[number].append(each)
            return found

        return search

    return fill, opened


def milvus_lite(vectors: Any, folder: Path) -> tuple[Callable[[], None], Callable[[], Search]]:
    client = import_module("pymilvus").MilvusClient(str(folder / "milvus.db"))

    def fill() -> None:
        index = client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
        client.create_collection(
            "vectors", dimension=vectors.shape[1], metric_type="COSINE", consistency_level="Strong", index_params=index
        )
        for start in range(0, len(vectors), 1000):
            client.insert(
                "vectors",
                [{"id": start + i, "vector": vector} for i, vector in enumerate(vectors[start : start + 1000])],
            )
        client.flush("vectors")

    def opened() -> Search:
        client.load_collection("vectors")

        def search(queries: Any) -> list[list[int]]:
            results = client.search("vectors", data=list(queries), limit=K, search_params={"params": {"ef": 200}})
            return [[hit["id"] for hit in hits] for hits in results]

        return search

    return fill, opened


def qdrant_local(vectors: Any, folder: Path) -> tuple[Callable[[], None], Callable[[], Search]]:
    peer = import_module("qdrant_client")
    models = peer.models
    client = peer.QdrantClient(path=str(folder))

    def fill() -> None:
        size = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
        client.create_collection("vectors", vectors_config=size)
        client.upload_collection("vectors", vectors=vectors, ids=range(len(vectors)), batch_size=1000)

    def opened() -> Search:
        def search(queries: Any) -> list[list[int]]:
            requests = [models.QueryRequest(query=query.tolist(), limit=K) for query in queries]
            return [[point.id for point in each.points] for each in client.query_batch_points("vectors", requests)]

        return search

    return fill, opened


PEERS = {"chromadb": chromadb, "lancedb": lancedb, "milvus-lite": milvus_lite, "qdrant-local": qdrant_local}


def rate(search: Search, queries: Any, batch: int, seconds: float) -> float:
    """Search repeatedly for `seconds`, one call after the other; return queries per second.

    A call has `batch` queries. One call before the measurement does not count, since a peer may load data then.
    """
    search(queries[:batch])
    start, done = perf_counter(), 0
    while perf_counter() - start < seconds:
        first = done % (len(queries) - batch + 1)
        search(queries[first : first + batch])
        done += batch
    return done / (perf_counter() - start)


def main() -> None:
    peer, vectors_path, queries_path, folder = sys.argv[1:5]
    vectors, queries = np.load(vectors_path), np.load(queries_path)
    fill, opened = PEERS[peer](vectors, Path(folder))
    figures: dict[str, Any] = {}
    start = perf_counter()
    if "reopen" in sys.argv:
        opened()(queries[:1])
        print(json.dumps({"restart_seconds": perf_counter() - start}))
        return
    fill()
    figures["build_seconds"] = perf_counter() - start
    search = opened()
    figures["found"] = [ids for first in range(0, len(queries), 50) for ids in search(queries[first : first + 50])]
    figures["queries_per_second_1"] = rate(search, queries, 1, 5)
    figures["queries_per_second_64"] = rate(search, queries, 64, 5)
    figures["megabytes"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    figures["disk_megabytes"] = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
