"""Does hybrid search find more than either of its parts?

A corpus of BEIR's form (such as SciFact) in a collection, its test queries by
likeness, by words, and by both: nDCG@10, and the time of a query over gRPC.
Asked: both together beat each alone.

    python benchmarks/hybrid.py FOLDER --model BUNDLE [--split test] [--data-dir FOLDER] [-o RESULT.json]

A data directory keeps the collection for the next run.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import beir
from emberpc.client import Client, NotFound, Record
from emberpc.client.types import SearchMode
from server_process import ServerProcess

K = 10
#: How much likeness weighs against words.
RUNS: tuple[tuple[SearchMode, float | None], ...] = (
    ("dense", None),
    ("lexical", None),
    ("hybrid", 0.3),
    ("hybrid", None),
    ("hybrid", 0.7),
)


def ndcg(ids: list[str], relevant: set[str]) -> float:
    """Return the normalised discounted cumulative gain of the first K, each relevant or not."""
    gains = [1 / math.log2(rank + 2) for rank in range(K)]
    found = sum(gain for gain, key in zip(gains, ids, strict=False) if key in relevant)
    return found / sum(gains[: len(relevant)])


def measure(client: Client, name: str, queries: dict[str, str], judged: dict[str, set[str]]) -> list[dict[str, Any]]:
    """Ask every judged query in every way."""
    rows = []
    for mode, weight in RUNS:
        total, start = 0.0, perf_counter()
        for key, relevant in judged.items():
            hits = client.search(name, queries[key], top_k=K, mode=mode, dense_weight=weight)
            total += ndcg([hit.record.id for hit in hits], relevant)
        milliseconds = 1000 * (perf_counter() - start) / len(judged)
        rows.append({"mode": mode, "dense_weight": weight, "ndcg": total / len(judged), "query_ms": milliseconds})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    corpus, queries = beir.texts(options.folder / "corpus.jsonl"), beir.texts(options.folder / "queries.jsonl")
    judged = beir.judgements(options.folder, options.split)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ServerProcess({"model": options.model}, options.data_dir or Path(scratch)) as server,
        Client(server.address, timeout=300) as client,
    ):
        try:
            done = {record.id for record in client.records("corpus", page_size=1000)}
        except NotFound:
            client.create_collection("corpus", model="model", truncation="end")
            done = set()
        client.upsert("corpus", (Record(key, text) for key, text in corpus.items() if key not in done))
        rows = measure(client, "corpus", queries, judged)
    for row in rows:
        weight = "" if row["dense_weight"] is None else f" at {row['dense_weight']}"
        print(f"{row['mode'] + weight:14} nDCG@10 {row['ndcg']:.4f}  {row['query_ms']:6.1f} ms a query")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
