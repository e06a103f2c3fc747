"""Write docs/index-benchmarks.md and its plot from the result of `benchmarks/index/compare.py`.

    python -m benchmarks.index.page RESULT.json --vectors "description" [--filters FILTERS.json] [--churn RECALL.json]
        [--postgres POSTGRES.json]

FILTERS.json is written by `benchmarks/index/filters.py`, RECALL.json by `benchmarks/index/recall.py`, and POSTGRES.json
by `benchmarks/index/postgres.py`. The text of the page after the marker "figures of other runs" is kept.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib import pyplot

DOCS = Path(__file__).resolve().parents[2] / "docs"

COLUMNS = {
    "build, s": "build_seconds",
    "recall@10": "recall",
    "queries/s, 1 per call": "queries_per_second_1",
    "queries/s, 64 per call": "queries_per_second_64",
    "MB in memory": "megabytes",
    "MB on disk": "disk_megabytes",
    "restart, s": "restart_seconds",
}
BESIDE = {
    "calls/s, 1 vector per call": "queries_per_second_1",
    "ms per call, one at a time": "latency_ms",
    "queries/s, 64 per call": "queries_per_second_64",
}
#: Names of the comparison servers that store no vectors. They have no row in the first table of the page.
RPC_ONLY = ("empty handler", "ten ready hits")
MILLION = 1_000_000
#: Marker in the page. The text after it is kept.
KEPT = "<!-- figures of other runs -->\n"

HEAD = """# Benchmarks of the index

Vectors: {records} {vectors}.
Queries: 1,000 vectors that are not among them. The true neighbours of a query come from an exact search.
Host: {date}; {processor}, {cores} cores; Python {python}, grpcio {grpcio}, numpy {numpy}.
Scripts: `corpus.py`, `compare.py` and `page.py` of `benchmarks/index/`. All rows were measured in one run, one
after the other.
"""

TAIL = """
![Queries per second by recall](images/index.png)

The row "hnswlib" is the library in process. It was built with one thread; its recall is that at `ef` 200, and its
queries per second are those of the section "The path of a search".

The row "emberpc" is the server, measured through gRPC. Its records have an id and metadata, and each batch is on
disk before its response. The build time is from the first upsert until the graph has all vectors.

Peers, if there are rows of them, run in process and store ids only.

- Building the graph alone takes {build} times as long as `add_items` of hnswlib with one thread (target: at most
  1.15).
- The memory is {each} bytes per vector, in addition to the {empty} MB of the server without records.
- A restart, from the start of the process to the first response, takes {restart_seconds} s after a normal stop, and
  {restart_killed_seconds} s after `kill -9` with 3,000 records that no snapshot has. Without any snapshot it takes
  {restart_without_graph_seconds} s; the graph is then built while the server serves.
- Extrapolated in proportion from these figures, and not measured: a million records take {memory} GB in memory and
  {disk} GB on disk, and a restart takes {restart} s.
"""

PATH = """
## The path of a search

The figures are medians of {rounds} alternating rounds, all at `ef` {ef}, which the server chose. The columns are:
- Column 1: 8 callers (h2load) send one vector per call.
- Column 2: a client in Python sends one vector per call, one call at a time.
- Column 3: as many callers as there are cores send 64 vectors per call.

hnswlib runs in process on as many threads as there are cores. The empty handler is a gRPC server in Python whose
handler does nothing. With ten ready hits, its response has the same bytes as that of emberpc.
"""

SHARES = """
The shares below are medians of the shares of each round, so they differ a little from the ratios of the table.

- With one vector per call, emberpc answers {calls} times as many calls per second as the empty handler (target: 0.6;
  [why it is missed](decisions/0017-the-path-of-a-search.md)), and {hits} times as many as with ten ready hits. With
  one call at a time, emberpc is {latency} times as fast as the empty handler, and {latency_hits} times as fast as with
  ten ready hits.
- With 64 vectors per call, emberpc answers {together} times as many queries per second as hnswlib's `knn_query`
  with as many candidates (target: 0.8).
"""


def figures_of(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one system with the `recall` for its row of the table.

    For hnswlib, `recall` is that at ef 200. For emberpc, `recall` is that at the default ef, the last point of the
    curve. Figures without a curve, as of a peer, are returned unchanged.
    """
    if name == "hnswlib":
        at_200 = next(point for point in figures["curve"] if point["ef"] == 200)
        return {**figures, "recall": at_200["recall"]}
    return {**figures, "recall": figures["curve"][-1]["recall"]} if "curve" in figures else figures


def table(results: dict[str, dict[str, Any]], columns: dict[str, str]) -> list[str]:
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in results.items():
        cells = [
            "" if key not in row else f"{row[key]:.3f}" if key == "recall" else f"{row[key]:,.4g}"
            for key in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def path(beside: dict[str, Any]) -> list[str]:
    """Return the lines of the section that compares a search through gRPC with gRPC alone and with hnswlib alone.

    Args:
        beside: the result of `rpc.measure`.
    """
    shares = {name: f"{share:.2f}" for name, share in beside["shares"].items()}
    tail = SHARES.format(
        calls=shares["calls, of an empty handler"],
        hits=shares["calls, of ten ready hits"],
        latency=shares["latency, of an empty handler"],
        latency_hits=shares["latency, of ten ready hits"],
        together=shares["64 a call, of hnswlib"],
    )
    return [PATH.format(rounds=beside["rounds"], ef=beside["ef"]), *table(beside["servers"], BESIDE), tail]


def filtered(found: dict[str, Any]) -> list[str]:
    """Return the lines of the section on filtered searches: with filters used before, and with new filters.

    Args:
        found: the result of `benchmarks/index/filters.py`.
    """
    rows = [
        f"| {row['share']:.2%} | {'yes' if row['field'] == 'indexed' else 'no'} | {row['recall']:.3f} "
        f"| {row['known']['p50_ms']:.2f} | {row['known']['p99_ms']:.2f} "
        f"| {row['new']['p50_ms']:.2f} | {row['new']['p99_ms']:.2f} |"
        for row in found["filtered"]
    ]
    plain = found["unfiltered"]
    return [
        f"## Filters\n\nThe searches run in process, one query at a time, on {found['records']:,} vectors "
        f"({found['vectors']}). Without a filter, a search takes {plain['p50_ms']:.2f} ms (p50) and "
        f"{plain['p99_ms']:.2f} ms (p99). With a filter that was used before, it takes the p50 and p99 of the table; "
        "the last two columns are those of a new filter.\n",
        "| records that match | field indexed | recall@10 | p50, ms | p99, ms | new filter: p50, ms | p99, ms |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def churned(found: dict[str, Any]) -> list[str]:
    """Return the lines of the section on recall after replacements of records, and on searches meanwhile.

    Args:
        found: the result of `benchmarks/index/recall.py` with at least one round.
    """
    after, meanwhile = found["after"], found["meanwhile"]
    return [
        f"\n## After many writes\n\n{found['records']:,} vectors ({found['vectors']}), half of them replaced "
        f"{after['rounds']} times: recall@10 by default was {found['default']['recall']:.3f} (ef "
        f"{found['default']['ef']}) before and {after['recall']:.3f} (ef {after['ef']}) after. During the writes, at "
        f"{meanwhile['writes_per_second']:,.0f} records per second, a search took {meanwhile['p50_ms']:.2f} ms (p50), "
        f"{meanwhile['p99_ms']:.1f} ms (p99), and {meanwhile['max_ms']:.0f} ms at most."
    ]


def beside_postgres(found: dict[str, Any]) -> list[str]:
    """Return the lines of the section that compares emberpc with PostgreSQL and pgvector.

    Args:
        found: the result of `benchmarks/index/postgres.py` with both servers.
    """
    ours, theirs = (found["servers"][system] for system in ("emberpc", "pgvector"))
    rows = [
        f"| {way} | {ours[way]['queries_per_second']:,.4g} | {theirs[way]['queries_per_second']:,.4g} | {share:.2f} "
        f"| {ours[way]['p50_ms']:.2f} | {theirs[way]['p50_ms']:.2f} |"
        for way, share in found["shares"].items()
    ]
    return [
        f"\n## Beside PostgreSQL\n\n{found['records']:,} vectors in emberpc, and in PostgreSQL {theirs['PostgreSQL']} "
        f"with pgvector {theirs['pgvector']}; medians of {found['rounds']} alternating rounds. Both have an HNSW graph "
        "with M 16 and efConstruction 200, and search with the smallest `ef` that was tried and has a recall@10 of at "
        f"least 0.98: emberpc with {ours['ef']} (recall {ours['recall']:.3f}), PostgreSQL with {theirs['ef']} (recall "
        f"{theirs['recall']:.3f}). Storing the vectors and building the graph took {ours['build_seconds']:.0f} s in "
        f"emberpc, and {theirs['build_seconds']:.0f} s in PostgreSQL. A × B means A callers that send B vectors in a "
        "call; each caller is a Python process. PostgreSQL runs a call on one core.\n",
        "| | emberpc, queries/s | PostgreSQL, queries/s | times as many | emberpc, p50, ms | PostgreSQL, p50, ms |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, figures in results.items():
        if "curve" in figures:
            points = sorted(figures["curve"], key=lambda point: point["recall"])
            axes.plot([p["recall"] for p in points], [p["queries_per_second"] for p in points], marker="o", label=name)
        elif "recall" in figures:
            axes.plot([figures["recall"]], [figures["queries_per_second_64"]], marker="s", linestyle="", label=name)
    axes.set(xlabel="recall@10", ylabel="queries per second, 64 per call, one caller", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--vectors", required=True, help="description of the vectors, for the page")
    parser.add_argument("--filters", type=Path, help="result file of benchmarks/index/filters.py")
    parser.add_argument("--churn", type=Path, help="result file of benchmarks/index/recall.py")
    parser.add_argument("--postgres", type=Path, help="result file of benchmarks/index/postgres.py")
    arguments = parser.parse_args()
    found = json.loads(arguments.result.read_text(encoding="utf-8"))
    results, records, host = found["index"], found["records"], found["host"]
    raw, ours = results["hnswlib"], results["emberpc"]
    each = 1e6 * (ours["megabytes"] - ours["empty_megabytes"]) / records
    scale = MILLION / records
    plot(results, DOCS / "images" / "index.png")
    values = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "vectors": arguments.vectors,
        "records": f"{records:,}",
        **{key: host[key] for key in ("processor", "cores", "python", "grpcio", "numpy")},
        **{key: f"{value:.2f}" for key, value in ours.items() if key.startswith("restart_")},
        "build": f"{ours['graph_seconds'] / raw['build_seconds']:.2f}",
        "each": f"{each:,.0f}",
        "empty": f"{ours['empty_megabytes']:.0f}",
        "memory": f"{ours['megabytes'] * scale / 1000:.1f}",
        "disk": f"{ours['disk_megabytes'] * scale / 1000:.1f}",
        "restart": f"{ours['restart_seconds'] * scale:.0f}",
    }
    engines = {name: figures_of(name, each) for name, each in results.items() if name not in RPC_ONLY}
    lines = [HEAD.format(**values), *table(engines, COLUMNS), TAIL.format(**values), *path(found["beside"])]
    if arguments.filters:
        lines += filtered(json.loads(arguments.filters.read_text(encoding="utf-8")))
    if arguments.churn:
        lines += churned(json.loads(arguments.churn.read_text(encoding="utf-8")))
    if arguments.postgres:
        lines += beside_postgres(json.loads(arguments.postgres.read_text(encoding="utf-8")))
    for name, reason in found["failed"].items():
        lines.append(f"- {name} was not measured: {reason}")
    page = DOCS / "index-benchmarks.md"
    kept = page.read_text(encoding="utf-8").partition(KEPT)[2]
    page.write_text("\n".join(lines) + f"\n\n{KEPT}{kept}", encoding="utf-8")


if __name__ == "__main__":
    main()
