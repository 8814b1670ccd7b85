"""How figures look: colours of variants, sizes of figures, labels at the ends of lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.optimize import isotonic_regression

from bov_megatron.studies.report.tables import significant

BASELINE_COLOUR = "#3d3d3d"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9A6A00", "#56B4E9")
"""Of the variants, in order: Okabe and Ito's, distinguishable with any colour blindness; yellow darkened for paper."""
MARKERS = "osD^vP"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "study",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Layout:
    """A figure's width in inches, and how many panels fit beside each other."""

    width: float
    columns: int


WIDE = Layout(width=7.4, columns=2)
"""For screens and paper."""
NARROW = Layout(width=4.0, columns=1)
"""For phones: the same panels below each other, with text of the same size."""


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    dashes: tuple


def looks(variants: Sequence[str], baseline: str) -> dict[str, Look]:
    """Colour, marker and dashes of each variant; the baseline is dark grey. All differ, beyond COLOURS by marker and
    dashes."""
    found = {baseline: Look(BASELINE_COLOUR, "o", ())}
    for number, variant in enumerate(v for v in variants if v != baseline):
        turn, colour = divmod(number, len(COLOURS))
        dashes = ((), (5, 1.5), (1.5, 1.5))[turn % 3]
        found[variant] = Look(COLOURS[colour], MARKERS[(number + 1) % len(MARKERS)], dashes)
    return found


def panels(layout: Layout, count: int, height: float, share: bool = False) -> tuple[Figure, list[Axes]]:
    """`count` panels in rows of `layout.columns`; `height` in inches per row."""
    columns = min(layout.columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(layout.width, height * rows + 0.1))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share, sharex=share)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    if share:
        for axis in axes[:count]:
            axis.tick_params(labelbottom=True, labelleft=True)
    return figure, axes[:count]


def log_axis(axis: Axes, which: str, values, write: Callable[[float, int], str] = significant) -> None:
    """Make `which` ("x" or "y") logarithmic, with readable ticks whatever `values` span, two digits as `write` does."""
    axis.set(**{f"{which}scale": "log"})
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    decades = np.log10(finite.max() / finite.min()) if len(finite) else 1.0
    steps: tuple[float, ...]
    if decades > 1.7:
        steps = (1,)
    elif decades > 0.8:
        steps = (1, 3)
    else:
        steps = (1, 2, 3, 5) if decades > 0.4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=steps, numticks=5))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: _short(write(value, 2))))
    ticks.set_minor_locator(NullLocator())


def _short(text: str) -> str:
    """Without a zero behind the point."""
    return re.sub(r"\.0(?!\d)", "", text)


Label = tuple[float, float, str, str]
"""x and y of a line's end, text, colour."""


def label_ends(axes: Sequence[Axes], labels: Sequence[Sequence[Label]], size: float = 8.5) -> None:
    """Write each axes' labels to the right of line ends, moved apart vertically where they would overlap.

    To be called once for a figure, when its limits are final.
    """
    figure = axes[0].get_figure(root=True)
    engine = figure and figure.get_layout_engine()
    assert figure and engine, "figures are made by `panels`, under STYLE"
    engine.execute(figure)  # so that data can be converted to pixels
    height = size * figure.dpi / 72 * 1.15
    for axis, ends in zip(axes, labels, strict=True):
        ends = sorted(ends, key=lambda end: end[1])
        wanted = np.array([float(axis.transData.transform(end[:2])[1]) for end in ends])
        for (x, y, text, colour), here, at in zip(ends, wanted, _spread(wanted, height), strict=True):
            axis.annotate(
                text, (x, y), (5, (at - here) * 72 / figure.dpi), textcoords="offset points", color=colour,
                fontsize=size, va="center", annotation_clip=False,
            )  # fmt: skip


def _spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Sorted `positions` moved as little as needed (least squares) to be `gap` apart: isotonic regression."""
    if len(positions) < 2:
        return positions
    steps = np.arange(len(positions)) * gap
    return isotonic_regression(positions - steps).x + steps
