"""Which road leads to a label on this data: compare all strategies, and say which one to take."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from emberpc.bundle import Manifest, check_target
from emberpc.export.classifier import export_classifier
from emberpc.export.comparing.report import write_report
from emberpc.export.comparing.running import Wanted, run
from emberpc.export.comparing.summary import Summary
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.strategies import EXPORTABLE


def compare(wanted: Wanted, folder: Path | str, *, worth: float = 0.005, progress: Progress = no_progress) -> Summary:
    """Compare the ways to a label, and write a report.

    What was measured is kept in the folder, so that the same call goes on
    where it was interrupted, or with more budgets, strategies, seeds or time.

    Args:
        wanted: what to compare.
        folder: where the report and what was measured go; made if need be.
        worth: what a way with a dearer training must gain in accuracy, in [0, 1], to be recommended.
        progress: told what is being done.

    Returns:
        The comparison; `report.html`, `report.json` and PNGs are in the folder.

    Raises:
        ExportError: data or a base cannot be used, the folder holds another comparison, or there was no time for any
            of it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    compared = run(wanted, folder, progress)
    if not compared.outcomes:
        if failed := [skipped for skipped in compared.skipped if not skipped.for_time]:
            raise ExportError(f"nothing could be measured; {failed[0].cell.strategy}: {failed[0].reason}")
        raise ExportError(f"the time limit of {wanted.time_limit:.0f} s left no time for anything; allow more")
    if not compared.skipped:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    summary = Summary(compared, worth)
    progress("writing the report", 0, 1)
    write_report(summary, folder)
    return summary


def check_winner(wanted: Wanted, target: Path | str, *, overwrite: bool = False) -> None:
    """See that a winner could be exported, before a comparison spends hours on finding it.

    Args:
        wanted: what is to be compared.
        target: the bundle's folder.
        overwrite: whether to replace a bundle that is there.

    Raises:
        ExportError: no strategy that is wanted can be exported.
        BundleError: `target` is taken.
    """
    check_target(target, overwrite=overwrite)
    if not set(wanted.strategies) & set(EXPORTABLE):
        raise ExportError(
            f"none of {', '.join(wanted.strategies)} can be exported; add one of {', '.join(EXPORTABLE)}, "
            "or do without the winner's bundle"
        )


def export_winner(
    summary: Summary, wanted: Wanted, target: Path | str, *, overwrite: bool = False, progress: Progress = no_progress
) -> Manifest:
    """Fit the recommended way to all training texts, and export it as a bundle.

    That takes time of its own, beyond the limit of the comparison; its estimate is told as progress.

    Args:
        summary: the comparison.
        wanted: what was compared.
        target: the bundle's folder; whole at the end, or not there.
        overwrite: whether to replace a bundle that is there.
        progress: told what is being done.

    Raises:
        ExportError: it cannot be fitted or exported, such as if the winner keeps its examples.
        BundleError: `target` is taken.
    """
    winner = summary.winner
    way, share = winner.way, len(summary.compared.train.texts) / max(1, winner.texts)
    seconds = winner.means["wall_seconds"] * (share if winner.texts else 1)
    progress(f"exporting the winner, {way.strategy}: about {seconds:.0f} s to fit it to all texts", 0, 1)
    return export_classifier(
        replace(wanted.data, outside=None),  # its texts were measured on
        summary.compared.sources[way.base],
        target,
        strategy=way.strategy,
        label_texts=wanted.label_texts,
        balanced=wanted.balanced,
        overwrite=overwrite,
        max_tokens=wanted.max_tokens,
        progress=progress,
    )
