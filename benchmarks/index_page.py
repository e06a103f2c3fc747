"""Write docs/index-benchmarks.md and its plot from what `benchmarks/index.py` measured.

python benchmarks/index_page.py RESULT.json --vectors "what they are"
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib import pyplot

DOCS = Path(__file__).resolve().parent.parent / "docs"

COLUMNS = {
    "build, s": "build_seconds",
    "recall@10": "recall",
    "queries/s, 1 a call": "queries_per_second_1",
    "queries/s, 64 a call": "queries_per_second_64",
    "MB in memory": "megabytes",
    "MB on disk": "disk_megabytes",
    "restart, s": "restart_seconds",
}
MILLION = 1_000_000

HEAD = """# Benchmarks of the index

{records} vectors: {vectors}. The truth is every vector compared, for 1,000 queries that are not among them.
{date}; {processor}, {cores} cores; Python {python}, grpcio {grpcio}, numpy {numpy}.
Made by `benchmarks/corpus.py`, `benchmarks/index.py` and `benchmarks/index_page.py`; one after the other in one run.
"""

TAIL = """
![Queries a second against recall](images/index.png)

hnswlib is the library in process, with one thread and ef 200.
emberpc is measured through gRPC, its records with an id and metadata, every batch on disk before it is answered.
Its build is from the first upsert until the graph has all but the newest 4,000.
One vector a call is asked by 8 callers (h2load), 64 by as many as there are cores; hnswlib then has as many threads.
Peers run in process and keep ids only.

- Building, the graph's part alone: {build} times `add_items` with one thread (asked: at most 1.15).
- One vector a call: {share} of a server whose handler does nothing (asked: 0.6;
  [why not](decisions/0017-the-path-of-a-search.md)).
- 64 a call: {together} of `knn_query` at ef 200 on as many cores (asked: 0.8);
  what was measured of the collection to be enough is ef {ef}.
- Memory: {each} bytes a vector beside the {empty} MB of the server.
- By extrapolation in proportion, not measured: a million records take {memory} GB in memory, {disk} GB on disk, and a
  restart {restart} s."""


def figures_of(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return what goes into a row; recall by default is that of the last point of the curve."""
    if name == "hnswlib":
        at_200 = next(point for point in figures["curve"] if point["ef"] == 200)
        return {**figures, "recall": at_200["recall"]}
    return {**figures, "recall": figures["curve"][-1]["recall"]} if "curve" in figures else figures


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, figures in results.items():
        row = figures_of(name, figures)
        cells = [
            "" if key not in row else f"{row[key]:.3f}" if key == "recall" else f"{row[key]:,.4g}"
            for key in COLUMNS.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, figures in results.items():
        if "curve" in figures:
            points = sorted(figures["curve"], key=lambda point: point["recall"])
            axes.plot([p["recall"] for p in points], [p["queries_per_second"] for p in points], marker="o", label=name)
        elif "recall" in figures:
            axes.plot([figures["recall"]], [figures["queries_per_second_64"]], marker="s", linestyle="", label=name)
    axes.set(xlabel="recall@10", ylabel="queries a second, 64 a call, one caller", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--vectors", required=True, help="what the vectors are, for the page")
    arguments = parser.parse_args()
    found = json.loads(arguments.result.read_text(encoding="utf-8"))
    results, records, host = found["index"], found["records"], found["host"]
    raw, ours = results["hnswlib"], results["emberpc"]
    share = ours["queries_per_second_1"] / results["empty handler"]["queries_per_second_1"]
    together = ours["queries_per_second_64"] / raw["queries_per_second_64"]
    each = 1e6 * (ours["megabytes"] - ours["empty_megabytes"]) / records
    scale = MILLION / records
    plot(results, DOCS / "images" / "index.png")
    values = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "vectors": arguments.vectors,
        "records": f"{records:,}",
        **{key: host[key] for key in ("processor", "cores", "python", "grpcio", "numpy")},
        "build": f"{ours['graph_seconds'] / raw['build_seconds']:.2f}",
        "share": f"{share:.2f}",
        "together": f"{together:.2f}",
        "ef": ours["curve"][-1]["plan_ef"],
        "each": f"{each:,.0f}",
        "empty": f"{ours['empty_megabytes']:.0f}",
        "memory": f"{ours['megabytes'] * scale / 1000:.1f}",
        "disk": f"{ours['disk_megabytes'] * scale / 1000:.1f}",
        "restart": f"{ours['restart_seconds'] * scale:.0f}",
    }
    lines = [HEAD.format(**values), *table(results), TAIL.format(**values)]
    for name, reason in found["failed"].items():
        lines.append(f"- {name} was not measured: {reason}")
    (DOCS / "index-benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
