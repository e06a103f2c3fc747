"""Write vectors for the benchmarks of the index: embeddings of sentences from real texts.

The texts are the docstrings of Python's standard library and, with a folder of data sets, the texts of banking77,
clinc150 and scifact. The texts are split into sentences. If there are too few sentences, pairs of consecutive sentences
of a text are added. Each sentence or pair has 20 to 400 characters and one vector. Their order is random.

    python -m benchmarks.index.corpus BUNDLE -o VECTORS.npy [--data FOLDER] [--count 100000]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.shared.load import serving
from emberpc.client import Client
from emberpc.export.data.stdlib_texts import read_stdlib

_END = re.compile(r"(?<=[.!?])\s+")
_SHORTEST, _LONGEST = 20, 400


def texts(data: Path | None) -> Iterator[str]:
    """Yield docstrings of Python's standard library and, with a folder `data`, the texts of its data sets.

    The data sets are the CSV files in `banking77` and `clinc150`, with a column `text`, and `scifact/corpus.jsonl`.
    `banking77` and `clinc150` may be missing.

    Raises:
        OSError: the corpus of scifact is missing, or a file cannot be read.
    """
    for doc in read_stdlib():
        yield doc.text
    if data is None:
        return
    for name in ("banking77", "clinc150"):
        for path in sorted((data / name).glob("*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                yield from (row["text"] for row in csv.DictReader(file))
    with (data / "scifact" / "corpus.jsonl").open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            yield f"{document['title']} {document['text']}"


def sentences(data: Path | None, count: int, seed: int = 0) -> list[str]:
    """Return distinct sentences of docstrings and data sets in random order.

    If there are too few sentences, pairs of consecutive sentences of a text are added. Sentences and pairs with fewer
    than 20 or more than 400 characters are left out.

    Args:
        data: folder of data sets; None: only docstrings.
        count: number of sentences and pairs to return; fewer are returned if there are not enough.
        seed: seed of the draw and of the order.
    """
    single: dict[str, None] = {}
    pairs: dict[str, None] = {}
    for text in texts(data):
        parts = [part for part in _END.split(" ".join(text.split())) if part]
        single |= dict.fromkeys(parts)
        pairs |= dict.fromkeys(f"{a} {b}" for a, b in pairwise(parts))
    generator = random.Random(seed)
    chosen: list[str] = []
    for source in (single, pairs):
        fit = [text for text in source if _SHORTEST <= len(text) <= _LONGEST]
        chosen += generator.sample(fit, min(len(fit), count - len(chosen)))
    generator.shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the vectors: float32 (count, dimensions)")
    parser.add_argument("--data", type=Path, help="folder with banking77, clinc150 and scifact; none: docstrings only")
    parser.add_argument("--count", type=int, default=100_000)
    arguments = parser.parse_args()
    chosen = sentences(arguments.data, arguments.count)
    rows: list[np.ndarray | None] = [None] * len(chosen)
    with serving(arguments.bundle.resolve(), "--cache-bytes", "0") as server, Client(server.address) as client:
        for done, result in enumerate(client.embed_stream(chosen, truncation="end")):
            rows[int(result.id)] = result.vector
            if done % 5000 == 0:
                print(f"{done} of {len(chosen)}", flush=True)
    np.save(arguments.output, np.stack([row for row in rows if row is not None]))


if __name__ == "__main__":
    main()
