"""Compare strategies for a classifier on the user's data, and recommend a strategy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import ceil
from pathlib import Path
from time import perf_counter

from emberpc.bundle import Manifest, check_target
from emberpc.export.classifier import export_classifier
from emberpc.export.compare.comparison_run import run
from emberpc.export.compare.comparison_settings import ComparisonSettings
from emberpc.export.compare.outcomes import ALL
from emberpc.export.compare.recommendation import COSTS, Recommendation
from emberpc.export.compare.report import write_report
from emberpc.export.compare.summary import Summary
from emberpc.export.compare.time_limit import TimeLimit
from emberpc.export.errors import ExportError
from emberpc.export.names import EXPORTABLE
from emberpc.export.progress import Progress, no_progress


def compare(
    settings: ComparisonSettings,
    folder: Path | str,
    *,
    tolerance: float = 0.01,
    cost: str = "training",
    progress: Progress = no_progress,
    start: float | None = None,
) -> Recommendation:
    """Compare strategies, and write a report.

    Outcomes are stored in the folder. The same call continues an interrupted comparison, also with other budgets,
    strategies, seeds or time; the report covers all stored outcomes. Checkpoints of interrupted trainings are kept in
    the folder until no cell is skipped.

    Args:
        settings: settings of the comparison.
        folder: folder of the report and the outcomes; it is created if it does not exist.
        tolerance: how much worse than the best strategy, in [0, 1], the recommended one may be if it costs less.
        cost: the cost to save, `training` or `serving`.
        progress: called with the current step.
        start: time, in seconds of `time.perf_counter`, from which the time limit counts; default: now.

    Returns:
        The recommendation, with the summary; `report.html`, `report.json` and PNG files are in the folder. If the time
        limit passes while the report is written, the other plots are left out.

    Raises:
        ExportError: `cost` is unknown, data or a base cannot be used, the folder holds another comparison, a checkpoint
            cannot be written, no strategy could be fitted, or the time limit left no time for any outcome.
        OSError: another file cannot be written.
    """
    if cost not in COSTS:
        raise ExportError(f"there is no cost {cost!r}; there are: {', '.join(COSTS)}")
    start = perf_counter() if start is None else start
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result = run(settings, folder, progress, start)
    if not result.outcomes:
        failed = [skipped for skipped in result.skipped if not skipped.for_time]
        if failed and not result.needed_seconds:
            raise ExportError(f"nothing could be measured; {failed[0].cell.strategy}: {failed[0].reason}")
        raise ExportError(
            f"the time limit of {settings.time_limit:.0f} s left no time for any measurement; the first one needs a "
            f"limit of about {ceil(result.needed_seconds)} s"
        )
    if not result.skipped:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    found = Recommendation(Summary(result, settings.metric), tolerance, cost)
    progress("writing the report", 0, 1)
    write_report(found, folder, TimeLimit(start, settings.time_limit).allows)
    return found


def check_winner(settings: ComparisonSettings, target: Path | str, *, overwrite: bool = False) -> None:
    """Check that a comparison can have a winner to export, and that `target` may be written.

    Call this before the comparison, which may take hours.

    Args:
        settings: settings of the comparison.
        target: the bundle's folder.
        overwrite: whether to replace an existing bundle.

    Raises:
        ExportError: none of the strategies can be exported.
        BundleError: `target` exists and may not be replaced.
    """
    check_target(target, overwrite=overwrite)
    if not set(settings.strategies) & set(EXPORTABLE):
        raise ExportError(
            f"none of {', '.join(settings.strategies)} can be exported; add one of {', '.join(EXPORTABLE)}, "
            "or leave out the winner's bundle"
        )


def export_winner(
    found: Recommendation,
    settings: ComparisonSettings,
    target: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Manifest:
    """Fit the recommended strategy to all training texts, and export it as a bundle.

    This takes time in addition to the comparison's time limit; the first progress message has an estimate. Texts
    outside all labels are not used: the bundle gets the default `rejection_rate` of `export_classifier`.

    Args:
        found: the recommendation, as `compare` returned it.
        settings: settings of the comparison.
        target: the bundle's folder; it is written atomically.
        overwrite: whether to replace an existing bundle.
        progress: called with the current step.

    Returns:
        The manifest of the bundle.

    Raises:
        ExportError: the strategy cannot be fitted or exported; for example, `nearest` cannot be exported.
        BundleError: `target` exists and may not be replaced.
    """
    summary, way, point = found.summary, found.taken.way, found.taken.point
    seconds = point.means["wall_seconds"] * summary.growth(point, ALL)
    progress(f"exporting the winner, {way.strategy}: about {seconds:.0f} s to fit it to all texts", 0, 1)
    return export_classifier(
        replace(settings.data, outside=None),  # the comparison measured on these texts only, so they set no rejection
        summary.result.sources[way.base],
        target,
        strategy=way.strategy,
        label_texts=settings.label_texts,
        balanced=settings.balanced,
        overwrite=overwrite,
        max_tokens=settings.max_tokens,
        progress=progress,
    )
