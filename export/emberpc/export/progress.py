"""Callbacks that report the progress of an export."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Callback for progress. A step calls it at its start, after parts of its work, or both."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report progress.

        Args:
            stage: name of the step in a few words; another name starts another step.
            done: amount of the step's work that is done, in the unit of `total`. A step may end without a report of
                the whole `total`.
            total: amount of work of the step, such as its number of texts; at least 1.
            detail: more information about the moment, such as the loss.
        """


def no_progress(stage: str, done: int, total: int, detail: str = "") -> None:
    """Ignore a report. This is the default of each optional argument of the type `Progress`."""
