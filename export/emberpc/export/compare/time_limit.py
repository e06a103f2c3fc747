"""The time limit of a comparison: when the measurements must stop, and how long the report will take."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from emberpc.export.compare.figures import draw
from emberpc.export.compare.outcomes import Decisions
from emberpc.export.compare.uncertainty import Bootstrap
from emberpc.export.data.examples import Targets
from emberpc.export.timing import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Share of the time limit by which a comparison may exceed it, beside one step that cannot be interrupted.
TOLERATED = 0.05
#: Seconds of the whole report, as a multiple of the seconds of one plot: four plots, the page and the tables.
_PLOTS = 8.0
#: The reserved time is this multiple of the estimate: the load of the host changes.
_SAFETY = 1.5
#: Minimum seconds that are reserved for the report.
_MIN_SECONDS = 1.0
#: Number of points of each line of the trial plot, and number of lines: about those of a learning curve.
_POINTS, _TRIAL_LINES = 7, 8


class OutOfTimeError(Exception):
    """The time for measurements passed in the middle of a step."""


class TimeLimit:
    """Says how much time is left for measurements. A part of the time limit, `reserve`, is kept for the report.

    Args:
        start: time, in seconds of `time.perf_counter`, from which the time limit counts.
        seconds: the time limit; None: no limit.
    """

    def __init__(self, start: float, seconds: float | None) -> None:
        self._start = start
        self._seconds = seconds
        #: Seconds at the end of the time limit in which nothing is measured.
        self.reserve = 0.0

    @property
    def spent(self) -> float:
        """Wall seconds since the start."""
        return perf_counter() - self._start

    @property
    def left(self) -> float | None:
        """Wall seconds that are left for measurements, negative once they are over; None: there is no limit."""
        return None if self._seconds is None else self._seconds - self.reserve - self.spent

    def check(self) -> None:
        """Raise `OutOfTimeError` if no time is left for measurements."""
        if self.left is not None and self.left < 0:
            raise OutOfTimeError

    def allows(self, seconds: float) -> bool:
        """Return whether work of that many seconds ends before the limit is exceeded by more than `TOLERATED`."""
        return self._seconds is None or self.spent + seconds <= (1 + TOLERATED) * self._seconds


class ReportTime:
    """Estimate of the seconds in which the report is written, from a trial on this host.

    The trial also loads the libraries of the report, which takes seconds on a busy host and is not repeated.

    Args:
        targets: the right labels of the test texts, bool (texts, labels).
        metric: name of the figure by which strategies are compared, such as `accuracy`.
    """

    def __init__(self, targets: Targets, metric: str) -> None:
        import jinja2  # noqa: F401 - the report uses it; loading it here keeps the report short

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.png"
            draw(_trial, path)  # loads matplotlib and its fonts
            with Cost() as plot:
                draw(_trial, path)
        with Cost() as bootstrap:
            trial = Bootstrap(targets)
        rows = list(range(len(targets)))
        nothing = Decisions(rows, [[] for _ in rows], [0.0] * len(rows))
        trial.samples(metric, [nothing])  # the first call computes what the later ones share
        with Cost() as outcome:
            trial.samples(metric, [nothing])
        self._once = _PLOTS * plot.seconds + bootstrap.seconds
        self._outcome = outcome.seconds

    def seconds(self, outcomes: int) -> float:
        """Return the seconds to reserve for the report of that many outcomes."""
        return max(_MIN_SECONDS, _SAFETY * (self._once + outcomes * self._outcome))


def _trial(axes: Axes) -> None:
    """Draw lines with a legend and labels, as many as a learning curve of all strategies has."""
    for line in range(_TRIAL_LINES):
        axes.plot(range(_POINTS), [line + point for point in range(_POINTS)], marker="o", label=f"strategy {line}")
    axes.set_xlabel("training texts of each label")
    axes.set_ylabel("accuracy on the test texts")
    axes.set_title("Learning curves")
    axes.legend(fontsize=8)
