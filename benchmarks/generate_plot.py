"""The picture of `bench.py generate`: memory against context length, as measured and as the formula says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

FORMS = (("#3d3d3d", "solid"), ("#0072B2", "solid"), ("#0072B2", (0, (5, 2))))
"""Of projection, bank, and the bank with its tables elsewhere: colour and line."""
PAPER = "#D55E00"
VOCABULARIES = {32_768: "#0072B2", 151_936: "#009E73"}
"""Those of the paper's Figure 5a, with their colours (Okabe and Ito's)."""
PAPER_ENDS = {16_384: -5, 1_048_576: 20}
"""Percent of the value cache that Figure 5a of arXiv 2606.02780 has saved at its ends."""
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def saved_share(context, vocab_size: int, sequences: int = 1):
    """Share of all layers' value cache that a bank in the last third saves, its tables taken off."""
    return (1 - vocab_size / (sequences * context)) / 3


def draw(
    path: Path, memory: Mapping[str, Mapping[int, int]], sequences: int, break_even: float, vocab_size: int
) -> None:
    """Write a PNG: bytes measured on the device, `memory[variant][context]`, and the formula beside the paper's figure.

    Args:
        break_even: context length from which the bank takes less, as measured.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.7), dpi=160)
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        _draw_measured(left, memory, sequences, break_even, vocab_size)
        _draw_formula(right, sequences)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_measured(axis, memory, sequences: int, break_even: float, vocab_size: int) -> None:
    for (source, sizes), (colour, form) in zip(memory.items(), FORMS, strict=True):
        contexts, megabytes = np.array(list(sizes)), np.array(list(sizes.values())) / 1e6
        slope, start = np.polyfit(contexts, megabytes, 1)
        end = contexts[-1] * 1.06
        axis.plot([0, end], [start, start + slope * end], color=colour, linewidth=1.6, linestyle=form)
        axis.plot(contexts, megabytes, "o", color=colour, markersize=5)
        label = {"xytext": (5, 6), "textcoords": "offset points", "annotation_clip": False, "va": "top"}
        axis.annotate(source.replace(", ", ",\n"), (end, start + slope * end), color=colour, **label)
        if start > 0.01 * megabytes[-1]:
            crossing = start + slope * break_even
            axis.annotate(
                f"tables: {start:.1f} MB", (0, start), (0.03, 0.4), textcoords="axes fraction", color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 0},
            )  # fmt: skip
    axis.plot([break_even] * 2, [0, crossing], color="#888888", linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        f"the bank takes less\nfrom {break_even:,.0f} tokens on\n(V / B = {vocab_size / sequences:,.0f})",
        (break_even, 0), (7, 9), textcoords="offset points", color="#444444",
    )  # fmt: skip
    axis.set(
        xlim=(0, None), ylim=(0, None), xlabel="context length, tokens", ylabel="MB of cache and tables on the device"
    )
    axis.set_title(f"Measured: {sequences} sequences, vocabulary {vocab_size:,}")


def _draw_formula(axis, sequences: int) -> None:
    contexts = np.geomspace(2**12, 2**20, 400)
    for vocab_size, colour in VOCABULARIES.items():
        for batch, form in ((1, "solid"), (sequences, (0, (5, 2)))):
            share = 100 * saved_share(contexts, vocab_size, batch)
            axis.plot(contexts, share, color=colour, linestyle=form, linewidth=1.7,
                      label=f"V = {vocab_size:,}, {batch} sequence{'s' if batch > 1 else ''}")  # fmt: skip
    axis.axhline(0, color="#888888", linewidth=1)
    axis.plot(*zip(*PAPER_ENDS.items(), strict=True), "D", color=PAPER, markersize=6, markerfacecolor="white",
              markeredgewidth=1.5, label="ends of the paper's Figure 5a", clip_on=False, zorder=5)  # fmt: skip
    axis.set_xscale("log", base=2)
    ticks = [2**12, 2**14, 2**16, 2**18, 2**20]
    axis.set_xticks(ticks, ["4K", "16K", "64K", "256K", "1M"])
    axis.set(xlim=(ticks[0], ticks[-1]), ylim=(-40, 37), xlabel="context length, tokens", ylabel="% of the value cache")
    axis.set_title("Formula: value cache saved, (1 − V / BT) / 3")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8.5, handlelength=2.6)
