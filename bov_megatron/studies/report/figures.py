"""Figures of a report, each a function of its data and a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bov_megatron.studies.fitting import Fit
from bov_megatron.studies.isoflop import Parabola
from bov_megatron.studies.multiplier import Multiplier
from bov_megatron.studies.report.curves import Curve
from bov_megatron.studies.report.style import Layout, Look, label_ends, log_axis, panels
from bov_megatron.studies.report.tables import CELL, SCORES, interval, scientific
from bov_megatron.studies.table import CONVENTIONS

Looks = Mapping[str, Look]


def answers(multipliers: Sequence[Multiplier], looks: Looks, layout: Layout) -> Figure:
    """Each multiplier's headline value with its interval, in rows; 1 is the baseline."""
    groups = list(dict.fromkeys((m.variant, m.clock) for m in multipliers))
    figure, (axis,) = panels(layout, 1, 0.55 + 0.24 * (len(multipliers) + len(groups)))
    axis.set_xlim(*_limits([value for m in multipliers for value in (*m.value, 1.0)], 0.12))
    right, names, y = axis.get_xlim()[1], {}, 0
    for variant, clock in groups:
        look, y = looks[variant], y + 1
        axis.annotate(
            f"{variant}, {'time' if clock else 'compute'}", (0, y), (-6, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="center", color=look.colour, weight="bold",
        )  # fmt: skip
        for m in (m for m in multipliers if (m.variant, m.clock) == (variant, clock)):
            y += 1
            names[y] = CONVENTIONS[m.n_column]
            estimate, low, high = m.value
            axis.plot([low, high], [y, y], color=look.colour, linewidth=2.2, alpha=0.75, solid_capstyle="butt")
            axis.plot(estimate, y, "D" if clock else "o", color=look.colour, markersize=5.5)
            axis.annotate(
                "{}  [{}, {}]".format(*interval(*m.value)), (right, y), (4, 0), textcoords="offset points", va="center",
                fontsize=8.5, color="#222222", annotation_clip=False,
            )  # fmt: skip
    axis.axvline(1, color="#555555", linewidth=1)
    axis.set(ylim=(y + 0.7, 0.3), xlabel="× baseline (above 1: better)")
    axis.set_yticks(list(names), list(names.values()))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(6 if layout.columns > 1 else 3))
    return figure


def multiplier_over_compute(multipliers: Sequence[Multiplier], looks: Looks, layout: Layout) -> Figure:
    """Sc, and Sw where there is one, as functions of compute; solid with band where the data carry them."""
    kinds = [(False, "compute")] + ([(True, "wall-clock time")] if any(m.clock for m in multipliers) else [])
    figure, axes = panels(layout, len(kinds), 2.7)
    labels = []
    for axis, (clock, words) in zip(axes, kinds, strict=True):
        ends = []
        shown = [m for m in multipliers if m.clock == clock]
        for m in shown:
            look, inside = looks[m.variant], np.where(m.carried, 1.0, np.nan)
            axis.fill_between(m.flops, m.low, m.high, color=look.colour, alpha=0.08, linewidth=0)
            axis.fill_between(m.flops, m.low * inside, m.high * inside, color=look.colour, alpha=0.2, linewidth=0)
            axis.plot(m.flops, m.estimate, color=look.colour, linewidth=1.2, dashes=(1.5, 1.5))
            axis.plot(m.flops, m.estimate * inside, color=look.colour, linewidth=2.2)
            ends.append((m.flops[-1], m.estimate[-1], m.variant, look.colour))
        axis.axhline(1, color="#555555", linewidth=1)
        axis.set(xlabel="compute (FLOPs)", ylabel=f"{words}, × baseline")
        log_axis(axis, "x", np.concatenate([m.flops for m in shown]), scientific)
        carried = [v[m.carried] for m in shown for v in (m.low, m.high) if m.carried.any()]
        values = np.concatenate(carried or [m.estimate for m in shown])
        axis.set_ylim(*_limits([*values, *(end[1] for end in ends), 1.0], 0.12))
        labels.append(ends)
    label_ends(axes, labels)
    return figure


def differences(summary: pd.DataFrame, score: str, looks: Looks, layout: Layout) -> Figure:
    """Differences to the baseline with standard errors: over compute, or in rows for a single size and budget."""
    rows = summary.dropna(subset=[f"{score}_difference"])
    if len(rows.drop_duplicates(CELL)) == 1:
        return _differences_in_rows(rows, score, looks, layout)
    figure, (axis,) = panels(layout, 1, 3.0)
    variants, ends = [v for v in looks if v in set(rows.variant)], []
    for (size, variant), line in rows.groupby(["size", "variant"], sort=False):
        look = looks[variant]
        shift = 1 + 0.025 * (variants.index(variant) - (len(variants) - 1) / 2)
        x, y = line.flops * shift, line[f"{score}_difference"]
        axis.errorbar(x, y, line[f"{score}_standard_error"].fillna(0), color=look.colour, marker=look.marker,
                      markersize=4.5, linewidth=1.1, elinewidth=1.1, alpha=0.9)  # fmt: skip
        label = f"{size}" if len(variants) == 1 else f"{variant}, {size}"
        ends.append((x.iloc[-1], y.iloc[-1], label, look.colour))
    axis.axhline(0, color="#555555", linewidth=1)
    axis.set(xlabel="compute (FLOPs)", ylabel=f"{SCORES[score]}\nminus the baseline's")
    log_axis(axis, "x", rows.flops, scientific)
    label_ends([axis], [ends], 8 if len(ends) < 16 else 6.5)
    return figure


def _differences_in_rows(rows: pd.DataFrame, score: str, looks: Looks, layout: Layout) -> Figure:
    figure, (axis,) = panels(layout, 1, 0.7 + 0.26 * len(rows))
    for y, row in enumerate(rows.itertuples()):
        look, value = looks[row.variant], getattr(row, f"{score}_difference")
        error = np.nan_to_num(getattr(row, f"{score}_standard_error"))
        axis.errorbar(value, y, xerr=error, color=look.colour, marker="o", markersize=6)
    axis.axvline(0, color="#555555", linewidth=1)
    axis.set(xlabel=f"{SCORES[score]} minus the baseline's", ylim=(len(rows) - 0.5, -0.5))
    axis.set_yticks(range(len(rows)), rows.variant)
    return figure


def loss_curves(results: pd.DataFrame, curves: Mapping[str, Curve], looks: Looks, layout: Layout) -> Figure:
    """Training loss over tokens, a panel per size, a line per run."""
    drawn = results[results.cell.isin(curves)]
    sizes = list(drawn.groupby("size").n_all.min().sort_values().index)
    figure, axes = panels(layout, len(sizes), 2.4)
    labels = []
    for axis, size in zip(axes, sizes, strict=True):
        runs = drawn[drawn["size"] == size]
        last: dict[str, tuple[float, float]] = {}
        for run in runs.itertuples():
            curve, look = curves[run.cell], looks[run.variant]
            axis.plot(curve.tokens, curve.loss, color=look.colour, linewidth=1.0, alpha=0.75, dashes=look.dashes)
            last[run.variant] = max(last.get(run.variant, (0, 0)), (curve.tokens[-1], curve.loss[-1]))
        shown = [curves[cell] for cell in runs.cell]
        first = min(curve.tokens[-1] for curve in shown) / 8
        longest = max(curve.tokens[-1] for curve in shown)
        losses = np.concatenate([curve.loss[curve.tokens > curve.tokens[-1] / 4] for curve in shown])
        axis.set(title=size, xlabel="tokens", ylabel="training loss (nats/token)")
        axis.set_xlim(first, longest)
        axis.set_ylim(*_limits(losses, 0.05))
        log_axis(axis, "x", [first, longest])
        labels.append([(x, y, variant, looks[variant].colour) for variant, (x, y) in last.items()])
    label_ends(axes[:1], labels[:1])
    return figure


def isoflop(parabolas: Sequence[Parabola], looks: Looks, layout: Layout) -> Figure:
    """Loss over size at equal compute: a panel per variant, the baseline's as thin lines behind each."""
    baseline, *others = looks
    others = [v for v in others if any(p.variant == v for p in parabolas)]
    shown = others or [baseline]
    figure, axes = panels(layout, len(shown), 3.0, share=True)
    ends: list[list] = [[] for _ in shown]
    for axis, variant, labels in zip(axes, shown, ends, strict=True):
        for p in parabolas:
            if p.variant not in (variant, baseline):
                continue
            look, is_variant = looks[p.variant], p.variant == variant
            n = np.geomspace(p.n.min(), p.n.max(), 60)
            c0, c1, c2 = p.coefficients
            x = np.log(n)
            axis.plot(n, c0 + c1 * x + c2 * x**2, color=look.colour, linewidth=1.6 if is_variant else 1.0)
            axis.plot(p.n, p.loss, look.marker, color=look.colour, markersize=4 if is_variant else 3)
            if np.isfinite(p.best_n):
                axis.plot(p.best_n, p.best_loss, "*", color="white", markeredgecolor=look.colour, markersize=11)
            if is_variant:
                labels.append((n[-1], c0 + c1 * x[-1] + c2 * x[-1] ** 2, scientific(p.flops), look.colour))
        axis.set(xlabel="parameters N", ylabel="validation loss")
        axis.set_title(variant if variant == baseline else f"{variant} (grey: {baseline})", color=looks[variant].colour)
        log_axis(axis, "x", np.concatenate([p.n for p in parabolas]))
    label_ends(axes, ends)
    return figure


def fitted_losses(results: pd.DataFrame, fit: Fit, looks: Looks, layout: Layout) -> Figure:
    """The law with its band over tokens, a line per size and the runs as points; a panel per variant."""
    variants = [v for v in looks if v in fit.law.variants and v in set(results.variant)]
    figure, axes = panels(layout, len(variants), 2.9, share=True)
    ends: dict[str, list] = {}
    for axis, variant in zip(axes, variants, strict=True):
        runs, look = results[results.variant == variant], looks[variant]
        ends[variant] = []
        for size, points in runs.groupby("size", sort=False):
            n = points[fit.n_column].iloc[0]
            d = np.geomspace(points.tokens.min() / 1.3, points.tokens.max() * 1.3, 50)
            low, high = band(fit, n, d, variant)
            axis.fill_between(d, low, high, color=look.colour, alpha=0.18, linewidth=0)
            line = fit.law.loss(n, d, variant)
            axis.plot(d, line, color=look.colour, linewidth=1.2)
            axis.plot(points.tokens, points[fit.loss_column], look.marker, color=look.colour, markersize=4, mfc="white")
            ends[variant].append((d[-1], line[-1], size, look.colour))
        axis.set(xlabel="tokens D", ylabel=f"validation loss ({SCORES.get(fit.loss_column, fit.loss_column)})")
        axis.set_title(variant, color=look.colour)
        log_axis(axis, "x", results.tokens)
    label_ends(axes, list(ends.values()))
    return figure


def band(fit: Fit, n, d, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the law's interval at `fit.level`, from its bootstrap."""
    columns = {name: fit.draws[:, i, None] for i, name in enumerate(fit.names)}
    n_factor, d_factor = (columns.get(f"{kind}_factor.{variant}", 1.0) for kind in "nd")
    losses = columns["E"] + columns["A"] * (n_factor * n) ** -columns["alpha"]
    losses = losses + columns["B"] * (d_factor * np.asarray(d)) ** -columns["beta"]
    tail = (1 - fit.level) / 2
    low, high = np.quantile(losses, [tail, 1 - tail], axis=0)
    return low, high


def residuals(results: pd.DataFrame, fit: Fit, looks: Looks, layout: Layout) -> Figure:
    """Measured against predicted loss, in percent, over parameters and over tokens."""
    percent = 100 * np.asarray(fit.residuals)
    figure, axes = panels(layout, 2, 2.5)
    for axis, column, words in zip(axes, (fit.n_column, "tokens"), ("parameters N", "tokens D"), strict=True):
        for number, (variant, look) in enumerate(looks.items()):
            mine = (results.variant == variant).to_numpy()
            if not mine.any():
                continue
            axis.plot(results[column][mine] * 1.03**number, percent[mine], look.marker, color=look.colour, markersize=4,
                      alpha=0.85, label=variant)  # fmt: skip
        axis.axhline(0, color="#555555", linewidth=1)
        if fit.lack_of_fit is not None:
            noise = 100 * fit.lack_of_fit.seed_noise
            axis.axhspan(-noise, noise, color="#888888", alpha=0.15, linewidth=0)
        axis.set(xlabel=words, ylabel="measured above law (%)")
        log_axis(axis, "x", results[column])
    axes[0].legend(loc="lower left", bbox_to_anchor=(-0.02, 1), fontsize=8.5, ncols=3, columnspacing=1, handletextpad=0)
    return figure


def _limits(values, margin: float) -> tuple[float, float]:
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    room = (high - low) * margin or 0.05 * abs(high) or 1.0
    return low - room, high + room
