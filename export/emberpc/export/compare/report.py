"""Write the report of a comparison: an HTML page, JSON and plots."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from emberpc.export.compare.class_figures import class_figures
from emberpc.export.compare.data_problems import confusions, suspects
from emberpc.export.compare.outcomes import budget_name
from emberpc.export.compare.plots import draw_plots
from emberpc.export.compare.recommendation import (
    Recommendation,
    baselines,
    caveats,
    crossover,
    metric_name,
    recommendation,
    skipped_lines,
)
from emberpc.export.compare.summary import Point
from emberpc.export.files import write_text

_BYTES_PER_MB = 1e6


def write_report(
    recommended: Recommendation, folder: Path, allows: Callable[[float], bool] = lambda _seconds: True
) -> Path:
    """Write the report of a comparison: `report.html` (with the plots inside), `report.json` and a PNG for each plot.

    Args:
        recommended: the recommendation, with the comparison's summary.
        folder: folder to write to; it must exist. Files of the same names are replaced.
        allows: whether the time limit allows work of a number of seconds; plots for which it does not are left out.

    Returns:
        The path of the HTML file.

    Raises:
        OSError: a file cannot be written.
        ExportError: `folder` has a folder or a device with the name of a file of the report.
    """
    from jinja2 import Environment

    summary = recommended.summary
    found = content(recommended)
    write_text(folder / "report.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    point = recommended.taken.point
    plots = draw_plots(recommended, confusions(summary, point), folder, allows)
    template = files("emberpc.export.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(template)
        .render(
            **{**found, "winner": summary.name(point.way), "where": summary.where(point.budget)},
            metric_name=metric_name(summary.metric),
            largest=f"At the largest budget: {budget_name(summary.largest)}",
            table=[table_row(recommended, each) for each in summary.at(summary.largest)],
            all_rows=[table_row(recommended, each) for each in summary.points],
            more_time=any(skipped.for_time for skipped in summary.result.skipped),
            scope="out_of_scope_auroc" in point.means,
            images={name: _inline(path) for name, path in plots.items()},
        )
    )
    return write_text(folder / "report.html", page)


def table_row(recommended: Recommendation, point: Point) -> dict[str, str | bool]:
    """Return a row of the report's table: the figures of a point as text, by column.

    A figure that was not measured is an empty text. `winner` is True for the recommended point.
    """
    serving = recommended.summary.serving(point.way)
    auroc = point.means.get("out_of_scope_auroc")
    cpu = point.means["cpu_seconds"]
    return {
        "strategy": point.way.strategy + " (quick)" * point.quick,
        "base": point.way.base,
        "budget": budget_name(point.budget),
        "score": f"{point.score.value:.3f}",
        "interval": f"{point.score.low:.3f} to {point.score.high:.3f}",
        "accuracy": f"{point.accuracy:.3f}",
        "macro_f1": f"{point.means['macro_f1']:.3f}",
        "ece_before": f"{point.means['ece_uncalibrated']:.3f}",
        "ece": f"{point.means['ece']:.3f}",
        "auroc": "" if auroc is None else f"{auroc:.3f}",
        "cpu_seconds": f"{cpu:.1f}" if cpu < 10 else f"{cpu:,.0f}",
        "milliseconds": f"{serving.milliseconds:.1f}" if serving else "",
        "milliseconds_beside": f"{serving.milliseconds_beside:.1f}" if serving else "",
        "megabytes": f"{serving.size_bytes / _BYTES_PER_MB:.1f}" if serving else "",
        "seeds": str(point.seeds),
        "winner": point is recommended.taken.point,
    }


def content(recommended: Recommendation) -> dict[str, Any]:
    """Return the content of `report.json` as plain data, from which the HTML report is rendered, too."""
    summary, taken = recommended.summary, recommended.taken
    result, point = summary.result, taken.point
    return {
        "recommendation": " ".join(recommendation(recommended)),
        "baselines": baselines(summary),
        "crossover": crossover(summary),
        "caveats": caveats(summary),
        "metric": summary.metric,
        "tolerance": recommended.tolerance,
        "cost": recommended.cost,
        "winner": {
            "base": taken.way.base,
            "strategy": taken.way.strategy,
            "budget": budget_name(point.budget if taken.estimate.measured else summary.largest),
            **asdict(taken.estimate),
        },
        "unknown": [
            {"base": each.way.base, "strategy": each.way.strategy, "seconds": round(each.seconds)}
            | ({} if each.estimate is None else asdict(each.estimate))
            for each in recommended.unknown
        ],
        "data": {
            "title": result.title,
            "train_texts": len(result.train.texts),
            "test_texts": len(result.test.texts),
            "labels": len(result.train.labels),
            "multi_label": result.train.multi_label,
        },
        "points": [
            {
                "base": each.way.base,
                "strategy": each.way.strategy,
                "budget": budget_name(each.budget),
                "profile": "quick" if each.quick else "full",
                "texts_per_label": summary.per_label(each.budget),
                "texts": each.texts,
                "seeds": each.seeds,
                f"{summary.metric}_low": each.score.low,
                f"{summary.metric}_high": each.score.high,
                **each.means,
            }
            for each in summary.points
        ],
        "cells": [{**asdict(outcome.cell), "figures": outcome.figures} for outcome in result.outcomes],
        "serving": [{**asdict(cost), "milliseconds": cost.milliseconds} for cost in result.serving],
        "classes": [asdict(each) for each in class_figures(result.test, point.outcomes)],
        "confusions": [asdict(confusion) for confusion in confusions(summary, point)],
        "suspects": [asdict(suspect) for suspect in suspects(summary)],
        "skipped": skipped_lines(summary),
        "version": version("emberpc"),
        "created": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
