"""What the command line shows of something that takes long: bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emberpc.cli.output import note


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if that is a terminal.

    Args:
        what: what is being done, such as "embedding".
        total: how many there are to do; None if that is not known.

    Yields:
        To be called with the number done so far.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class Stages(Protocol):
    """Told how far something with stages is."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Take note that so much of a stage is done, and of what else there is to know."""


@contextmanager
def stages() -> Iterator[Stages]:
    """Show the progress of something with stages on stderr: a bar each on a terminal, elsewhere a line each."""
    seen: dict[str, Any] = {}
    if not sys.stderr.isatty():

        def tell(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in seen:
                seen[stage] = None
                note(f"{stage} …")

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def show(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in seen:
                finish_all()
                seen[stage] = bar.add_task(stage, total=total, detail="")
            bar.update(seen[stage], completed=done, total=total, detail=detail)

        def finish_all() -> None:
            for task in bar.tasks:
                bar.update(task.id, completed=task.total, detail="")

        yield show
        finish_all()
