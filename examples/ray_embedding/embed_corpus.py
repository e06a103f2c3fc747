"""Embed a corpus that outgrows one host, with Ray Data: Parquet in, Parquet out, from where it was left.

The corpus is cut into parts of so many rows. Each is read, embedded and written by one actor, under a name that says
which part it is, and gets that name only when it is whole: what is there is done, and a job that was killed is started
again with the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from emberpc.bundle import BundleError, Task, read_bundle
from emberpc.server.cores import usable_cores
from emberpc.server.engine import Caller, Engine, Lane, Registry, Truncation
from emberpc.server.errors import items_of

_JOB = "job.json"
#: A part is one call to the engine, which is to take it whole.
_QUEUE_TOKENS = 2**31


@dataclass(frozen=True)
class Part:
    """Some rows of one file of the corpus, and the name of the file that their vectors go to."""

    name: str
    path: str
    start: int
    stop: int


class JobError(Exception):
    """The job cannot be done; the message says why and the remedy."""


class Embedder:
    """One actor: a model, and one core to run it.

    Args:
        model: the bundle.
        out: the folder that the vectors go to.
        id_column: name of the column of ids.
        text_column: name of the column of texts.
    """

    def __init__(self, model: str, out: str, id_column: str, text_column: str) -> None:
        self._out = Path(out)
        self._columns = [id_column, text_column]
        self._loop = asyncio.new_event_loop()
        pool = ThreadPoolExecutor(1)
        self._engine = Engine(Registry(pool), pool, workers=1, batch_tokens=0, max_queue_tokens=_QUEUE_TOKENS)
        self._model = self._engine.registry.load("model", Path(model))

    def __call__(self, parts: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """Embed parts and write them; tell of each its name, rows and seconds."""
        told: dict[str, list[Any]] = {"part": [], "rows": [], "seconds": []}
        for name, path, start, stop in zip(parts["name"], parts["path"], parts["start"], parts["stop"], strict=True):
            begun = time.perf_counter()
            table = self._embed(read_rows(str(path), self._columns, int(start), int(stop)))
            write_whole(table, self._out / str(name))
            told["part"].append(str(name))
            told["rows"].append(table.num_rows)
            told["seconds"].append(time.perf_counter() - begun)
        return told

    def _embed(self, table: pa.Table) -> pa.Table:
        """Add the vectors: float32, null where there is no text; and whether a text was cut to fit the model."""
        texts = table.column(self._columns[1]).to_pylist()
        rows = [i for i, text in enumerate(texts) if text and not text.isspace()]
        dimensions = self._model.manifest.dimensions
        matrix = np.zeros((len(texts), dimensions), dtype=np.float32)
        truncated = np.zeros(len(texts), dtype=bool)
        if rows:
            inference = self._loop.run_until_complete(
                self._engine.infer(
                    self._model,
                    [texts[i] for i in rows],
                    self._model.manifest.prompts.passage,
                    Truncation.END,
                    items_of("texts"),
                    Caller("ray", Lane.BULK, math.inf),
                )
            )
            matrix[rows], truncated[rows] = inference.output, inference.truncated
        without = np.ones(len(texts), dtype=bool)
        without[rows] = False
        vectors = pa.FixedSizeListArray.from_arrays(matrix.ravel(), dimensions, mask=pa.array(without))
        return table.append_column("vector", vectors).append_column("truncated", pa.array(truncated))


def read_rows(path: str, columns: list[str], start: int, stop: int) -> pa.Table:
    """Read some rows of a file: those of its row groups that hold them."""
    with pq.ParquetFile(path) as file:
        groups: list[int] = []
        first = before = 0
        for group in range(file.num_row_groups):
            after = before + file.metadata.row_group(group).num_rows
            if before < stop and after > start:
                first = first if groups else before
                groups.append(group)
            before = after
        return file.read_row_groups(groups, columns=columns).slice(start - first, stop - start)


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def parts_of(corpus: Path, columns: list[str], rows: int) -> Iterator[Part]:
    """Cut a corpus into parts, in the same way each time.

    Raises:
        JobError: there is none, or a file of it is no Parquet or has not the columns.
    """
    files = sorted(corpus.glob("*.parquet")) if corpus.is_dir() else [corpus]
    if not files:
        raise JobError(f"{corpus} has no *.parquet; name a Parquet file, or a folder of them")
    for number, path in enumerate(files):
        try:
            schema, count = pq.read_schema(path), pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise JobError(f"{path} cannot be read as Parquet; write it anew") from error
        if missing := [column for column in columns if column not in schema.names]:
            raise JobError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
        for start in range(0, count, rows):
            name = f"part-{number:05}-{start // rows:06}.parquet"
            yield Part(name, str(path.resolve()), start, min(start + rows, count))


def prepare(out: Path, job: Mapping[str, object]) -> IO[bytes]:
    """Make the folder of the vectors, or see that it is of the same job, and clear away what was never finished.

    Returns:
        A file whose lock says that the job is being done; it ends with the process.

    Raises:
        JobError: it is of another job, or that job is being done.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JobError(f"{out} is being written to by another run; wait for its end") from error
    record = out / _JOB
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if other := [key for key in job if before.get(key) != job[key]]:
            raise JobError(f"{out} holds vectors of another job, with another {', '.join(other)}; name another folder")
    for unfinished in out.glob(".part-*"):
        unfinished.unlink()
    if not record.exists():
        unfinished = out / f".{_JOB}"
        unfinished.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(record)
    return lock


def run(options: argparse.Namespace) -> None:
    """Do what is left of a job.

    Raises:
        JobError: it cannot be done.
        BundleError: the model is none.
    """
    bundle = read_bundle(options.model)
    manifest = bundle.manifest
    if manifest.task is not Task.EMBEDDING:
        raise JobError(f"{options.model} is no embedding model; name one, or make one by `emberpc export embedding`")
    columns = [options.id_column, options.text_column]
    parts = list(parts_of(options.corpus, columns, options.rows))
    fingerprint = bundle.fingerprint()
    corpus = {part.path: part.stop for part in parts}
    lock = prepare(options.out, {"model": fingerprint, "columns": columns, "rows": options.rows, "corpus": corpus})
    left = [part for part in parts if not (options.out / part.name).exists()]
    print(f"{len(parts)} parts, {len(parts) - len(left)} of them done before", flush=True)
    if left:
        with lock:
            embed(left, columns, options)


def embed(left: list[Part], columns: list[str], options: argparse.Namespace) -> None:
    """Embed parts, and tell how it goes."""
    # One that is there already knows its cores.
    local = {} if options.address else {"num_cpus": options.actors, "include_dashboard": False}
    ray.init(options.address, logging_level=logging.ERROR, log_to_driver=False, **local)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start = time.perf_counter()
    rows = busy = 0.0
    told = ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left)).map_batches(
        Embedder,
        fn_constructor_args=(str(options.model.resolve()), str(options.out.resolve()), *columns),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=1,
    )
    for done, row in enumerate(told.iter_rows(), 1):
        rows, busy = rows + row["rows"], busy + row["seconds"]
        print(f"{row['part']}: {row['rows']} texts in {row['seconds']:.1f} s; {done} of {len(left)}", flush=True)
    seconds = time.perf_counter() - start
    print(
        f"{rows:.0f} texts in {seconds:.1f} s, {rows / seconds:.0f} a second with {options.actors} actors, "
        f"which were busy for {busy / seconds / options.actors:.0%} of it"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a Parquet file, or a folder of them")
    parser.add_argument("out", type=Path, help="folder of the vectors")
    parser.add_argument("--model", type=Path, required=True, help="a bundle of an embedding model")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--rows", type=int, default=1000, help="rows of a part; what a kill costs at most, per actor")
    parser.add_argument("--actors", type=int, default=usable_cores(), help="one core and one copy of the model each")
    parser.add_argument("--address", help="of a Ray cluster that shares the folders, such as auto; default: this host")
    options = parser.parse_args()
    try:
        run(options)
    except (BundleError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
