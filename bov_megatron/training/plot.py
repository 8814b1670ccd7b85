"""Plots of loss curves from runs' metrics files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bov_megatron.lifecycle import run_folder
from bov_megatron.training.callbacks.metrics_file import read_lines

COLOURS = ("#1f6f8b", "#d1603d", "#5b8c5a", "#7a5c99", "#b8860b", "#555555")
"""Of the runs, in order; distinguishable with red-green blindness."""


def plot_runs(runs: Mapping[str, Path], out: Path, title: str) -> Path:
    """Plot training loss and validation bits per byte against tokens, of several runs, to the PNG `out`.

    `runs` maps labels to run folders. Raises ValueError for a run without metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for colour, (label, run_dir) in zip(COLOURS, runs.items(), strict=False):
        recorded = read_lines(run_dir / run_folder.METRICS)
        # A loss that was not finite is null; lines that belong to no step have none.
        lines = [line for line in recorded if line.get("loss") is not None]
        if not lines:
            raise ValueError(f"{run_dir} has no {run_folder.METRICS} with a complete line")
        tokens = [line["tokens"] for line in lines]
        losses = [line["loss"] for line in lines]
        left.plot(tokens, losses, color=colour, alpha=0.35, linewidth=0.8)
        left.plot(tokens, _smooth(losses), color=colour, linewidth=1.8, label=label)
        scored = [line for line in recorded if "validation_bits_per_byte" in line]
        bits = [line["validation_bits_per_byte"] for line in scored]
        right.plot([line["tokens"] for line in scored], bits, color=colour, marker="o", markersize=4, label=label)
        if bits:
            right.annotate(
                f"{bits[-1]:.3f}", (scored[-1]["tokens"], bits[-1]), (6, 0), textcoords="offset points",
                color=colour, va="center", fontsize=9,
            )  # fmt: skip
    left.set(ylabel="training loss (nats per token)", xlabel="tokens")
    right.set(ylabel="validation (bits per byte)", xlabel="tokens")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=150)
    plt.close(figure)
    return out


def _smooth(values: list[float]) -> list[float]:
    """Centred moving average over 9 steps, fewer at both ends."""
    half = 4
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
