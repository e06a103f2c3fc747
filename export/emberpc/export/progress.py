"""How an export tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called at the start of each stage, and again as the stage goes on."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note.

        Args:
            stage: what is being done, in a few words; a new name is a new stage.
            done: how much of it is done.
            total: how much there is to do; at least 1.
            detail: what else there is to know just now, such as the loss.
        """


def no_progress(stage: str, done: int, total: int, detail: str = "") -> None:
    """Take no note: the default."""
