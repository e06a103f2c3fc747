"""Measure whether hybrid search is at least as good as dense and lexical search.

Each DATA is one of these, and is stored in a collection of its own:

- a folder in BEIR's format, such as SciFact: `corpus.jsonl`, `queries.jsonl` and judgements of a split;
- a folder with `train.csv` and `test.csv` (columns text and label): the queries are test texts, and the training texts
  with the label of a query are relevant for it;
- `docstrings`: the queries are first paragraphs of docstrings of Python's standard library, and the other paragraphs of
  the docstring are relevant.

The script searches by dense, lexical and hybrid search, the latter with each fusion rule and several weights, and
measures nDCG@10. Target: with default settings, hybrid search loses at most 0.5 points to the better of the two others
on each data set; otherwise the exit code is 1.

    python -m benchmarks.index.hybrid DATA… --model BUNDLE [--split test] [--max-queries 500] [--max-records 10000]
        [-o RESULT.json] [--flags="FLAGS OF THE SERVER"]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared import beir
from benchmarks.shared.load import host
from emberpc.client import Client, Record
from emberpc.client.types import Fusion, SearchMode
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.stdlib_texts import read_stdlib
from examples.server_process import ServerProcess

K = 10
#: Greatest loss of hybrid search to the better of its parts, in nDCG@10.
LOSS = 0.005
#: Search mode, fusion rule and weight of the dense ranking of each measured run; None: the server's default.
RUNS: tuple[tuple[SearchMode, Fusion | None, float | None], ...] = (
    ("dense", None, None),
    ("lexical", None, None),
    ("hybrid", None, None),
    *(("hybrid", "bounds", weight) for weight in (0.5, 0.6, 0.8)),
    *(("hybrid", "scores", weight) for weight in (0.5, 0.7)),
    ("hybrid", "ranks", 0.5),
)


@dataclass(frozen=True)
class Task:
    """Records and queries, each text by its id, and the ids of the relevant records by the id of the query."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    judged: dict[str, set[str]]


def ndcg(ids: list[str], relevant: set[str]) -> float:
    """Return nDCG@10 of a ranking: a relevant id has gain 1, any other id has gain 0.

    Args:
        ids: ids of the hits, best first.
        relevant: ids that are relevant, at least one.
    """
    gains = [1 / math.log2(rank + 2) for rank in range(K)]
    found = sum(gain for gain, key in zip(gains, ids, strict=False) if key in relevant)
    return found / sum(gains[: len(relevant)])


def read_task(data: str, split: str, max_queries: int, max_records: int) -> Task:
    """Read a data set. Queries, and records of a folder with labels, are drawn at random with a fixed seed."""
    folder, generator = Path(data), random.Random(0)
    if data == "docstrings":
        pairs = (doc.text.partition("\n\n")[::2] for doc in read_stdlib())
        found = {" ".join(first.split()): " ".join(rest.split()) for first, rest in pairs if len(rest) >= 80}
        corpus = dict(zip(map(str, range(len(found))), found.values(), strict=True))
        queries = dict(zip(corpus, found, strict=True))
        judged = {key: {key} for key in corpus}
    elif (folder / "corpus.jsonl").exists():
        corpus, queries = beir.texts(folder / "corpus.jsonl"), beir.texts(folder / "queries.jsonl")
        judged = beir.judgements(folder, split)
    else:
        files = (read_labelled(folder / f"{part}.csv") for part in ("train", "test"))
        train, test = (
            [(text, label) for text, (label,) in zip(each.texts, each.labels, strict=True)] for each in files
        )
        train = generator.sample(train, min(len(train), max_records))
        corpus = {str(row): text for row, (text, _) in enumerate(train)}
        queries = {str(row): text for row, (text, _) in enumerate(test)}
        relevant: dict[str, set[str]] = {}
        for row, (_, label) in enumerate(train):
            relevant.setdefault(label, set()).add(str(row))
        judged = {str(row): relevant[label] for row, (_, label) in enumerate(test) if label in relevant}
    chosen = generator.sample(sorted(judged), min(len(judged), max_queries))
    return Task(folder.name, corpus, queries, {key: judged[key] for key in chosen})


def measure(client: Client, task: Task) -> list[dict[str, Any]]:
    """Store the records of a task, and search for every judged query with the settings of each run of `RUNS`.

    Returns:
        For each run its settings (`mode`, `fusion`, `dense_weight`) and the mean nDCG@10 (`ndcg`).
    """
    client.create_collection(task.name, model="model", truncation="end")
    client.upsert(task.name, (Record(key, text) for key, text in task.corpus.items() if text.strip()))
    rows = []
    for mode, fusion, weight in RUNS:
        total = 0.0
        for key, relevant in task.judged.items():
            query = task.queries[key]
            hits = client.search(task.name, query, top_k=K, mode=mode, fusion=fusion, dense_weight=weight)
            total += ndcg([hit.record.id for hit in hits], relevant)
        rows.append({"mode": mode, "fusion": fusion, "dense_weight": weight, "ndcg": total / len(task.judged)})
    return rows


def name_of(row: dict[str, Any]) -> str:
    """Return the settings of a run as text."""
    return row["mode"] if row["fusion"] is None else f"{row['fusion']} {row['dense_weight']}"


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print nDCG@10 of each run and data set, and the least difference to the better of dense and lexical search."""
    print("".join([f"{'':14}", *(f"{name[:12]:>13}" for name in results), f"{'least':>10}{'mean':>8}"]))
    for number, row in enumerate(next(iter(results.values()))):
        values = [rows[number]["ndcg"] for rows in results.values()]
        gains = differences(results, number)
        figures = "".join(f"{value:13.4f}" for value in values)
        print(f"{name_of(row):14}{figures}{min(gains):10.4f}{sum(gains) / len(gains):8.4f}")


def differences(results: dict[str, list[dict[str, Any]]], number: int) -> Sequence[float]:
    """Return nDCG@10 of a run minus that of the better of dense and lexical search, for each data set."""
    return [rows[number]["ndcg"] - max(rows[0]["ndcg"], rows[1]["ndcg"]) for rows in results.values()]


def main() -> None:
    """Measure, print all figures, and write them to a JSON file if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="a folder, or `docstrings`")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--split", default="test", help="split of the judgements of folders in BEIR's format")
    parser.add_argument("--max-queries", type=int, default=500)
    parser.add_argument("--max-records", type=int, default=10_000, help="for folders with labels")
    parser.add_argument("--flags", default="", help="further flags of the server")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    results = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ServerProcess({"model": options.model}, Path(scratch), *shlex.split(options.flags)) as server,
        Client(server.address, timeout=300) as client,
    ):
        for data in options.data:
            task = read_task(data, options.split, options.max_queries, options.max_records)
            results[task.name] = measure(client, task)
            print(f"{task.name}: {len(task.corpus)} records, {len(task.judged)} queries", file=sys.stderr, flush=True)
    print_table(results)
    if options.output:
        options.output.write_text(json.dumps({"host": host(), "data": results}, indent=2) + "\n", encoding="utf-8")
    default = RUNS.index(("hybrid", None, None))
    if min(differences(results, default)) < -LOSS:
        sys.exit(f"hybrid search loses more than {100 * LOSS} points to dense or lexical search")


if __name__ == "__main__":
    main()
