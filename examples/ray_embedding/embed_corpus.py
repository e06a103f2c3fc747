"""Embed a corpus that is too large for one host, with Ray Data: from Parquet to Parquet, with resumption.

Each file of the corpus is divided into parts of a fixed number of rows; the last part of a file may have fewer. An
actor reads a part, embeds its texts and writes a file with the vectors. The name of the file identifies the part, and
the file gets this name only when it is complete. So a part with a file is done, and the same command continues a job
that was killed. The exit code is 2 if an option is wrong, after a `JobError`, or if the model is not a valid bundle.
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
from emberpc.bundle.cores import usable_cores
from emberpc.server.engine import Caller, Engine, InferenceRequest, Lane, Registry, Truncation
from emberpc.server.errors import items_of

_JOB = "job.json"
#: Limit of the engine's queue, in tokens. All texts of a part are one call, so the limit is so great that it refuses no
#: part.
_QUEUE_TOKENS = 2**31


@dataclass(frozen=True)
class Part:
    """A part of the corpus: the rows from `start` to below `stop`, counted from 0, of the Parquet file `path`.

    `name` is the name of the file for the vectors of these rows, in the output folder. `path` is absolute.
    """

    name: str
    path: str
    start: int
    stop: int


class JobError(Exception):
    """Corpus, model or output folder cannot be used, or another run uses the folder. The message is for the user."""


class Embedder:
    """An actor, a worker process of Ray: loads a model, and embeds parts with one worker thread.

    Args:
        model: folder of the bundle.
        out: existing folder to which the vectors are written.
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
        """Embed parts, one after the other, and write a file for each.

        Args:
            parts: the fields of `Part` by name, each with one item per part.

        Returns:
            Lists with one item per part: `part` (name), `rows` (number of rows) and `seconds` (wall seconds).
        """
        results: dict[str, list[Any]] = {"part": [], "rows": [], "seconds": []}
        for name, path, start, stop in zip(parts["name"], parts["path"], parts["start"], parts["stop"], strict=True):
            begun = time.perf_counter()
            table = self._embed(read_rows(str(path), self._columns, int(start), int(stop)))
            write_whole(table, self._out / str(name))
            results["part"].append(str(name))
            results["rows"].append(table.num_rows)
            results["seconds"].append(time.perf_counter() - begun)
        return results

    def _embed(self, table: pa.Table) -> pa.Table:
        """Embed the texts of a table as passages; return the table with the columns `vector` and `truncated` added.

        If a text is null, empty or only white space, its vector is null. `truncated` says whether the text was
        truncated, at its end, to the model's limit.
        """
        texts = table.column(self._columns[1]).to_pylist()
        rows = [i for i, text in enumerate(texts) if text and not text.isspace()]
        dimensions = self._model.manifest.dimensions
        matrix = np.zeros((len(texts), dimensions), dtype=np.float32)
        truncated = np.zeros(len(texts), dtype=bool)
        if rows:
            request = InferenceRequest(
                self._model,
                [texts[i] for i in rows],
                self._model.manifest.prompts.passage,
                Truncation.END,
                items_of("texts"),
                Caller("ray", Lane.BULK, math.inf),
            )
            inference = self._loop.run_until_complete(self._engine.inferrer.infer(request))
            matrix[rows], truncated[rows] = inference.output, inference.truncated
        without = np.ones(len(texts), dtype=bool)
        without[rows] = False
        vectors = pa.FixedSizeListArray.from_arrays(matrix.ravel(), dimensions, mask=pa.array(without))
        return table.append_column("vector", vectors).append_column("truncated", pa.array(truncated))


def read_rows(path: str, columns: list[str], start: int, stop: int) -> pa.Table:
    """Return the given columns of the rows from `start` to below `stop`, counted from 0, of a Parquet file.

    Only the row groups that contain these rows are read.
    """
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
    """Write a table as a Parquet file atomically: after a crash, the new file is complete or does not exist.

    A file of the same name is replaced. A crash may leave an unfinished hidden file beside `path`. `prepare` removes
    unfinished files of parts.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def parts_of(corpus: Path, columns: list[str], rows: int) -> Iterator[Part]:
    """Yield the parts of a corpus, file by file; the same files and `rows` always give the same parts.

    Args:
        corpus: a Parquet file, or a folder of files `*.parquet`, which are taken in the order of their names. A file
            without rows has no parts.
        columns: columns that each file must have.
        rows: rows of a part, at least 1; the last part of a file may have fewer.

    Raises:
        JobError: there are no files, or a file cannot be read as Parquet or lacks a column; raised during the
            iteration.
    """
    files = sorted(corpus.glob("*.parquet")) if corpus.is_dir() else [corpus]
    if not files:
        raise JobError(f"{corpus} has no *.parquet; name a Parquet file, or a folder of them")
    for number, path in enumerate(files):
        try:
            schema, count = pq.read_schema(path), pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise JobError(f"{path} cannot be read as Parquet; write it again") from error
        if missing := [column for column in columns if column not in schema.names]:
            raise JobError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
        for start in range(0, count, rows):
            name = f"part-{number:05}-{start // rows:06}.parquet"
            yield Part(name, str(path.resolve()), start, min(start + rows, count))


def prepare(out: Path, job: Mapping[str, object]) -> IO[bytes]:
    """Lock the output folder for a job, and remove unfinished files of earlier runs.

    If the folder does not exist, it is created. If it has no `job.json`, that file is written.

    Args:
        out: the folder.
        job: values that identify the job, as in `job.json`.

    Returns:
        A locked file in the folder. No other run can lock the folder until the file is closed or the process ends.

    Raises:
        JobError: `job.json` has other values, or another run holds the lock.
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
    """Embed the parts of a job that have no file in the output folder yet; print their number.

    Args:
        options: the options of the command line; see `main`.

    Raises:
        JobError: the model is not an embedding model, the corpus cannot be read, or the output folder cannot be used.
        BundleError: the folder of the model is not a valid bundle.
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
    """Embed parts with a pool of Ray actors, which write a file of vectors for each part to `options.out`.

    Prints a line for each finished part, and the total throughput at the end.

    Args:
        left: the parts to embed.
        columns: names of the column of ids and of the column of texts.
        options: the options of the command line; see `main`.
    """
    # Without an address, Ray starts a cluster on this host, which needs one core for each actor. For a running cluster,
    # Ray refuses `num_cpus`, since the cluster has a number of cores of its own.
    local = {} if options.address else {"num_cpus": options.actors, "include_dashboard": False}
    ray.init(options.address, logging_level=logging.ERROR, log_to_driver=False, **local)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    start = time.perf_counter()
    rows = busy = 0.0
    results = ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left)).map_batches(
        Embedder,
        fn_constructor_args=(str(options.model.resolve()), str(options.out.resolve()), *columns),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=1,
    )
    for done, row in enumerate(results.iter_rows(), 1):
        rows, busy = rows + row["rows"], busy + row["seconds"]
        print(f"{row['part']}: {row['rows']} texts in {row['seconds']:.1f} s; {done} of {len(left)}", flush=True)
    seconds = time.perf_counter() - start
    print(
        f"{rows:.0f} texts in {seconds:.1f} s, {rows / seconds:.0f} per second with {options.actors} actors, "
        f"which were busy for {busy / seconds / options.actors:.0%} of the time"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a Parquet file, or a folder of them")
    parser.add_argument("out", type=Path, help="folder of the vectors")
    parser.add_argument("--model", type=Path, required=True, help="a bundle of an embedding model")
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--text-column", default="text")
    parser.add_argument(
        "--rows", type=int, default=1000, help="rows of a part; a kill loses at most one part per actor"
    )
    parser.add_argument("--actors", type=int, default=usable_cores(), help="one core and one copy of the model each")
    parser.add_argument(
        "--address", help="address of a Ray cluster with the same folders, such as auto; default: this host"
    )
    options = parser.parse_args()
    try:
        run(options)
    except (BundleError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
