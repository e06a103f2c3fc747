"""What the command line shows of something that takes long: bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emberpc.cli.output import note

#: Seconds between two lines about a stage where stderr is no terminal.
_LINE_SECONDS = 30.0


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
    """Show the progress of something with stages on stderr.

    On a terminal each stage is a bar. Elsewhere it is a line, and another one each half a minute that it lasts.
    """
    seen: dict[str, Any] = {}
    if not sys.stderr.isatty():

        def tell(stage: str, done: int, total: int, detail: str = "") -> None:
            now = monotonic()
            if stage not in seen:
                note(f"{stage} …")
            elif now - seen[stage] >= _LINE_SECONDS:
                note(f"{stage} … {done} of {total}{f', {detail}' if detail else ''}")
            else:
                return
            seen[stage] = now

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
