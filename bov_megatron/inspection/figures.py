"""The figures of the page. Layers are coloured from dark (the first) to light, runs as in studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bov_megatron.inspection.findings import Curve, FrequencyLosses, Inspected
from bov_megatron.inspection.frequencies import Frequencies
from bov_megatron.inspection.tables import TableRows, by_frequency
from bov_megatron.studies.report.style import BASELINE_COLOUR, COLOURS, Label, Layout, label_ends, log_axis, panels

BANK_COLOUR, OTHER_COLOUR = COLOURS[0], BASELINE_COLOUR
PER_MILLION = "occurrences per million tokens of training text"
LABELLED = 6
"""Up to so many layers are labelled where their lines end; of more, every second or third."""


def layer_colours(count: int) -> list[str]:
    return [to_hex(colormaps["viridis"](place)) for place in np.linspace(0.05, 0.82, count)]


def gammas(curves: Sequence[Curve], layout: Layout) -> Figure:
    """Coefficients over steps, one panel for each kind."""
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    figure, axes = panels(layout, len(kinds), 3.2)
    ends: list[list[Label]] = []
    for axis, kind in zip(axes, kinds, strict=True):
        shown = [curve for curve in curves if curve.kind == kind]
        ends.append([])
        for number, (curve, colour) in enumerate(zip(shown, layer_colours(len(shown)), strict=True)):
            axis.plot(curve.steps, curve.values, color=colour)
            if _is_labelled(number, len(shown)):
                ends[-1].append((curve.steps[-1], curve.values[-1], f"layer {curve.layer}", colour))
        axis.set(title=kind, xlabel="step")
    label_ends(axes, ends)
    return figure


def row_norms(tables: Sequence[TableRows], frequencies: Frequencies, layout: Layout) -> Figure:
    """All rows of one table, and the median of every table."""
    figure, axes = panels(layout, 2, 3.3)
    _cloud(axes[0], tables[-1], frequencies)
    _medians(axes[1], tables, [table.norms for table in tables], frequencies)
    axes[1].set(title="Median of each table", ylabel="norm of a row")
    return figure


def distances(tables: Sequence[TableRows], frequencies: Frequencies, layout: Layout) -> Figure:
    """How far rows have gone from where they began."""
    figure, axes = panels(layout, 2, 3.3)
    places = np.arange(len(tables))
    bars = axes[0].bar(places, [table.distance for table in tables], color=layer_colours(len(tables)), width=0.7)
    axes[0].bar_label(bars, [f"{table.distance:.2f}" for table in tables], fontsize=8, padding=2)
    axes[0].set_xticks(places, [str(table.layer) if table.layer is not None else "shared" for table in tables])
    axes[0].margins(y=0.12)
    axes[0].grid(axis="x", visible=False)
    axes[0].set_axisbelow(True)
    axes[0].set(title="Whole table", xlabel="layer", ylabel="distance / initial norm")
    _medians(axes[1], tables, [table.distances for table in tables], frequencies)
    axes[1].set(title="Median row", ylabel="distance / initial norm")
    return figure


def attention(runs: Sequence[Inspected], layout: Layout) -> Figure:
    """Root mean square norm of what each layer's attention adds, bank layers marked; a panel for each run."""
    figure, axes = panels(layout, len(runs), 2.9, share=len(runs) > 1)
    for axis, run in zip(axes, runs, strict=True):
        assert run.behaviour is not None
        norms = np.sqrt(run.behaviour.attention)
        is_bank = np.isin(np.arange(len(norms)), run.source_layers)
        axis.bar(np.arange(len(norms)), norms, width=0.75, color=np.where(is_bank, BANK_COLOUR, "#b4b9c0"))
        axis.grid(axis="x", visible=False)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(title=run.name, xlabel="layer", ylabel="norm (rms over tokens)")
        if is_bank.any():
            words = run.recipe.model.value.source.replace("_", " ")
            axis.legend(handles=[Patch(color=BANK_COLOUR, label=words), Patch(color="#b4b9c0", label="projection")],
                        fontsize=8)  # fmt: skip
    return figure


def losses(found: Sequence[FrequencyLosses], names: Sequence[str], layout: Layout) -> Figure:
    """Loss by the frequency of the target; with two runs their difference as well."""
    figure, axes = panels(layout, 2, 3.3)
    colours = [BANK_COLOUR, OTHER_COLOUR]
    ends: list[list[Label]] = [[], []]
    for of_run, name, colour in zip(found, names, colours, strict=False):
        axes[0].plot(of_run.centres, of_run.means, color=colour, marker="o", markersize=3.5)
        ends[0].append((of_run.centres[-1], of_run.means[-1], name, colour))
    log_axis(axes[0], "x", found[0].centres)
    axes[0].set(title="Loss by target", xlabel=PER_MILLION, ylabel="nats per token")
    shares = found[0].counts / found[0].counts.sum()
    if len(found) == 1:
        axes[1].bar(np.arange(len(shares)), shares, color="#b4b9c0")
        axes[1].set_xticks(np.arange(len(shares)), [_short(x) for x in found[0].centres], rotation=45)
        axes[1].set(title="Share of the targets", xlabel=PER_MILLION)
    else:
        difference, error = found[0].difference_to(found[1])
        axes[1].axhline(0, color=BASELINE_COLOUR, linewidth=0.9)
        axes[1].errorbar(found[0].centres, difference, 1.96 * error, color=BANK_COLOUR, marker="o", markersize=4,
                         capsize=2, elinewidth=1)  # fmt: skip
        log_axis(axes[1], "x", found[0].centres)
        axes[1].set(title="Difference", xlabel=PER_MILLION, ylabel="nats per token")
    label_ends(axes, ends)
    return figure


def _cloud(axis: Axes, table: TableRows, frequencies: Frequencies) -> None:
    seen = frequencies.counts > 0
    x, y = frequencies.per_million()[seen], table.norms[seen]
    axis.hexbin(x, y, xscale="log", gridsize=(42, 26), bins="log", cmap="Blues", mincnt=1, linewidths=0.1)
    axis.set_axisbelow(True)
    log_axis(axis, "x", x)
    initial = np.sqrt(np.median(table.initial_squares))
    axis.axhline(initial, color="#D55E00", linewidth=1, linestyle=(0, (4, 2)))
    axis.annotate("at the start", (1, initial), (-3, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8, color="#D55E00")  # fmt: skip
    axis.set(title=f"All rows, {table.label}", xlabel=PER_MILLION, ylabel="norm of a row")


def _medians(axis: Axes, tables: Sequence[TableRows], values: Sequence[np.ndarray], frequencies: Frequencies) -> None:
    bins, centres = frequencies.bins(), frequencies.centres()
    ends: list[Label] = []
    for number, (table, of_rows, colour) in enumerate(zip(tables, values, layer_colours(len(tables)), strict=True)):
        medians = by_frequency(of_rows, bins, len(centres), 0.5)
        known = np.isfinite(medians)
        axis.plot(centres[known], medians[known], color=colour, marker="o", markersize=2.8)
        if _is_labelled(number, len(tables)):
            ends.append((centres[known][-1], medians[known][-1], table.label, colour))
    log_axis(axis, "x", centres)
    axis.set(xlabel=PER_MILLION)
    label_ends([axis], [ends])


def _is_labelled(number: int, count: int) -> bool:
    return (count - 1 - number) % -(-count // LABELLED) == 0


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
