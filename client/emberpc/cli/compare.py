"""The command `emberpc compare`: measure classification strategies on the user's data, and recommend one."""

from __future__ import annotations

import json
import re
import reprlib
import shlex
from enum import Enum
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from emberpc.cli.errors import EXPORT_PACKAGES, CliError, require
from emberpc.cli.export import (
    DEFAULT_BASE,
    DESCRIPTION_COLUMNS,
    Balanced,
    Descriptions,
    LabelColumn,
    LabelSeparator,
    LabelTexts,
    MaxTokens,
    MinExamples,
    TextColumn,
    Train,
    exporting,
    labelled_columns,
    text_columns,
)
from emberpc.cli.options import AsJson, completer, listed
from emberpc.cli.output import Column, note, print_blank_line, print_json, print_lines, print_table
from emberpc.export.data.classifier_data import ClassifierData
from emberpc.export.names import STRATEGY_NAMES, check_strategies

if TYPE_CHECKING:
    from emberpc.export.compare.recommendation import Recommendation
    from emberpc.export.compare.summary import Summary

_UNITS = {"s": 1, "m": 60, "h": 3600}
_EVERYTHING = "1,2,4,8,16,32,all"
_BYTES_PER_MB = 1e6
#: Maximum number of lines on stderr about a strategy and budget that was not measured. If there are more, one further
#: line states how many; the report lists all.
_SKIPPED = 5
#: Maximum number of labels whose figures are printed; the report lists all.
_WEAKEST = 8


class Metric(str, Enum):
    """Figures by which strategies can be compared."""

    ACCURACY = "accuracy"
    MACRO_F1 = "macro-f1"
    MICRO_F1 = "micro-f1"


class SavedCost(str, Enum):
    """Costs by which strategies can be compared."""

    TRAINING = "training"
    SERVING = "serving"


def compare(
    train: Train,
    test: Annotated[Path, typer.Option(metavar="FILE", help="A file like --train, to measure on.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the report and of all measurements; a later run resumes from them.",
        ),
    ],
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help=f"An encoder, as for `export embedding`; may be given several times; default: {DEFAULT_BASE}.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,…",
            help=f"Numbers of training texts of each label; may be given several times; default: {_EVERYTHING}.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            autocompletion=completer(STRATEGY_NAMES),
            help=f"Strategies to compare; may be given several times; default: all: {', '.join(STRATEGY_NAMES)}.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Number of times that each strategy is fitted, each time to another sample of the budget."
        ),
    ] = 3,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit such as 90s, 30m or 2h, without --export-winner; what was not measured is listed.",
            show_default=False,
        ),
    ] = None,
    out_of_scope: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts that have none of the labels, to measure rejection on.")
    ] = None,
    descriptions: Descriptions = None,
    label_texts: LabelTexts = True,
    label_separator: LabelSeparator = None,
    balanced: Balanced = False,
    min_examples: MinExamples = 2,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Percentage points by which the recommended strategy may be worse than the best, if it costs less.",
        ),
    ] = 1.0,
    metric: Annotated[
        Metric, typer.Option(help="Figure on the test texts by which strategies are compared.")
    ] = Metric.ACCURACY,
    cost: Annotated[
        SavedCost,
        typer.Option(
            help="Cost to save: CPU-seconds of the training, or milliseconds of serving beside the vectors of the base."
        ),
    ] = SavedCost.TRAINING,
    worth: Annotated[
        float | None, typer.Option(min=0, hidden=True, help="Deprecated: use --tolerance.", show_default=False)
    ] = None,
    export_winner: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Fit the winner to all texts, and export it to this folder as a bundle."),
    ] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    max_tokens: MaxTokens = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of --export-winner.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare classification strategies, from heads on vectors to full fine-tuning, on your own data; recommend one."""
    require(EXPORT_PACKAGES, "export", "emberpc compare")
    start = perf_counter()  # loading PyTorch takes seconds, which count for the time limit, too
    left = f"all measurements are kept in {output}; run the same command to resume"
    if output.exists() and not output.is_dir():
        raise CliError(f"--output: {output} is not a folder; choose another place")
    budgets, limit = _budgets(budget or [_EVERYTHING]), _seconds(time_limit)
    strategies = tuple(listed("--strategy", strategy)) if strategy else STRATEGY_NAMES
    bases = tuple(base or [DEFAULT_BASE])
    labelled = labelled_columns(text_column, label_column, label_separator)
    files = {
        train: labelled,
        test: labelled,
        out_of_scope: text_columns(text_column),
        descriptions: DESCRIPTION_COLUMNS,
    }
    if worth is not None:
        note("--worth is deprecated: use --tolerance")
        tolerance = worth
    if not isfinite(tolerance):
        raise CliError(f"--tolerance is {tolerance}; give a number of percentage points, such as 1")
    data = ClassifierData(
        train=train,
        outside=out_of_scope,
        descriptions=descriptions,
        text_column=text_column,
        label_column=label_column,
        separator=label_separator,
        min_examples=min_examples,
    )

    def check() -> None:
        check_strategies(strategies)
        data.read(with_descriptions=label_texts)
        data.test_texts(test)

    with exporting(
        files,
        bases,
        export_winner,
        check,
        max_tokens=max_tokens,
        overwrite=overwrite,
        command="emberpc compare",
        left=left,
    ) as progress:
        from emberpc.export.compare import comparison
        from emberpc.export.compare.comparison_settings import ComparisonSettings
        from emberpc.export.compare.outcomes import ALL

        settings = ComparisonSettings(
            data=data,
            test=test,
            bases=bases,
            budgets=tuple(ALL if each is None else each for each in budgets),
            strategies=strategies,
            seeds=seeds,
            time_limit=limit,
            label_texts=label_texts,
            balanced=balanced,
            max_tokens=max_tokens,
            metric=metric.value.replace("-", "_"),
        )
        if export_winner is not None:
            comparison.check_winner(settings, export_winner, overwrite=overwrite)
        found = comparison.compare(
            settings, output, tolerance=tolerance / 100, cost=cost.value, progress=progress, start=start
        )
        if export_winner is not None:
            comparison.export_winner(found, settings, export_winner, overwrite=overwrite, progress=progress)
    _show(found, output, as_json, train, exported=export_winner is not None)


def _budgets(values: list[str]) -> list[int | None]:
    """Return the budgets that the values of --budget name, in order; None for `all`.

    Raises:
        CliError: an item is neither `all` nor a number from 1 with at most 9 digits, or is repeated.
    """
    found: list[int | None] = []
    for part in listed("--budget", values):
        if not (part == "all" or (len(part) < 10 and part.isascii() and part.isdecimal() and int(part))):
            remedy = "give numbers from 1 with commas between them, and all for all texts"
            raise CliError(f"--budget has {reprlib.repr(part)}; {remedy}")
        found.append(None if part == "all" else int(part))
    return found


def _seconds(text: str | None) -> float | None:
    """Return the value of --time-limit, such as `30m`, in seconds; None stays None.

    Raises CliError unless the value is a number and s, m or h.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None:
        raise CliError(f"--time-limit is {text!r}; give a number and s, m or h, such as 30m")
    return float(match[1]) * _UNITS[match[2]]


def _show(found: Recommendation, folder: Path, as_json: bool, train: Path, *, exported: bool) -> None:
    """Print the figures, the recommendation, the weakest labels, and what was not measured."""
    from emberpc.export.compare.recommendation import (
        baselines,
        caveats,
        crossover,
        metric_name,
        recommendation,
        skipped_lines,
    )

    if as_json:
        print_json([json.loads((folder / "report.json").read_text(encoding="utf-8"))])
        return
    summary = found.summary
    headings, table = _figures(summary)
    note(
        f"{metric_name(summary.metric)} on the test texts, by the number of training texts of each label "
        f"({', '.join(headings)}); * a quick training:"
    )
    print_table(*table)
    print_blank_line()
    print_lines([*recommendation(found), crossover(summary), baselines(summary)])
    print_blank_line()
    _show_labels(found)
    for line in caveats(summary):
        note(line)
    skipped = skipped_lines(summary)
    for line in skipped[:_SKIPPED]:
        note(f"not measured: {line}")
    if len(skipped) > _SKIPPED:
        note(f"not measured: {len(skipped) - _SKIPPED} more, which the report lists")
    note(f"the report is in {folder / 'report.html'}")
    if not exported and found.taken.way.exportable:
        source = summary.result.sources[found.taken.way.base]
        command = ["emberpc", "export", "classifier", "--train", str(train), "--base", source]
        command += ["--strategy", found.taken.way.strategy, "-o", "DIR"]
        note(f"next: `{shlex.join(command)}`, with the same options for columns, labels and tokens")


def _figures(summary: Summary) -> tuple[list[str], tuple[list[Column], list[list[str]]]]:
    """Return the headings of the budgets, and the table of all strategies as columns and rows."""
    from emberpc.export.compare.outcomes import ALL, NO_TEXTS

    budgets = sorted({p.budget for p in summary.points} - {NO_TEXTS}, key=summary.per_label) or [NO_TEXTS]
    several = len(summary.result.sources) > 1
    headings = [{ALL: "all", NO_TEXTS: "none"}.get(budget, str(budget)) for budget in budgets]
    columns = [
        Column("strategy"),
        *([Column("base")] if several else []),
        *(Column(heading, "right") for heading in headings),
        *(Column(title, "right") for title in ("macro F1", "ECE", "training, CPU-s", "ms a text", "size, MB")),
    ]
    rows = []
    for way in summary.ways:
        curve = {point.budget: point for point in summary.curve(way)}
        last, serving = list(curve.values())[-1], summary.serving(way)
        scores = [curve.get(budget, curve.get(NO_TEXTS)) for budget in budgets]
        rows.append(
            [
                way.strategy,
                *([way.base] if several else []),
                *("" if point is None else f"{point.score.value:.3f}{'*' * point.quick}" for point in scores),
                f"{last.means['macro_f1']:.3f}",
                f"{last.means['ece']:.3f}",
                f"{last.means['cpu_seconds']:.1f}",
                f"{serving.milliseconds:.1f}" if serving else "",
                f"{serving.size_bytes / _BYTES_PER_MB:.1f}" if serving else "",
            ]
        )
    return headings, (columns, rows)


def _show_labels(found: Recommendation) -> None:
    """Print the labels with the lowest F1 by the recommended strategy, at most 8, with precision, recall and F1.

    Beside a label stands the label that its test texts were given most often by mistake, if the pair is one of the 12
    most frequent confusions. If the texts may have several labels, it is the label that was given most often by mistake
    where this one was missed.
    """
    from emberpc.export.compare.class_figures import class_figures
    from emberpc.export.compare.data_problems import confusions

    summary, point = found.summary, found.taken.point
    instead: dict[str, str] = {}
    for each in confusions(summary, point):
        instead.setdefault(each.label, f"{each.given} ({100 * each.share:.0f} %)")
    figures = class_figures(summary.result.test, point.outcomes)
    name, where = summary.name(point.way, quick=point.quick), summary.where(point.budget)
    note(f"labels with the lowest F1 by {name} {where}, of {len(figures)}:")
    confused = "missed, given instead" if summary.result.test.multi_label else "confused with"
    print_table(
        [Column("label"), *(Column(name, "right") for name in ("precision", "recall", "F1")), Column(confused)],
        [
            [each.label, f"{each.precision:.2f}", f"{each.recall:.2f}", f"{each.f1:.2f}", instead.get(each.label, "")]
            for each in figures[:_WEAKEST]
        ],
    )
    print_blank_line()
