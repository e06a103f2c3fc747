"""Measure the recall of a collection: by default, with `min_recall`, and after its records were replaced.

The script also measures the time of searches while records are replaced and graphs are rebuilt.

One collection in this process is filled with the vectors of a file or with synthetic vectors. 500 of the vectors,
chosen at random, are the queries and are not stored. Synthetic vectors are in clusters of about 100, and are easier to
search than embeddings. Recall is measured against a comparison with every vector. Targets, which are not checked:
recall@10 is at least 0.98 by default, and at least 0.95 after half of the records were replaced ten times.

    python -m benchmarks.index.recall [VECTORS.npy] [--records N] [--rounds N] [-o RESULT.json]

VECTORS.npy, float32 (n, dimensions), comes from `benchmarks/index/corpus.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Collection, Index

QUERIES, K, WRITE = 500, 10, 1000
TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
DIMENSIONS, PER_CLUSTER, SIGMA = 384, 100, 0.6


def clustered(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return random vectors of length 1 in clusters of about 100, float32 (count, 384).

    A vector is a random centre of length 1 plus Gaussian noise of a length of about 0.6, then normalized.
    """
    centres = rng.standard_normal((max(1, count // PER_CLUSTER), DIMENSIONS), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    noise = rng.standard_normal((count, DIMENSIONS), dtype=np.float32) * np.float32(SIGMA / DIMENSIONS**0.5)
    return unit(centres[rng.integers(0, len(centres), count)] + noise)


def unit(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix with its rows normalized, as contiguous float32; no row may be zero."""
    return np.ascontiguousarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), dtype=np.float32)


def upsert(collection: Collection, rows: np.ndarray, matrix: np.ndarray) -> None:
    """Upsert records without texts, then run the maintenance, which moves the vectors to the graph.

    Args:
        collection: the collection.
        rows: numbers of the records, which are their ids, int64 (n,).
        matrix: vector of each record, float32 (n, dimensions).
    """
    for first in range(0, len(rows), WRITE):
        part = rows[first : first + WRITE]
        collection.upsert([NewRecord(str(row)) for row in part], matrix[first : first + WRITE])
    collection.maintain()


def replace_half(
    collection: Collection, stored: np.ndarray, queries: np.ndarray, rng: np.random.Generator
) -> tuple[float, list[float]]:
    """Replace the vectors of a random half of the records, and search meanwhile, one query after the other.

    Args:
        collection: the collection.
        stored: the vectors of the collection, float32 (records, dimensions), of length 1; row i is that of the record
            with the id i. The rows are replaced in place, too.
        queries: vectors to search for, float32 (queries, dimensions).
        rng: draws the records and their new vectors.

    Returns:
        Seconds of the writes and of the maintenance after them, together; milliseconds of each search.
    """
    # The records exchange their vectors at random, with a little noise, so that the distribution of the vectors hardly
    # changes.
    rows = rng.permutation(len(stored))[: len(stored) // 2]
    noise = rng.standard_normal((len(rows), stored.shape[1]), dtype=np.float32) * np.float32(0.1 / DIMENSIONS**0.5)
    stored[rows] = unit(stored[rng.permutation(rows)] + noise)
    times: list[float] = []
    start = perf_counter()
    writer = threading.Thread(target=upsert, args=(collection, rows, stored[rows]))
    writer.start()
    while writer.is_alive():
        began = perf_counter()
        collection.search(queries[len(times) % len(queries)][None], K)
        times.append(1e3 * (perf_counter() - began))
    writer.join()
    return perf_counter() - start, times


def measure(collection: Collection, stored: np.ndarray, queries: np.ndarray, **options: float) -> dict[str, Any]:
    """Search for each query with the search options `options`, one call after the other, and return the figures.

    Args:
        collection: the collection.
        stored: all vectors of the collection, float32 (records, dimensions), of length 1.
        queries: vectors to search for, float32 (queries, dimensions), of length 1.
        options: arguments of `Collection.search`, such as `min_recall`.

    Returns:
        The options, recall@10 (a hit counts if its score is at least that of the true tenth, less 1e-5), median and
        99th percentile of the milliseconds of a search, and strategy and ef of the first search.
    """
    bounds = []
    for first in range(0, len(queries), 100):
        scores = queries[first : first + 100] @ stored.T
        bounds += np.partition(scores, -K, axis=1)[:, -K].tolist()
    right, times, plans = 0, [], []
    for query, bound in zip(queries, bounds, strict=True):
        start = perf_counter()
        (outcome,) = collection.search(query[None], K, **options)  # type: ignore[arg-type]  # numbers by name
        times.append(1e3 * (perf_counter() - start))
        right += sum(score >= bound - 1e-5 for _, score in outcome.hits)
        plans.append(outcome.plan)
    return {
        **options,
        "recall": right / (K * len(queries)),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "strategy": plans[0].strategy.value,
        "ef": plans[0].ef,
    }


def run(vectors: np.ndarray, rounds: int, folder: Path) -> dict[str, Any]:
    """Fill a collection with all vectors but 500 random ones, which are the queries, and return its measurements.

    Args:
        vectors: float32 (n, dimensions), of length 1; n must be greater than 500.
        rounds: number of times that half of the records are replaced.
        folder: empty folder for the index.

    Returns:
        `records`: their number. `build_seconds`: seconds to build the collection. `default` and `targets`: results of
        `measure` without options and with each `min_recall`. `meanwhile`: seconds of the replacements, writes per
        second, and milliseconds of searches meanwhile. `after`: the number of rounds, and the result of `measure` after
        them. `meanwhile` and `after` are missing if `rounds` is 0.
    """
    rng = np.random.default_rng(1)
    vectors = vectors[rng.permutation(len(vectors))]
    stored, queries = vectors[:-QUERIES].copy(), vectors[-QUERIES:]
    index = Index(folder)
    collection = index.create(CollectionSpec("recall", vectors.shape[1]))
    start = perf_counter()
    upsert(collection, np.arange(len(stored)), stored)
    result: dict[str, Any] = {"records": len(stored), "build_seconds": perf_counter() - start}
    result["default"] = measure(collection, stored, queries)
    result["targets"] = [measure(collection, stored, queries, min_recall=target) for target in TARGETS]
    seconds, times = 0.0, []
    for _ in range(rounds):
        taken, found = replace_half(collection, stored, queries, rng)
        seconds += taken
        times += found
    if rounds:
        middle, high = np.percentile(times, [50, 99])
        result["meanwhile"] = {
            "seconds": seconds,
            "writes_per_second": rounds * (len(stored) // 2) / seconds,
            "searches": len(times),
            "p50_ms": float(middle),
            "p99_ms": float(high),
            "max_ms": max(times),
        }
        result["after"] = {"rounds": rounds, **measure(collection, stored, queries)}
    index.close()
    return result


def main() -> None:
    """Measure, print the result as JSON, and write it to a file if `--output` is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("vectors", nargs="?", type=Path, help="a .npy file; default: clustered gaussians")
    parser.add_argument("--records", type=int, default=100_000, help="maximum number of vectors to read")
    parser.add_argument("--rounds", type=int, default=10, help="number of times that half of the records are replaced")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.vectors:
        vectors = unit(np.load(arguments.vectors)[: arguments.records])
    else:
        vectors = clustered(arguments.records, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "vectors": "embeddings" if arguments.vectors else "synthetic",
            **run(vectors, arguments.rounds, Path(folder)),
        }
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
