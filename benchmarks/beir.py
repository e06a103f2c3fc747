"""Reads data of BEIR's form: corpus.jsonl, queries.jsonl, qrels/train.tsv and qrels/test.tsv."""

from __future__ import annotations

import csv
import json
from pathlib import Path


def write_pairs(folder: Path, target: Path) -> tuple[Path, Path]:
    """Write the relevant pairs to learn from and to test on as files that emberpc's commands take."""

    def texts(name: str) -> dict[str, str]:
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        # As the commands read a corpus, so that a passage is the same text here and there.
        return {row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows}

    def pairs(split: str) -> list[dict[str, str]]:
        with (folder / "qrels" / f"{split}.tsv").open(newline="", encoding="utf-8") as file:
            judged = [row for row in csv.DictReader(file, delimiter="\t") if float(row["score"]) > 0]
        return [{"query": queries[row["query-id"]], "passage": passages[row["corpus-id"]]} for row in judged]

    queries, passages = texts("queries.jsonl"), texts("corpus.jsonl")
    test = pairs("test")
    tested = {pair["query"] for pair in test}
    train = [pair for pair in pairs("train") if pair["query"] not in tested]
    files = (target / "train.jsonl", target / "test.jsonl")
    for path, rows in zip(files, (train, test), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
