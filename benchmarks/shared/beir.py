"""Read data in BEIR's format: a folder of corpus.jsonl, queries.jsonl, qrels/train.tsv and qrels/test.tsv."""

from __future__ import annotations

import csv
import json
from pathlib import Path


def texts(path: Path) -> dict[str, str]:
    """Return the texts by id of a JSONL file in BEIR's format: corpus.jsonl or queries.jsonl.

    A title that is not empty is put before the text, with a space, as emberpc's commands do when they read
    corpus.jsonl themselves.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"] for row in rows}


def judgements(folder: Path, split: str) -> dict[str, set[str]]:
    """Return the ids of the relevant passages, those with a score above 0, by the id of the query.

    Queries without a relevant passage are left out.

    Args:
        folder: folder of the data set.
        split: which judgements to read, `train` or `test`: the name of a file in `qrels` without `.tsv`.
    """
    found: dict[str, set[str]] = {}
    with (folder / "qrels" / f"{split}.tsv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if float(row["score"]) > 0:
                found.setdefault(row["query-id"], set()).add(row["corpus-id"])
    return found


def write_pairs(folder: Path, target: Path) -> tuple[Path, Path]:
    """Write pairs of a query and a relevant passage as `train.jsonl` and `test.jsonl`, for emberpc's commands.

    A line has the keys `query` and `passage`, with texts. A query has a line for each of its relevant passages.
    Training queries with the same text as a query in `test.jsonl` are left out.

    Args:
        folder: folder of the data set.
        target: existing folder to write to; files of the same names are replaced.

    Returns:
        The paths of the training file and of the test file.

    Raises:
        OSError: a file of the data set is missing.
        KeyError: a judgement has an id without a text.
    """
    queries, passages = texts(folder / "queries.jsonl"), texts(folder / "corpus.jsonl")

    def pairs(split: str) -> list[dict[str, str]]:
        judged = judgements(folder, split)
        return [{"query": queries[key], "passage": passages[each]} for key in judged for each in sorted(judged[key])]

    test = pairs("test")
    tested = {pair["query"] for pair in test}
    train = [pair for pair in pairs("train") if pair["query"] not in tested]
    files = (target / "train.jsonl", target / "test.jsonl")
    for path, rows in zip(files, (train, test), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
