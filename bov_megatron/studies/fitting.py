"""Fitting the scaling law to a table of runs: what a fit is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bov_megatron.studies.law import Law


@dataclass(frozen=True)
class SecondMethod:
    """The same objective minimised in another way, from other starts."""

    method: str
    objective: float
    law: Law
    agrees: bool
    """Whether neither method found a point that is better than the other's by more than rounding."""


@dataclass(frozen=True)
class LackOfFit:
    """Is the misfit larger than what seeds explain? An F test of the law against one free mean per (variant, N, D)."""

    statistic: float
    degrees: tuple[int, int]
    """Of the numerator (misfit) and the denominator (between seeds)."""
    p_value: float
    seed_noise: float
    """Relative standard deviation of the loss between seeds of the same cell."""
    misfit: float
    """Relative root mean square by which the law misses the cells' means beyond seed noise; 0 if not beyond it."""


@dataclass(frozen=True)
class Holdout:
    """Runs at the largest budget, predicted by a fit to all others."""

    flops: float
    """The smallest compute among the runs held out."""
    runs: tuple[str, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    error: float
    """Root mean square of `log(predicted / measured)`."""
    bias: float
    """Mean of `log(predicted / measured)`: positive if the law expects too high a loss."""


@dataclass(frozen=True)
class Fit:
    """A fit to the runs of all variants, and what is known about how far to trust it."""

    law: Law
    """The joint fit: exponents shared, a factor on N and on D per variant."""
    objective: float
    """Sum over runs of the Huber loss (delta 1e-3) of `log(measured / predicted)`."""
    runs: int
    clusters: int
    """Groups of runs (same size, same seed) that are drawn together in the bootstrap."""
    n_column: str
    """Which count of parameters N is, e.g. `n_without_tables`."""
    loss_column: str
    level: float
    """Of the intervals, e.g. 0.9."""
    intervals: dict[str, tuple[float, float]]
    """By name: E, A, B, alpha, beta, compute_exponent, and n_factor.V and d_factor.V for each variant V."""
    draws: np.ndarray
    """The bootstrap's fits `[bootstraps, parameters]`, columns as in `names`; for bands around curves."""
    names: tuple[str, ...]
    separate: dict[str, Law]
    """One fit per variant, for comparison; a variant whose runs don't carry a fit of its own is not in it."""
    checked: SecondMethod
    residuals: np.ndarray
    """`log(measured / predicted)` per run, in the order of the table."""
    lack_of_fit: LackOfFit | None
    """None if no cell was run with several seeds."""
    holdout: Holdout | None
    """None if the runs without the largest budget don't carry a fit."""
    warnings: tuple[str, ...]
    """What a reader must know before using the numbers, one sentence each."""
