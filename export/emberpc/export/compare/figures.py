"""Draw one plot as a PNG file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emberpc.export.files import staged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.2, 4.4)
_DOTS_PER_INCH = 130


def draw(plot: Callable[[Axes], None], path: Path) -> Path:
    """Draw a plot, and write it as PNG to `path`; return `path`.

    Args:
        plot: draws on the axes that it gets.
        path: file to write; its folder must exist.

    Raises:
        OSError: the file cannot be written.
        ExportError: `path` is a folder or a device.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    plot(axes)
    with staged(path) as beside, warnings.catch_warnings():
        # matplotlib's font lacks, for example, Chinese; the tables of the report have the labels, too.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(beside, format="png")
    return path
