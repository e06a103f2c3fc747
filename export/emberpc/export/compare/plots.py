"""Draw the plots of a comparison as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.compare.data_problems import Confusion
from emberpc.export.compare.figures import draw
from emberpc.export.compare.outcomes import ALL, NO_TEXTS, Way
from emberpc.export.compare.recommendation import Recommendation, metric_name
from emberpc.export.compare.summary import Point, Summary
from emberpc.export.timing import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours of strategies, which colour-blind readers can distinguish (Okabe and Ito, "Color Universal Design", 2008).
_COLOURS = ("#000000", "#999999", "#56B4E9", "#009E73", "#0072B2", "#E69F00", "#CC79A7", "#D55E00")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
#: Minimum number of decisions of a bin of confidence that the reliability plot draws. With fewer, the share of right
#: decisions is too uncertain.
_MIN_DECISIONS = 10


def draw_plots(
    recommended: Recommendation,
    confused: Sequence[Confusion],
    folder: Path,
    allows: Callable[[float], bool] = lambda _seconds: True,
) -> dict[str, Path]:
    """Draw the plots of a comparison, as far as time allows.

    Args:
        recommended: the recommendation, with the comparison's summary.
        confused: confusions of the recommended classifier, from `data_problems.confusions`.
        folder: folder to write the PNG files to; it must exist. A file of a plot that is left out is removed: it shows
            older measurements.
        allows: whether the time limit allows work of a number of seconds. It is asked before each plot, with the
            seconds of the plot before it.

    Returns:
        The path of each PNG file, by plot: `learning-curves`, `confusions`, `accuracy-cost`, `reliability`.

    Raises:
        OSError: a file cannot be written.
        ExportError: `folder` has a folder or a device with the name of a plot's file.
    """
    summary = recommended.summary
    plots: dict[str, Callable[[Axes], None]] = {
        "learning-curves": lambda axes: _learning_curves(axes, summary),
        "confusions": lambda axes: _confusions(axes, confused, multi_label=summary.result.test.multi_label),
        "accuracy-cost": lambda axes: _accuracy_cost(axes, summary),
        "reliability": lambda axes: _reliability(axes, recommended),
    }
    found, last = {}, Cost()
    for name, plot in plots.items():
        path = folder / f"{name}.png"
        if not allows(last.seconds):
            path.unlink(missing_ok=True)
            continue
        last = Cost()
        with last:
            found[name] = draw(plot, path)
    return found


def _style(summary: Summary, way: Way) -> dict[str, str]:
    base = list(summary.result.sources).index(way.base)
    return {
        "color": _COLOURS[list(STRATEGIES).index(way.strategy) % len(_COLOURS)],
        "linestyle": _LINES[base % len(_LINES)],
        "marker": _MARKERS[base % len(_MARKERS)],
        "label": summary.title(way),
    }


def _learning_curves(axes: Axes, summary: Summary) -> None:
    for way in summary.ways:
        curve, style = summary.curve(way), _style(summary, way)
        if curve[0].budget == NO_TEXTS:
            axes.axhline(curve[0].score.value, color=style["color"], linestyle=style["linestyle"], label=style["label"])
            continue
        x = [summary.per_label(point.budget) for point in curve]
        y = [point.score.value for point in curve]
        axes.plot(x, y, markersize=4, linewidth=1.6, **style)  # type: ignore[arg-type]
        low, high = [point.score.low for point in curve], [point.score.high for point in curve]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        quick = [(summary.per_label(point.budget), point.score.value) for point in curve if point.quick]
        if quick:
            axes.plot(*zip(*quick, strict=True), linestyle="", marker=style["marker"], markersize=4, zorder=3,
                      markerfacecolor="white", markeredgecolor=style["color"])  # fmt: skip
        _estimate(axes, summary, way, style["color"])
    scores = [point.score.value for point in summary.points]
    axes.set_ylim(min(scores) - 0.05, min(1.0, max(scores) + 0.1))
    budgets = sorted(summary.result.per_label, key=summary.per_label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([summary.per_label(budget) for budget in budgets])
    axes.set_xticklabels(["all" if budget == ALL else str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("training texts of each label")
    axes.set_ylabel(f"{metric_name(summary.metric)} on the test texts")
    title = "Learning curves; bands and bars: 95 % intervals; hollow: a quick training; dotted: an estimate"
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="lower right")


def _estimate(axes: Axes, summary: Summary, way: Way, colour: str) -> None:
    """Draw the estimate of a strategy at the largest budget, if it was not measured there, with its interval."""
    point, found = summary.last(way), summary.estimate(way)
    if point is None or found is None or found.measured or not way.served:
        return
    x = [summary.per_label(point.budget), summary.per_label(summary.largest)]
    axes.plot(x, [point.score.value, found.value], linestyle=":", linewidth=1.2, color=colour)
    bar = [[found.value - found.low], [found.high - found.value]]
    axes.errorbar([x[1]], [found.value], yerr=bar, fmt="none", ecolor=colour, elinewidth=1, capsize=3)


def _accuracy_cost(axes: Axes, summary: Summary) -> None:
    for way in summary.ways:
        curve, style = summary.curve(way), _style(summary, way)
        x = [max(point.means["cpu_seconds"], 1e-2) for point in curve]
        axes.plot(x, [point.score.value for point in curve], markersize=4, linewidth=1.2, **style)  # type: ignore[arg-type]
        end = curve[-1]
        if end.budget != NO_TEXTS:
            name = "all" if end.budget == ALL else str(end.budget)
            axes.annotate(name, (x[-1], end.score.value), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("CPU-seconds of the training, embedding the texts included")
    axes.set_ylabel(f"{metric_name(summary.metric)} on the test texts")
    axes.set_title("Accuracy against cost; along a line, the texts of each label grow", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def _reliability(axes: Axes, recommended: Recommendation) -> None:
    summary = recommended.summary
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="perfectly calibrated")
    for point in _reliability_points(recommended):
        outcome = point.outcomes[0]
        style = {**_style(summary, point.way), "label": f"{point.way.strategy}, ECE {point.means['ece']:.3f}"}
        bins = [bin_ for bin_ in outcome.reliability if bin_[2] >= _MIN_DECISIONS]
        if not bins:
            continue
        x, y, counts = zip(*bins, strict=True)
        axes.plot(x, y, linewidth=1.4, **{**style, "marker": None})  # type: ignore[arg-type]
        maximum = max(counts)
        axes.scatter(x, y, s=[8 + 120 * count / maximum for count in counts], color=style["color"], alpha=0.7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence of the decision")
    axes.set_ylabel("share that is right")
    axes.set_title("Reliability on the test texts; the larger a dot, the more decisions", fontsize=10)
    axes.legend(fontsize=8, loc="upper left")


def _reliability_points(recommended: Recommendation) -> list[Point]:
    """Return the points that get a reliability line, without repetition.

    These are the recommended point, the best point of the strategies that do not train the encoder, and the best point
    of the strategies that do.
    """
    points = [recommended.taken.point, recommended.summary.frozen, recommended.summary.tuned]
    return list({point.way: point for point in points if point is not None}.values())


def _confusions(axes: Axes, confused: Sequence[Confusion], *, multi_label: bool) -> None:
    if not confused:
        nothing = "no label of a test text was missed" if multi_label else "no test text was given a wrong label"
        axes.text(0.5, 0.5, nothing, ha="center", transform=axes.transAxes)
        return
    names = [f"{c.label} → {c.given}" for c in confused]
    places = range(len(names))
    axes.barh(places, [c.count for c in confused], color=_COLOURS[3])
    shown = [name if len(name) <= 64 else f"{name[:63]}…" for name in names]
    axes.set_yticks(places, shown, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("test texts, mean over the seeds")
    title = "Labels that the recommended strategy misses most, and the label that it gives in addition"
    axes.set_title(title if multi_label else "Labels that the recommended strategy confuses most", fontsize=10)
