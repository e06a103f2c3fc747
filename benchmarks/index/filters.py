"""Measure recall and time of filtered searches.

The index runs in this process, with one query at a time. The vectors are those of a file, of which the first 300 are
the queries and are not stored, or synthetic clusters. For each of several shares of the records, filters match this
share, and the script measures recall@10 against a comparison with every matching vector. It measures the time of
queries whose filter was used before (such as a tenant or a language) and of queries with a new filter. Targets, which
are not checked: a recall of at least 0.98 at every share, and, if 1 % of the records match, a 99th percentile of the
time of at most three times that of searches without a filter.

    python -m benchmarks.index.filters [VECTORS.npy] [--records 100000] [--folder FOLDER] [-o RESULT.json]

VECTORS.npy, float32 (n, 384) of length 1, comes from `benchmarks/index/corpus.py`. With --folder, the next run with
the same number of vectors uses the same collection again, so the vectors must be the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.collections.filters import AllOf, Comparison, Filter, Operator
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index

DIMENSIONS, K, QUERIES = 384, 10, 300
SHARES = (0.5, 0.1, 0.01, 0.0001)
#: Number of different filters for each share. A filter is new for its first query, and known for its other queries.
FILTERS = 30
#: Number of records in one write.
BATCH = 1000


def clustered(records: int) -> tuple[np.ndarray, np.ndarray]:
    """Return synthetic vectors and queries of length 1, drawn from 1000 Gaussians.

    Searches of these vectors have a higher recall than searches of real embeddings.

    Returns:
        The vectors, float32 (records, 384), and the queries, float32 (300, 384).
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, DIMENSIONS), dtype=np.float32)
    drawn = centres[rng.integers(0, len(centres), records + QUERIES)]
    drawn += np.float32(0.6) * rng.standard_normal(drawn.shape, dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn[:records], drawn[records:]


def filled(index: Index, name: str, vectors: np.ndarray, fields: tuple[str, ...]) -> Collection:
    """Return the collection `name`. If it does not exist, create it, insert the vectors, and build the graph.

    At most 4,000 vectors of a new collection are not in the graph. Each record has the number of `place` in two
    metadata fields, `plain` and `indexed`. `fields` are the fields that get an index. An existing collection is not
    compared with `vectors` and `fields`.
    """
    try:
        return index.get(name)
    except ServiceError as error:
        if error.code is not Code.NOT_FOUND:
            raise
    collection = index.create(CollectionSpec(name, DIMENSIONS, indexed_fields=fields))
    for first in range(0, len(vectors), BATCH):
        rows = range(first, min(first + BATCH, len(vectors)))
        new = [NewRecord(str(i), metadata={"plain": place(i), "indexed": place(i)}) for i in rows]
        collection.upsert(new, vectors[first : first + BATCH])
    while collection.search(vectors[:1], 1)[0].plan.compared_count > BATCH * 4:
        collection.maintain()
    return collection


def place(i: int) -> int:
    """Return a number from 0 to 2**31 - 1 that looks random, and differs for each i in that range."""
    return i * 1_103_515_245 % 2**31


def window(field: str, start: float, share: float) -> Filter:
    """Return a filter that matches a range of the numbers that `place` returns.

    Args:
        field: the metadata field.
        start: start of the range, as a share of 2**31, in [0, 1).
        share: length of the range, as a share of 2**31: about this share of the records matches, if start + share is
            at most 1.
    """
    low, high = start * 2**31, (start + share) * 2**31
    return AllOf((Comparison(field, Operator.GREATER_OR_EQUAL, low), Comparison(field, Operator.LESS, high)))


def timed(collection: Collection, query: np.ndarray, condition: Filter | None) -> tuple[float, Any]:
    """Search for the 10 nearest records that meet `condition` (None: all); return the milliseconds and the outcome."""
    start = perf_counter()
    (outcome,) = collection.search(query[None], K, conditions=[condition])
    return 1000 * (perf_counter() - start), outcome


def percentiles(times: list[float]) -> dict[str, float]:
    """Return the median (`p50_ms`) and the 99th percentile (`p99_ms`) of times in milliseconds."""
    return {"p50_ms": float(np.median(times)), "p99_ms": float(np.percentile(times, 99))}


def measure(
    collection: Collection, vectors: np.ndarray, queries: np.ndarray, field: str, share: float
) -> dict[str, Any]:
    """Measure searches with 30 filters that each match a share of the records.

    Args:
        collection: a collection that `filled` returned.
        vectors: the vectors of the collection.
        queries: vectors to search for, more than 30, divided among the filters. The first query of a filter is a search
            with a new filter; the others are searches with a known filter.
        field: the metadata field of the filters.
        share: share of the records that a filter matches.

    Returns:
        `share` and `field`; `recall` (recall@10 of all searches); `strategies` of the plans; `known` and `new`: median
        and 99th percentile of the milliseconds of searches with a known and with a new filter.
    """
    places = np.array([place(i) for i in range(len(vectors))])
    starts = np.linspace(0, 1 - share, FILTERS)
    first: list[float] = []
    again: list[float] = []
    outcomes = []
    for n, start in enumerate(starts):
        condition = window(field, float(start), share)
        for i, query in enumerate(queries[n::FILTERS]):
            taken, outcome = timed(collection, query, condition)
            (again if i else first).append(taken)
            outcomes.append((start, query, outcome))
    hits = wanted = 0
    # Recall is computed after all searches are timed, since computing it fills the processor's caches with other data.
    for start, query, outcome in outcomes:
        allowed = np.flatnonzero((places >= start * 2**31) & (places < (start + share) * 2**31))
        true = {str(allowed[j]) for j in np.argsort(-(vectors[allowed] @ query))[:K]}
        hits, wanted = hits + len(true & {record.id for record, _ in outcome.hits}), wanted + len(true)
    strategies = {outcome.plan.strategy.value for _, _, outcome in outcomes}
    figures = {"share": share, "field": field, "strategies": sorted(strategies), "recall": hits / max(1, wanted)}
    return {**figures, "known": percentiles(again), "new": percentiles(first)}


def main() -> None:
    """Measure, print all figures, and write them to a JSON file if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", nargs="?", type=Path, help="a .npy file; default: clustered gaussians")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.vectors:
        every = np.load(options.vectors)[: options.records + QUERIES]
        vectors, queries = every[QUERIES:], every[:QUERIES]
    else:
        vectors, queries = clustered(options.records)
    with tempfile.TemporaryDirectory() as scratch, closing(Index(options.folder or Path(scratch))) as index:
        collection = filled(index, f"filters-{len(vectors)}", vectors, ("indexed",))
        timed(collection, queries[0], None)
        unfiltered = percentiles([timed(collection, query, None)[0] for query in queries])
        print(f"no filter: p50 {unfiltered['p50_ms']:.2f} ms, p99 {unfiltered['p99_ms']:.2f} ms")
        rows = [
            measure(collection, vectors, queries, field, share) for field in ("plain", "indexed") for share in SHARES
        ]
        for row in rows:
            print(
                f"{row['field']:8} {row['share']:7.2%} {'+'.join(row['strategies']):10} recall {row['recall']:.3f}  "
                f"known p50 {row['known']['p50_ms']:.2f} p99 {row['known']['p99_ms']:.2f} ms  "
                f"new p50 {row['new']['p50_ms']:.2f} p99 {row['new']['p99_ms']:.2f} ms"
            )
        size = collection.info().size_bytes
    kind = "embeddings" if options.vectors else "synthetic"
    result = {"records": len(vectors), "vectors": kind, "size_bytes": size, "unfiltered": unfiltered, "filtered": rows}
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
