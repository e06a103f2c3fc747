"""Write a corpus of real texts as Parquet files: sentences of docstrings of Python's standard library on this host.

The files `corpus-0.parquet`, `corpus-1.parquet` and so on have a column `id` and a column `text`. Files of these names
in the folder are replaced; files of an earlier run with higher numbers stay.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from emberpc.export.data.stdlib_texts import read_stdlib

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\n+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=5000, help="maximum number of texts to write")
    parser.add_argument("--files", type=int, default=4, help="number of files")
    options = parser.parse_args()
    texts = dict(islice(sentences(), options.texts))
    options.folder.mkdir(parents=True, exist_ok=True)
    ids = list(texts)
    size = -(-len(ids) // options.files)
    for number in range(options.files):
        part = ids[number * size : (number + 1) * size]
        table = pa.table({"id": part, "text": [texts[each] for each in part]})
        pq.write_table(table, options.folder / f"corpus-{number}.parquet", row_group_size=1000)
    print(f"{len(ids)} texts in {options.files} files in {options.folder}")


def sentences() -> Iterator[tuple[str, str]]:
    for doc in read_stdlib():
        for number, sentence in enumerate(_SENTENCE_END.split(doc.text)):
            if text := " ".join(sentence.split()):
                yield f"{doc.name}#{number}", text


if __name__ == "__main__":
    main()
