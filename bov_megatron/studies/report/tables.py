"""Tables of a report: means over seeds with paired differences to the baseline, and how numbers are written."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

CELL = ["size", "budget"]
"""What cells that are compared have in common; within them, runs are paired by seed."""
SCORES = {"loss": "nats per token", "bits_per_byte": "bits per byte"}
"""Final validation of a run: column of the results -> unit."""


def summarize(results: pd.DataFrame, baseline: str, variants: list[str]) -> pd.DataFrame:
    """One row per (size, budget, variant), in the order of size, then compute, then `variants`.

    Columns: size, budget, variant, runs, parameters, flops_per_token, steps, tokens, flops, tokens_per_second, and for
    each of SCORES its mean over seeds, and `difference`, `standard_error` and `pairs` against the baseline's runs of
    the same size, budget and seed. NaN where there is nothing to compare; see `paired_differences`.
    """
    grouped = results.groupby([*CELL, "variant"], sort=False)
    rows = grouped.agg(
        runs=("cell", "size"),
        parameters=("n_all", "first"),
        tokens=("tokens", "mean"),
        steps=("steps", "mean"),
        flops=("flops", "mean"),
        tokens_per_second=("tokens_per_second", "median"),
        **{score: (score, "mean") for score in SCORES},
    ).reset_index()
    rows["flops_per_token"] = rows.flops / rows.tokens
    for score in SCORES:
        differences = paired_differences(results, baseline, score).add_prefix(f"{score}_")
        rows = rows.merge(differences, how="left", left_on=[*CELL, "variant"], right_index=True)
    smallest = rows.groupby("size").parameters.transform("min")
    cheapest = rows.groupby(CELL).flops.transform("min")
    order = pd.DataFrame({"size": smallest, "budget": cheapest, "variant": rows.variant.map(variants.index)})
    return rows.loc[order.sort_values(["size", "budget", "variant"], kind="stable").index].reset_index(drop=True)


def paired_differences(results: pd.DataFrame, baseline: str, score: str) -> pd.DataFrame:
    """Mean of `score` minus the baseline's over pairs of runs of the same size, budget and seed.

    Returns difference, standard_error and pairs, indexed by (size, budget, variant). One seed or two say little about
    the spread of differences in a cell, so the variance is pooled over a variant's cells: the standard error of a cell
    with n pairs is sqrt(pooled variance / n); NaN if no cell has two pairs. The same seed is the same order of samples
    and, where they have the same parameters, the same initial weights: pairing removes what is common.
    """
    scored = results.dropna(subset=[score])
    of_baseline = scored[scored.variant == baseline].set_index([*CELL, "seed"])[score]
    others = scored[scored.variant != baseline].set_index([*CELL, "seed", "variant"])[score]
    pairs = others - of_baseline.reindex(others.index.droplevel("variant")).to_numpy()
    cells = pairs.dropna().groupby([*CELL, "variant"])
    table = pd.DataFrame({"difference": cells.mean(), "pairs": cells.size()})
    squares = cells.var(ddof=1).fillna(0.0) * (table.pairs - 1)
    by_variant = table.index.get_level_values("variant")
    degrees = (table.pairs - 1).groupby(by_variant).transform("sum")
    variance = squares.groupby(by_variant).transform("sum") / degrees.where(degrees > 0)
    return table.assign(standard_error=np.sqrt(variance / table.pairs), degrees=degrees)


def overall_differences(results: pd.DataFrame, baseline: str, score: str, level: float) -> pd.DataFrame:
    """The mean over cells of `paired_differences`, each cell with the same weight.

    Returns, indexed by variant: difference, low, high (interval by Student's t at `level`; NaN without repeated seeds),
    cells, better (cells in which the variant's mean is lower).
    """
    table = paired_differences(results, baseline, score)
    rows = {}
    for variant, cells in table.groupby("variant"):
        mean = cells.difference.mean()
        error = math.sqrt((cells.standard_error**2).sum(skipna=False)) / len(cells)
        degrees = cells.degrees.iloc[0]
        half = stats.t.ppf(0.5 + level / 2, degrees) * error if degrees > 0 else math.nan
        rows[variant] = (mean, mean - half, mean + half, len(cells), int((cells.difference < 0).sum()))
    return pd.DataFrame.from_dict(rows, "index", columns=["difference", "low", "high", "cells", "better"])


def headline_score(results: pd.DataFrame) -> str:
    """The score that is compared first: bits per byte where any run has it, as in the paper."""
    return "bits_per_byte" if results.bits_per_byte.notna().any() else "loss"


def significant(value: float, digits: int = 3) -> str:
    """`value` in so many digits: 1,234,000 as `1.23M`, 1.5e18 as `1.50×10¹⁸`, None and NaN as `–`."""
    if value is None or not math.isfinite(value) or value == 0:
        return "0" if value == 0 else "–"
    power = int(f"{abs(value):.{digits - 1}e}".split("e")[1])
    if not -3 < power < 12:
        return scientific(value, digits)
    scale, unit = next((scale, unit) for scale, unit in ((9, "B"), (6, "M"), (3, "K"), (-9, "")) if power >= scale)
    scale = max(scale, 0)
    text = f"{abs(value) / 10**scale:.{max(0, digits - 1 - power + scale)}f}{unit}"
    return ("−" if value < 0 else "") + text


def scientific(value: float, digits: int = 3) -> str:
    """`value` in so many digits and a power of ten, as FLOPs are written whatever their size: 5e11 as `5.00×10¹¹`."""
    mantissa, exponent = f"{value:.{digits - 1}e}".replace("-", "−").split("e")
    return f"{mantissa}×10{str(int(exponent.replace('−', '-'))).translate(_RAISED)}"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def interval(estimate: float, low: float, high: float) -> tuple[str, str, str]:
    """The three numbers with as many decimals as the interval's width warrants, at least two."""
    width = high - low
    decimals = max(2, 1 - math.ceil(math.log10(width))) if math.isfinite(width) and width > 0 else 2
    return fixed(estimate, decimals), fixed(low, decimals), fixed(high, decimals)


def fixed(value: float, decimals: int = 4, sign: bool = False) -> str:
    """`value` with so many decimals, `–` for None and NaN; `sign` also writes +."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", "−")
