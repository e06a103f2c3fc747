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

#: Least seconds between two lines about the same stage if stderr is not a terminal.
_LINE_SECONDS = 30.0


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Context manager that shows a progress bar on stderr during its block, if stderr is a terminal.

    Args:
        what: name of the operation to show, such as "embedding".
        total: number of items of the operation; None if it is unknown.

    Yields:
        A function to call with the number of items done since the start. It does nothing if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


class Stages(Protocol):
    """Function that an operation with several stages calls with its progress."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report that `done` of `total` steps of a stage are done since its start.

        Args:
            stage: name of the stage. The first call with a name starts the stage.
            done: number of steps done, in any unit.
            total: number of all steps, in the same unit.
            detail: words to show beside the two numbers.
        """


@contextmanager
def stages() -> Iterator[Stages]:
    """Context manager that shows the progress of an operation with several stages on stderr.

    On a terminal each stage has a bar. When another stage starts, or the block ends without an exception, the bars so
    far are shown as complete. Elsewhere a line is printed when a stage starts, and then at most every 30 seconds, when
    the function is called.

    Yields:
        The function to call with the progress of a stage.
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
