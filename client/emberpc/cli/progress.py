"""Show the progress of long operations on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emberpc.cli.output import note

#: Seconds between two lines about a stage if stderr is not a terminal.
_LINE_SECONDS = 30.0


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if stderr is a terminal.

    Args:
        what: description of the operation, such as "embedding".
        total: number of items; None if it is unknown.

    Yields:
        A function to call with the number of items done.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class Stages(Protocol):
    """Callback that receives the progress of an operation with several stages."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report that `done` of `total` steps of a stage are done; `detail` is shown beside them."""


@contextmanager
def stages() -> Iterator[Stages]:
    """Show the progress of an operation with several stages on stderr.

    On a terminal each stage is a bar. Elsewhere it is a line at the start and another line every 30 seconds.
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
