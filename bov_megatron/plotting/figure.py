"""The picture of one or many runs: loss, bits per byte, gradient norm, learning rates, tokens/s and MFU.

Colours are distinguishable with every common colour blindness (Okabe and Ito); more than seven runs differ by the form
of the line as well. Lines are labelled where they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bov_megatron.plotting.curves import RATES, X_AXES, Run, envelope, evaluation_keys, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
FORMS: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)))
NAMED = 6
"""Up to so many runs, lines are labelled by name; more by the number in the legend."""
WIDTH, HEIGHT, LEFT, BELOW, ABOVE, CHARACTER = 3.9, 2.75, 0.9, 0.95, 0.8, 0.075
"""Inches: of a panel, left of each, below each, above all, and of a character of a label."""
BEGINNING = 0.1
"""Share of a run whose highest losses lie above the picture."""
ORDINARY = 0.995
"""Share of the later losses that decide how high the picture reaches; higher ones are marked at its upper edge."""


@dataclass(frozen=True)
class Panel:
    key: str
    title: str
    unit: str
    is_log: bool = False
    """Whether the scale is logarithmic where values differ by more than a factor of ten."""
    from_zero: bool = False
    is_labelled: bool = False
    """Whether lines are labelled where they end."""
    is_sparse: bool = False
    """Whether values are few enough to mark each."""


BITS = "bits per byte"
CORE = {"core": "CORE", "core_subset": "Tasks of CORE"}
PANELS = (
    Panel("loss", "Training loss", "nats per token", is_labelled=True),
    Panel("validation_bits_per_byte", "Validation", BITS, is_labelled=True, is_sparse=True),
    Panel("gradient_norm", "Gradient norm", "L2, before clipping", is_log=True, from_zero=True),
    Panel("learning_rate", "Learning rate", "per step", from_zero=True),
    Panel("tokens_per_second", "Throughput", "tokens per second", from_zero=True),
    Panel("mfu", "Model FLOPs utilisation", "% of the devices' peak", from_zero=True),
)


def draw(runs: Sequence[Run], x_axis: str = "steps", title: str | None = None) -> Figure:
    """The figure of `runs`, with a panel for each number that any of them has."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for panel in (*PANELS, *_evaluation_panels(runs)) if any(_has(run, panel) for run in runs)]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    legend = 0.0 if len(runs) == 1 else 0.25 + 0.2 * -(-len(runs) // _legend_columns(runs, columns))
    longest = max(len(run.label) for run in runs) + 8 if 1 < len(runs) <= NAMED else 12
    beside = LEFT + CHARACTER * longest
    width, height = columns * (WIDTH + beside), rows * (HEIGHT + BELOW) + ABOVE + legend
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11.5, "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
        # Fixed margins: matplotlib's layout engines take as long as the drawing.
        figure.subplots_adjust(
            left=LEFT / width, right=1 - (beside - LEFT) / width, wspace=beside / WIDTH, hspace=BELOW / HEIGHT,
            top=1 - ABOVE / height, bottom=(legend + 0.55) / height,
        )  # fmt: skip
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, panel, runs, x_axis)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        figure.text(0.2 / width, 1 - 0.2 / height, title or _title(runs), fontsize=13.5, va="top")
        if len(runs) > 1:
            _draw_legend(figure, runs, columns)
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write the figure in the format of the file's suffix: .png, .svg or .pdf."""
    fast: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}} if out.suffix == ".png" else {}
    figure.savefig(out, dpi=130, **fast)


def style(number: int) -> dict[str, Any]:
    """Colour and form of the line of run `number`."""
    forms = FORMS[number // len(COLOURS) % len(FORMS)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": forms}


def _has(run: Run, panel: Panel) -> bool:
    return any(len(run.curve(key)[0]) for key in _keys(run, panel))


def _evaluation_panels(runs: Sequence[Run]) -> list[Panel]:
    """One for each score that any run's recipe asks for."""
    panels = []
    for key in dict.fromkeys(key for run in runs if run.recipe for key in evaluation_keys(run.recipe)):
        name = key.rpartition("/")[2]
        title, unit = (f"Held-out {name}", BITS) if "bits_per_byte" in key else (CORE[name], "mean centred accuracy")
        panels.append(Panel(key, title, unit, is_labelled=True, is_sparse=True))
    return panels


def _keys(run: Run, panel: Panel) -> list[str]:
    if panel.key != "learning_rate":
        return [panel.key] if panel.key in run.columns.numbers else []
    return [key for key in RATES if key in run.columns.numbers]


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    (run,) = runs
    tokens = run.columns.numbers["tokens"]
    seen = f" · {_short(tokens[np.isfinite(tokens)].max())} tokens" if np.isfinite(tokens).any() else ""
    return f"{run.label} · step {run.step:,}{seen}"


def _draw_panel(axis: Axes, panel: Panel, runs: Sequence[Run], x_axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ends: list[tuple[float, float, str, str]] = []
    for number, run in enumerate(runs):
        keys = [key for key in _keys(run, panel) if len(run.curve(key)[0])]
        for place, key in enumerate(keys):
            look = style(place if len(runs) == 1 and len(keys) > 1 else number)
            end = _draw_curve(axis, panel, run, key, look, f"run-{number}", len(runs))
            label = run.label if len(runs) <= NAMED else str(number + 1)
            if len(keys) > 1:
                label = key.removeprefix("learning_rate/") if len(runs) == 1 else ""
            elif panel.is_labelled and len(runs) <= NAMED:
                label += f"  {end[1]:.3f}" if len(runs) > 1 else f"{end[1]:.4g}"
                label = label.removeprefix(run.label) if len(runs) == 1 else label
            if label and (panel.is_labelled or len(keys) > 1):
                ends.append((*end, label, look["color"]))
    of = " of block matrices" if panel.key == "learning_rate" and len(runs) > 1 else ""
    axis.set_title(panel.title + of, loc="left", fontweight="bold")
    axis.set_ylabel(panel.unit)
    axis.set_xlabel(X_AXES[x_axis])
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    short = FuncFormatter(lambda number, _: _short(number))
    axis.xaxis.set_major_formatter(short)
    low, high = axis.dataLim.intervaly
    if panel.is_log and high > 10 * low > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(short)
    elif panel.from_zero:
        axis.set_ylim(0, 1.12 * high or 1)
    if panel.key in ("tokens_per_second", "learning_rate"):
        axis.yaxis.set_major_formatter(short)
    if panel.key == "loss" or panel.unit == BITS:
        _limit(axis, panel, runs)
    if panel.key == "loss":
        for number, run in enumerate(runs):
            _draw_at_the_top(axis, run.rolled_back(), number, "v")
            _draw_at_the_top(axis, run.not_finite(), number, "x")
    _label_ends(axis, ends)


def _draw_curve(
    axis: Axes, panel: Panel, run: Run, key: str, look: dict, name: str, run_count: int
) -> tuple[float, float]:
    """Draw one number of a run; returns where its line ends."""
    x, values = run.curve(key)
    if panel.key == "mfu":
        values = 100 * values
    if panel.is_sparse and len(x) <= 60:
        axis.plot(x, values, marker="o", markersize=3.2, linewidth=1.4, gid=name, **look)
        return float(x[-1]), float(values[-1])
    if panel.key == "learning_rate" or panel.is_sparse:  # no noise to average
        thin = envelope(x, values)
        axis.plot(thin.x, thin.mean, linewidth=1.4, gid=name, **look)
        return float(x[-1]), float(values[-1])
    thin, colour = envelope(x, values), look["color"]
    strength = 0.30 if run_count <= 3 else 0.18 if run_count <= 8 else 0.12
    if thin.is_thinned:
        axis.fill_between(thin.x, thin.low, thin.high, color=colour, alpha=strength, linewidth=0.4, gid=name)
    else:
        axis.plot(thin.x, thin.mean, color=colour, alpha=min(2 * strength, 0.5), linewidth=0.7, gid=name)
    mean = smooth(thin.mean, max(1, len(thin.x) // 60) | 1)
    axis.plot(thin.x, mean, linewidth=1.6 if run_count <= 8 else 1.1, gid=name, **look)
    return float(x[-1]), float(mean[-1])


def _limit(axis: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    """Cut off the descent of the first steps, which would flatten the rest, and mark each later value above."""
    curves = [run.curve(panel.key) for run in runs]
    thinned = [envelope(x, values) for x, values in curves if len(x)]
    later = [thin.x >= thin.x[0] + BEGINNING * (thin.x[-1] - thin.x[0]) * (len(thin.x) > 20) for thin in thinned]
    low = min(thin.low.min() for thin in thinned)
    high = max(
        np.quantile(thin.high[now], ORDINARY) if panel.key == "loss" else thin.high[now].max()
        for thin, now in zip(thinned, later, strict=True)
    )
    margin = 0.06 * (high - low) or 0.05 * high
    axis.set_ylim(low - margin, high + margin)
    highest: tuple[float, float] = (0.0, 0.0)
    for number, (thin, now) in enumerate(zip(thinned, later, strict=True)):
        above = now & (thin.high > high + margin)
        _draw_at_the_top(axis, thin.x[above], number, "^")
        if above.any():
            place = int(np.argmax(np.where(above, thin.high, 0)))
            highest = max(highest, (float(thin.high[place]), float(thin.x[place])))
    if highest[0]:
        axis.annotate(f"{highest[0]:.3g}", (highest[1], 1), (0, 5), xycoords=axis.get_xaxis_transform(),
                      textcoords="offset points", ha="center", fontsize=8.5)  # fmt: skip


def _draw_at_the_top(axis: Axes, x: np.ndarray, number: int, marker: str) -> None:
    """Marks at the upper edge, in the run's colour."""
    axis.plot(
        x, np.full(len(x), 0.985), transform=axis.get_xaxis_transform(), linestyle="", marker=marker, markersize=6,
        color=style(number)["color"], clip_on=False, gid=f"run-{number}",
    )  # fmt: skip


def _label_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write labels right of the lines' ends, moved apart where they would overlap."""
    if not ends:
        return
    from matplotlib.transforms import blended_transform_factory

    ends = sorted(ends, key=lambda end: end[1])
    wanted = axis.transAxes.inverted().transform(axis.transData.transform([end[:2] for end in ends]))[:, 1]
    places = _apart(np.clip(wanted, 0.02, 0.98), min(0.052, 0.96 / len(ends)))
    right = max(end[0] for end in ends)
    place_of = blended_transform_factory(axis.transData, axis.transAxes)
    for (_, _, label, colour), y in zip(ends, places, strict=True):
        axis.annotate(
            label, (right, y), (5, 0), xycoords=place_of, textcoords="offset points", color=colour, va="center",
            fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def _apart(wanted: np.ndarray, distance: float) -> np.ndarray:
    """Ascending places between 0 and 1 near the `wanted` ones, at least `distance` from each other."""
    steps = distance * np.arange(len(wanted))
    upwards = np.minimum(np.maximum.accumulate(wanted - steps), 0.98 - steps[-1])
    downwards = np.maximum(np.minimum.accumulate((wanted - steps)[::-1])[::-1], 0.02)
    return (upwards + downwards) / 2 + steps


def _legend_columns(runs: Sequence[Run], panel_columns: int) -> int:
    longest = max(len(run.label) for run in runs) + 26
    return max(1, min(len(runs), 58 * panel_columns // longest))


def _draw_legend(figure: Figure, runs: Sequence[Run], panel_columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number, run in enumerate(runs):
        bits, loss = run.last("validation_bits_per_byte"), run.last("loss")
        score = f"{bits:.4f} bits/byte" if bits is not None else f"loss {loss:.3f}" if loss is not None else ""
        prefix = f"{number + 1}  " if len(runs) > NAMED else ""
        handles.append(Line2D([], [], linewidth=2.2, label=f"{prefix}{run.label}  ({score})", **style(number)))
    figure.legend(
        handles=handles, loc="lower left", ncols=_legend_columns(runs, panel_columns), frameon=False,
        handlelength=3.2, columnspacing=2.0, fontsize=9,
    )  # fmt: skip


def _short(number: float) -> str:
    """E.g. 8.39 billion as 8.39B, 3.9e19 as 3.9e19."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < 1e15:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}".replace("e+", "e")
