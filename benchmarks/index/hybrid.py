"""Measure whether hybrid search is better than dense and lexical search.

A corpus in BEIR's format (such as SciFact) is stored in a collection. The script searches for the queries of a split by
dense, lexical and hybrid search, the latter with fusion by scores and by ranks. It measures nDCG@10 and the time of a
query over gRPC. Target: hybrid search with default settings has a greater nDCG@10 than dense and lexical search;
otherwise the exit code is 1.

    python -m benchmarks.index.hybrid FOLDER --model BUNDLE [--split test] [--data-dir FOLDER] [-o RESULT.json]

With --data-dir, the next run uses the same collection again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

from benchmarks.shared import beir
from emberpc.client import Client, NotFound, Record
from emberpc.client.types import Fusion, SearchMode
from examples.server_process import ServerProcess

K = 10
#: Search mode, fusion rule and weight of the dense ranking of each measured run; None: the server's default. `main`
#: compares the first three: dense, lexical, and hybrid search with default settings.
RUNS: tuple[tuple[SearchMode, Fusion | None, float | None], ...] = (
    ("dense", None, None),
    ("lexical", None, None),
    ("hybrid", None, None),
    *(("hybrid", fusion, weight) for fusion in get_args(Fusion) for weight in (0.3, 0.5, 0.7)),
)


def ndcg(ids: list[str], relevant: set[str]) -> float:
    """Return nDCG@10 of a ranking: a relevant id has gain 1, any other id has gain 0.

    Args:
        ids: ids of the hits, best first.
        relevant: ids that are relevant, at least one.
    """
    gains = [1 / math.log2(rank + 2) for rank in range(K)]
    found = sum(gain for gain, key in zip(gains, ids, strict=False) if key in relevant)
    return found / sum(gains[: len(relevant)])


def measure(client: Client, name: str, queries: dict[str, str], judged: dict[str, set[str]]) -> list[dict[str, Any]]:
    """Search for every judged query with the settings of each run of `RUNS`, one query at a time.

    Args:
        client: client of the server.
        name: name of the collection.
        queries: texts of the queries by id.
        judged: ids of the relevant records by the id of the query.

    Returns:
        For each run its settings (`mode`, `fusion`, `dense_weight`), the mean nDCG@10 (`ndcg`), and the mean wall
        milliseconds of a query (`query_ms`).
    """
    rows = []
    for mode, fusion, weight in RUNS:
        total, start = 0.0, perf_counter()
        for key, relevant in judged.items():
            hits = client.search(name, queries[key], top_k=K, mode=mode, fusion=fusion, dense_weight=weight)
            total += ndcg([hit.record.id for hit in hits], relevant)
        milliseconds = 1000 * (perf_counter() - start) / len(judged)
        found = {"ndcg": total / len(judged), "query_ms": milliseconds}
        rows.append({"mode": mode, "fusion": fusion, "dense_weight": weight, **found})
    return rows


def main() -> None:
    """Measure, print all figures, and write them to a JSON file if `--output` is given.

    Then the process ends with exit code 1 if hybrid search with default settings is not better than both others.
    """
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
        how = "" if row["fusion"] is None else f" by {row['fusion']} at {row['dense_weight']}"
        print(f"{row['mode'] + how:24} nDCG@10 {row['ndcg']:.4f}  {row['query_ms']:6.1f} ms a query")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    dense, lexical, both = (row["ndcg"] for row in rows[:3])
    if both <= max(dense, lexical):
        sys.exit("hybrid search is not better than dense or lexical search")


if __name__ == "__main__":
    main()
