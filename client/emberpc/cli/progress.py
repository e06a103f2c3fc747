"""Show the progress of long operations on stderr."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from emberpc.cli.output import note

#: Seconds until the second line about a stage if stderr is not a terminal. Each further line takes twice as long as the
#: one before, at most `_MAX_SECONDS`.
_FIRST_SECONDS, _MAX_SECONDS = 10.0, 60.0


@contextmanager
def progress(what: str, total: int | Callable[[], int | None] | None = None) -> Iterator[Callable[[int], None]]:
    """Context manager that shows a progress bar on stderr during its block, if stderr is a terminal.

    Args:
        what: name of the operation to show, such as "embedding".
        total: number of items of the operation, or a function that returns it and is called only if the bar is shown;
            None if it is unknown.

    Yields:
        A function to call with the number of items done since the start. It does nothing if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # With `redirect_stdout`, Rich would print to stderr what the block prints to stdout.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=total() if callable(total) else total)
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


class _Lines:
    """Prints a line when a stage starts, and while it lasts a line after 10, 20, 40 and then every 60 seconds.

    A thread prints the later lines, also while the operation reports nothing, as during a conversion of a model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._seen: set[str] = set()
        #: The last report, as a line; empty before the first report.
        self._line = ""
        #: When the stage started and when the next line is due, by `monotonic`, and seconds from that line to the next.
        self._start, self._due, self._gap = 0.0, 0.0, _FIRST_SECONDS

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def report(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report progress; the arguments are those of `Stages`."""
        with self._lock:
            counts = f"{done:,} of {total:,}" if total > 1 else ""
            self._line = f"{stage} … {', '.join(filter(None, (counts, detail)))}".rstrip()
            if stage not in self._seen:
                self._seen.add(stage)
                self._start, self._gap = monotonic(), _FIRST_SECONDS
                self._due = self._start + self._gap
                note(self._line)

    def _repeat(self) -> None:
        while not self._ended.wait(self._print_if_due()):
            pass

    def _print_if_due(self) -> float:
        """Print the last report if a line about it is due. Return the seconds until the next line may be due."""
        with self._lock:
            now = monotonic()
            if self._line and now >= self._due:
                note(f"{self._line} ({now - self._start:.0f} s)")
                self._gap = min(2 * self._gap, _MAX_SECONDS)
                self._due = now + self._gap
            return min(max(self._due - now, 0.01), _FIRST_SECONDS) if self._line else _FIRST_SECONDS / 10


@contextmanager
def stages() -> Iterator[Stages]:
    """Context manager that shows the progress of an operation with several stages on stderr.

    On a terminal each stage has a bar. When another stage starts, or the block ends without an exception, the bars so
    far are shown as complete. Elsewhere `_Lines` prints lines.

    Yields:
        The function to call with the progress of a stage.
    """
    seen: dict[str, Any] = {}
    if not sys.stderr.isatty():
        lines = _Lines()
        try:
            lines.start()
            yield lines.report
        finally:
            lines.stop()
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
